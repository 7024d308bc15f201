"""`python benchmarks/report.py`: writes the tables of benchmarks/results/ into docs/benchmarks.md; --check compares.

The page keeps its prose; what is made from results/NAME.json stands between `<!-- results: NAME -->` and
`<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- results: (?P<name>\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def render_page(page: str, results: Path, render: Callable[[dict[str, Any]], str]) -> str:
    """The page with every block made from its record; a benchmark that has none says how to get it."""

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        path = results / f"{name}.json"
        if not path.exists():
            command = f"python benchmarks/run.py {name} --json benchmarks/results/{name}.json"
            return f"{found[1]}\nNo figures yet: `{command}`.\n\n{found[3]}"
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["benchmark"] != name or record["quick"]:
            raise SystemExit(f"{path}: is a quick run or one of {record['benchmark']}; only full runs are published")
        return f"{found[1]}\n{render(record)}\n{found[3]}"

    return _BLOCK.sub(block, page)


def main() -> int:
    """Exit code 1 with --check when the page is not what would be written."""
    sys.path.insert(0, str(ROOT))
    render = import_module("benchmarks.harness.tables").render
    page = PAGE.read_text(encoding="utf-8")
    made = render_page(page, RESULTS, render)
    if "--check" in sys.argv[1:]:
        if made != page:
            sys.stderr.write(f"{PAGE} is not what its records say; run: python benchmarks/report.py\n")
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
