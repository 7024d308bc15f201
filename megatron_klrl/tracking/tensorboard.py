"""TensorBoard event files."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_klrl.metrics.names import NOT_PLOTTED, PANELS


class TensorBoardWriter:
    """Scalars under the metric names, and text."""

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        """Open a folder of event files.

        Args:
            folder: of the event files.
            purge_step: a resumed run's first step; what was written from there on disappears from the page.
        """
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step, flush_secs=5)
        self._writer.add_custom_scalars(
            {
                question: {chart: ["Multiline", tags] for chart, tags in charts.items()}
                for question, charts in PANELS.items()
            }
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step's scalars."""
        for name, value in values.items():
            if name.endswith(NOT_PLOTTED):
                continue
            self._writer.add_scalar(name, value, step)

    def text(self, tag: str, markdown: str, *, step: int) -> None:
        """Write a text that TensorBoard renders as Markdown."""
        self._writer.add_text(tag, markdown, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
