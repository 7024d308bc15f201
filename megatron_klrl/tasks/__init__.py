"""Prompts and their verifiers.

`sources.make_task` makes a task from a recipe's source; `task.Task` is what each implements: `arithmetic`, `countdown`
and `procedural` generate, `row_task` draws from tables. Verifiers that may hang run in processes: `verifier_pool`.
"""
