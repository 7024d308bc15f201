"""Comparisons with other libraries: `python benchmarks/run.py --list`. The method stands in docs/benchmarks.md."""
