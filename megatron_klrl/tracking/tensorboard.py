"""TensorBoard event files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_klrl.metrics.names import NOT_PLOTTED, PANELS

Setting = bool | int | float | str


class TensorBoardWriter:
    """Scalars under the metric names, distributions, texts, pictures, settings with their results."""

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

    def histogram(self, tag: str, values: "np.ndarray", *, step: int) -> None:
        """How values are distributed."""
        self._writer.add_histogram(tag, values, step)

    def profile(self, tag: str, heights: Sequence[float], *, step: int) -> None:
        """Heights at positions 0, 1, 2, ...: a histogram whose bars are given, since TensorBoard draws no other."""
        count = len(heights)
        positions, weights = np.arange(count), np.asarray(heights, dtype=np.float64)
        self._writer.add_histogram_raw(
            tag,
            min=0,
            max=count,
            num=count,
            sum=float((positions * weights).sum()),
            sum_squares=float((positions**2 * weights).sum()),
            bucket_limits=(positions + 1).tolist(),
            bucket_counts=weights.tolist(),
            global_step=step,
        )

    def figure(self, tag: str, figure: Figure, *, step: int) -> None:
        """Write a picture."""
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self._writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")

    def settings(self, values: Mapping[str, Setting], *, results: Mapping[str, float]) -> None:
        """What the run was set to beside the metrics it is compared by: a row of the page's table of runs.

        Args:
            values: by recipe key.
            results: names of metrics that were written; the page takes the last value of each.
        """
        file_writer: Any = self._writer.file_writer  # add_hparams would open a run of its own for the same values
        for summary in hparams(dict(values), dict(results)):
            file_writer.add_summary(summary)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
