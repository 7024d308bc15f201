"""The command line: which benchmarks, how much of them, where the record goes."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import machine, record
from benchmarks.harness.crew import CrewError
from benchmarks.harness.session import Effort, Session
from benchmarks.harness.spec import Benchmark
from benchmarks.harness.tables import render
from benchmarks.suites import CPU_NAMES, GPU_NAMES, benchmark

_SETS = {"all": CPU_NAMES, "gpu": GPU_NAMES}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when every contestant that is installed gave a figure, 1 when one did not, 2 for a wrong command."""
    options = _parser().parse_args(arguments)
    if options.list:
        return _list()
    if options.name is None:
        return _refuse(f"say which benchmark: {', '.join([*_SETS, *CPU_NAMES, *GPU_NAMES])}, or --list")
    names = _SETS.get(options.name, (options.name,))
    if not set(names) <= {*CPU_NAMES, *GPU_NAMES}:
        return _refuse(f"no benchmark {options.name!r}; there are: {', '.join([*_SETS, *CPU_NAMES, *GPU_NAMES])}")
    if options.json is not None and len(names) > 1 and options.json.is_file():
        return _refuse(f"--json {options.json}: {options.name} leaves {len(names)} files, so name a folder")
    _say(f"[benchmarks] {', '.join(names)}; {machine.cores()} cores, {options.threads} threads")
    if any(name in GPU_NAMES for name in names) and not machine.has_cuda():
        return _refuse(f"{', '.join(names)}: needs a CUDA GPU, and torch in {sys.executable} sees none")
    return max(_one(name, options, in_folder=len(names) > 1) for name in names)


def _one(name: str, options: argparse.Namespace, *, in_folder: bool) -> int:
    chosen = _reduced(benchmark(name), options.case) if options.case else benchmark(name)
    if not chosen.cases:
        return _refuse(f"{name} has no case {options.case!r}; its cases: {', '.join(_case_names(name, options))}")
    effort = Effort(
        rounds=options.rounds or (2 if options.quick else chosen.rounds), calls=chosen.calls, threads=options.threads
    )
    found = run(chosen, effort, quick=options.quick)
    _say(f"\n## {name}\n\n{render(found)}")
    if options.json is not None:
        path = options.json / f"{name}.json" if in_folder or options.json.is_dir() else options.json
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        _say(f"[{name}] record in {path}")
    failed = record.failures(found)
    for line in failed:
        sys.stderr.write(f"[{name}] no figure: {line}\n")
    return 1 if failed else 0


def run(chosen: Benchmark, effort: Effort, *, quick: bool) -> record.Json:
    """The record of one benchmark. A quick run keeps its processes from case to case: starting them is most of it."""
    if quick:
        chosen = replace(chosen, cases=chosen.quick_cases, shared_processes=True)
    found = record.opening(chosen, effort, quick=quick)
    with Session(chosen, effort, _say) as session:
        _say(f"[{chosen.name}] measuring what this machine can do at best")
        found["ceilings"] = session.ceilings(found["device"])
        found["cases"] = []
        for case in chosen.cases:
            sizes, entries = session.run(case)
            found["cases"].append(record.case_record(case, sizes, entries))
    record.closing(found, chosen)
    return found


def _reduced(chosen: Benchmark, wanted: str) -> Benchmark:
    """The benchmark with the cases whose names contain ``wanted``."""
    return replace(
        chosen,
        cases=tuple(case for case in chosen.cases if wanted in case.name),
        quick_cases=tuple(case for case in chosen.quick_cases if wanted in case.name),
    )


def _case_names(name: str, options: argparse.Namespace) -> list[str]:
    chosen = benchmark(name)
    return [case.name for case in (chosen.quick_cases if options.quick else chosen.cases)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py", description="Ours and every peer in one run, on the same inputs, parity first."
    )
    parser.add_argument("name", nargs="?", help="a benchmark; 'all' for those of the CPU, 'gpu' for those of a GPU")
    parser.add_argument("--list", action="store_true", help="name every benchmark and what it compares")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds: does everything work?")
    parser.add_argument("--json", type=Path, help="file for the record, or a folder, which 'all' and 'gpu' need")
    parser.add_argument(
        "--rounds", type=_positive, default=0, help="turns of each contestant, instead of the benchmark's own"
    )
    parser.add_argument("--case", default="", help="only cases whose names contain this")
    parser.add_argument(
        "--threads", type=_positive, default=machine.cores(), help="threads of a contestant (default: cores)"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _list() -> int:
    for name in (*CPU_NAMES, *GPU_NAMES):
        chosen = benchmark(name)
        _say(f"{name:20} {chosen.summary}")
        for group, contestants in _groups(chosen).items():
            _say(f"{'':20}   {group}: {'; '.join(contestants)}")
    return 0


def _groups(chosen: Benchmark) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case in chosen.cases:
        for each in case.contestants:
            names = found.setdefault(each.group, [])
            if each.name not in names:
                names.append(each.name)
    return found


def _refuse(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 2


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CrewError as error:
        sys.exit(f"the run ended: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
