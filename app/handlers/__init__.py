"""What a job does: one module for each kind, `run(job, context)` in each."""
