"""Checks of the real, sharded trainer and engine, made before a run."""
