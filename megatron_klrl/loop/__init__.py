"""The loop: one train step, evaluation, what a run leaves behind."""
