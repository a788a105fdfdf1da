"""The reconcile tasks: one a file, run by `control.driver`. None takes input; all may run twice."""
