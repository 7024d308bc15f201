"""`python benchmarks/run.py NAME`: starts benchmarks.command from any folder, without importing anything heavy."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module("benchmarks.command", run_name="__main__", alter_sys=True)
