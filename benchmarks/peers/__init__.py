"""One file per library, ours among them: how its current API is called. A factory turns a workload into a call."""
