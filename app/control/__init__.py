"""ROOM 4. The control plane: verbs are functions over a session, tasks reconcile."""
