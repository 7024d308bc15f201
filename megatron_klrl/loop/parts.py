"""The parts that a run is made of, as the loop sees them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores, TrainBatch
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.generation.engine import GenerationEngine
from megatron_klrl.kl.beta import BetaRule
from megatron_klrl.losses.policy_loss import PolicyLoss
from megatron_klrl.runtime.timers import Timers
from megatron_klrl.runtime.world import World
from megatron_klrl.tasks.task import Task


class Update(Protocol):
    """What an optimizer step reports."""

    @property
    def grad_norm(self) -> float: ...
    @property
    def lr(self) -> float: ...


class LossReport(Protocol):
    """The loss of an update, and what it counts beside its value, by metric name."""

    @property
    def loss(self) -> float: ...
    @property
    def metrics(self) -> dict[str, float]: ...


class Split(LossReport, Protocol):
    """The parts of a gradient, too."""

    @property
    def kl_norm(self) -> float: ...
    @property
    def cosine(self) -> float: ...


class Writing(Protocol):
    """A save under way."""

    @property
    def is_written(self) -> bool: ...
    def finish(self) -> None:
        """Wait, and write what comes last; collective. OSError where it could not be written."""
        ...


class TrainEngine(Protocol):
    """Scores batches, takes gradients, steps, streams weights. Every method is collective over all ranks."""

    step: int

    def score(self, batch: RolloutBatch) -> TokenScores:
        """Forward passes of policy and reference, without gradient."""
        ...

    def forward_backward(self, batch: TrainBatch, loss: PolicyLoss, *, keep_whole_gradient: bool = False) -> LossReport:
        """Take the gradient of the whole batch. Kept whole, the gradient can be exported."""
        ...

    def split_gradient(self, batch: TrainBatch, loss: PolicyLoss) -> Split:
        """Accumulate the same gradient, and say how its KL part relates to its policy part."""
        ...

    def optim_step(self) -> Update:
        """Clip and step."""
        ...

    def offload(self) -> None:
        """Free device memory that only an update needs, gradient included; what needs it next brings it back."""
        ...

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face-named full tensors, streamed to every rank."""
        ...

    def weight_checksums(self) -> dict[str, str]:
        """Of the weights by Hugging Face name, taken where they lie; ``weight_sync.checksum`` says of what."""
        ...

    def close(self) -> None:
        """Give back what is shared with other ranks; collective."""
        ...

    def keep_gradient(self) -> dict[str, Tensor]:
        """A copy of this rank's part of the last gradient that was kept whole."""
        ...

    def export_gradients(self, kept: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The last gradient that was kept whole, or a copy of one, streamed like the weights."""
        ...

    def perturb(self, *, scale: float, seed: int) -> None:
        """Add relative Gaussian noise to every weight, the same in every layout."""
        ...

    def move(self, *, eta: float) -> None:
        """Subtract ``eta`` times the last gradient that was kept whole from the weights."""
        ...

    def follow_policy(self, *, decay: float) -> None:
        """Move the reference towards the policy: ``decay`` times itself plus the rest of the policy; 0 copies it."""
        ...

    def reference_checksums(self) -> dict[str, str]:
        """Of the reference's weights, as ``weight_checksums``."""
        ...

    def save_reference(self, folder: Path) -> None:
        """Write the reference."""
        ...

    def load_reference(self, folder: Path) -> None:
        """Read the reference back, from any layout."""
        ...

    def save(self, folder: Path) -> None:
        """Write model and optimizer."""
        ...

    def begin_save(self, folder: Path) -> Writing:
        """The same from a copy, while training goes on."""
        ...

    def load(self, folder: Path) -> None:
        """Read model and optimizer back, from any layout."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """One evaluation set.

    Attributes:
        task: prompts and verifier.
        prompts: how many of its prompts.
        samples: completions of each.
        temperature: of sampling; 0 is greedy.
    """

    task: Task
    prompts: int
    samples: int
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run needs, built once by build.py."""

    recipe: Recipe
    world: World
    trainer: TrainEngine
    engine: GenerationEngine
    beta_rule: BetaRule
    task: Task
    evaluation: Mapping[str, EvalTask]
    stop_ids: tuple[int, ...]
    timers: Timers

    def close(self) -> None:
        """Give the engines' memory back; collective."""
        self.engine.close()
        self.trainer.close()
