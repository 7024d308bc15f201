"""Arguments that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted overrides, e.g. kl.beta=0.3", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
TracebackOption = Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Also draw a picture (.png, .pdf, .svg).", show_default=False)
]
