"""Prints shell exports that make uv use the package index that pip is configured for.

uv reads neither pip.conf nor PIP_* variables, so behind a mirror it would look in the wrong place. A uv variable that
is already set is left alone. Runs before anything is installed: standard library only.
"""

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping

# pip's option -> (uv's variable, what separates several values there)
OPTIONS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}
# pip's own order: a variable beats a section for `pip install`, which beats the global section.
SECTIONS = ("global", "install", ":env:")


def pip_options(listing: str) -> dict[str, str]:
    """Reads the output of `pip config list`, lines of `section.option='value'`."""
    found: dict[str, str] = {}
    for section in SECTIONS:
        for line in listing.splitlines():
            key, separator, value = line.partition("=")
            if separator and key.startswith(f"{section}."):
                found[key.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    return found


def exports(options: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """Shell lines for every pip option that uv has a variable for and the user has not set one of."""
    lines = []
    for option, (variable, separator) in OPTIONS.items():
        if option in options and variable not in environment:
            value = separator.join(options[option].split())
            lines.append(f"export {variable}={shlex.quote(value)}")
    if "extra-index-url" in options and "UV_INDEX_STRATEGY" not in environment:
        # pip looks at all indexes together; uv stops at the first that knows the name. Hashes decide what is accepted.
        lines.append("export UV_INDEX_STRATEGY=unsafe-best-match")
    return lines


def main() -> None:
    """Asks the running Python's pip for its configuration and writes the exports to stdout."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sys.stdout.write("".join(f"{line}\n" for line in exports(pip_options(listing), os.environ)))


if __name__ == "__main__":
    main()
