"""Events: what happened to a job, in order."""
