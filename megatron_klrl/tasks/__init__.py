"""Prompts and their verifiers.

Import a task from its own module: `tasks.arithmetic.ArithmeticTask`, `tasks.jsonl_file.JsonlTask`; `tasks.task.Task` is
what both implement.
"""
