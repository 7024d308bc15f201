"""docs/reference/cli.md, from the commands themselves."""

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

_PAGE = """# Commands

Made by `megatron_klrl.cli.reference.render_cli()`; do not edit. Exit codes: 0 fine, 1 the work failed, 2 the input is
wrong (one sentence that names the field and the fix; `--traceback` shows where).
"""


def render_cli(app: Any) -> str:
    """The reference page of the command line.

    Args:
        app: of cli/main.py.
    """
    return _PAGE + "".join(_section(name, command) for name, command in _commands(get_command(app), "klrl"))


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for child, found in inner.items():
        if not found.hidden:
            yield from _commands(found, f"{name} {child}")


def _section(name: str, command: Any) -> str:
    description, _, example = (command.help or "").partition("Example:")
    about = " ".join(description.split())
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join([name, *(_argument(parameter) for parameter in arguments)])
    lines = [f"\n## `{name}`\n\n{about}\n\n```console\n{usage}\n```\n\nFor example: `{' '.join(example.split())}`\n"]
    rows = [f"| {_names(option)} | {_default(option)} | {_flat(option.help or '')} |" for option in options]
    if rows:
        lines.append("\n| option | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "".join(lines)


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}{' ...' if parameter.nargs == -1 else ''}]"


def _names(option: Any) -> str:
    takes = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    return f"`{', '.join(option.opts)}{takes}`"


def _default(option: Any) -> str:
    shown = option.show_default if isinstance(option.show_default, str) else option.default
    if option.required:
        return "required"
    return "" if option.is_flag or shown is None else f"`{shown}`"


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
