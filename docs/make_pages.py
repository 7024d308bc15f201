"""Write the pages of docs/ that are made from code; tests hold them to it. Run: python docs/make_pages.py"""

from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_klrl.cli.main import app
from megatron_klrl.cli.reference import render_cli
from megatron_klrl.config.presets import render_presets
from megatron_klrl.config.reference import render_config, render_migrating
from megatron_klrl.kl.catalogue import render_catalogue
from megatron_klrl.metrics.names import render_metrics

DOCS = Path(__file__).parent
PAGES: Mapping[str, Callable[[], str]] = {
    "reference/config.md": render_config,
    "reference/cli.md": lambda: render_cli(app),
    "reference/metrics.md": render_metrics,
    "kl/catalogue.md": render_catalogue,
    "kl/presets.md": render_presets,
    "migrating.md": render_migrating,
}

if __name__ == "__main__":
    for name, render in PAGES.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
