"""A run's checkpoints: what belongs to one, where it lies, which of them stay, and from which one a run goes on."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_klrl.config.checkpoint import CheckpointSection, Fallback
from megatron_klrl.errors import UserError, WorkError
from megatron_klrl.loop import manifest
from megatron_klrl.loop.manifest import Measured
from megatron_klrl.loop.parts import Writing

_STATE, _RECIPE = "state.json", "recipe.yaml"
_WRITING, _DELETING, _DAMAGED = ".writing_", ".deleting_", "damaged_"
WAITING = "rollouts.safetensors"
"""Rollouts that were sampled ahead of their step."""
REFERENCE = "reference"
"""Folder of a reference that is no longer the one it was loaded from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run needs to go on, besides tensors. Seeds and the learning rate follow from the step.

    Attributes:
        step: finished steps.
        weight_version: of the policy.
        updates: optimizer steps taken.
        next_prompt: place in the stream of training prompts.
        beta_learnt: what the rule for beta has learnt; None where it learns nothing.
        reference_step: step after which the reference was last changed; 0: it is as it was loaded.
        reference_checksum: of the reference's weights; empty without a reference.
        reference_rates: success rates of the reference on the optimum's prompts.
    """

    step: int
    weight_version: int
    updates: int = 0
    next_prompt: int = 0
    beta_learnt: float | None = None
    reference_step: int = 0
    reference_checksum: str = ""
    reference_rates: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A checkpoint that is being written.

    Attributes:
        step: of its state.
        under_way: what it waits for.
        measured: what it is compared by.
    """

    step: int
    under_way: tuple[Writing, ...]
    measured: Measured | None


class Checkpoints:
    """The checkpoints of one run, below one folder.

    A checkpoint is written under a temporary name and moved, so a folder named ``step_*`` is complete; it is deleted
    the same way. What is left of either, when a run dies in between, is removed at the next start.

    Attributes:
        resumed: the one that this run went on from; it stays.
    """

    def __init__(self, root: Path, rules: CheckpointSection) -> None:
        self._root, self._rules = root, rules
        self.resumed: Path | None = None
        self._begun: _Begun | None = None

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies, if there is one."""
        return self._root / f"step_{step:06d}"

    def sweep(self) -> None:
        """Remove what a start that died left half written or half deleted; one rank calls it."""
        for name in (_WRITING, _DELETING):
            for left in self._root.glob(f"{name}*"):
                shutil.rmtree(left, ignore_errors=True)

    def to_resume(self, say: Callable[[str], object]) -> Path | None:
        """The newest checkpoint, verified; None if there is none. The same on every rank; collective.

        Damaged ones that are passed over are set aside, under another name: the run that goes on must neither count
        them as its newest nor find them again.

        Args:
            say: told of each of them.

        Raises:
            UserError: it is damaged and the recipe does not ask for the one before it, or all are damaged.
        """
        folders = manifest.told(self._folders() if dist.get_rank() == 0 else None)
        damaged: list[Path] = []
        for folder in reversed(folders):
            problem = manifest.first_problem(folder)
            if problem is None:
                self.resumed = folder
                _set_aside(damaged)
                return folder
            if self._rules.fallback is Fallback.NONE:
                fix = "set checkpoint.fallback=previous to go on from the newest one that is whole"
                raise UserError(f"{folder} is damaged: {problem}", field="--resume", fix=fix)
            say(f"  {folder} is damaged: {problem}; the one before it is taken")
            damaged.append(folder)
        if folders:
            fix = "start without --resume in another folder"
            raise UserError(f"every checkpoint in {self._root} is damaged", field="--resume", fix=fix)
        return None

    def begin(
        self,
        state: RunState,
        recipe_text: str,
        write_tensors: Callable[[Path], Sequence[Writing]],
        *,
        values: Mapping[str, float],
    ) -> None:
        """Begin a checkpoint, after the end of the one before; collective. ``finish`` makes it one.

        Args:
            state: to store.
            recipe_text: resolved recipe, so that a checkpoint can be exported by itself.
            write_tensors: writes everything else into an existing, empty folder; collective. What it returns may still
                be under way.
            values: metrics of the state's step, among them what ``checkpoint.keep_best`` compares.

        Raises:
            WorkError: it, or the one before, could not be written; those before it are as they were.
        """
        self.finish()
        partial = self._root / f"{_WRITING}{state.step:06d}"
        with self._reported(state.step):
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier()
            under_way = write_tensors(partial)
            if dist.get_rank() == 0:
                (partial / _RECIPE).write_text(recipe_text)
                (partial / _STATE).write_text(json.dumps(asdict(state)))
        metric = self._rules.keep_best
        found = Measured(metric=metric, value=values[metric]) if metric is not None and metric in values else None
        self._begun = _Begun(step=state.step, under_way=tuple(under_way), measured=found)

    @property
    def is_written(self) -> bool:
        """Whether ``finish`` has something to do and nothing to wait for on this rank."""
        return self._begun is not None and all(each.is_written for each in self._begun.under_way)

    def finish(self) -> None:
        """Complete what was begun, then delete what the recipe does not keep; nothing if there is none. Collective.

        Raises:
            WorkError: it could not be written; those before it are as they were.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        final, partial = self.folder(begun.step), self._root / f"{_WRITING}{begun.step:06d}"
        with self._reported(begun.step):
            for each in begun.under_way:
                each.finish()
            dist.barrier()
            manifest.write(partial, begun.measured)
            if dist.get_rank() == 0:
                _delete(final)
                partial.rename(final)
                self._prune()
        dist.barrier()

    @contextmanager
    def _reported(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(self._root / f"{_WRITING}{step:06d}", ignore_errors=True)
            raise WorkError(
                f"the checkpoint of step {step} could not be written to {self._root} ({error}); {_free(self._root)}. "
                "Earlier checkpoints are whole: make room, then --resume"
            ) from error

    def _folders(self) -> list[Path]:
        return sorted(folder for folder in self._root.glob("step_*") if folder.is_dir())

    def _prune(self) -> None:
        if self._rules.keep is None:
            return
        folders = self._folders()
        kept = {*folders[-self._rules.keep :], self.resumed}
        if self._rules.keep_best is not None:
            values = {folder: manifest.measured(folder, self._rules.keep_best) for folder in folders}
            candidates = [(value, folder) for folder, value in values.items() if value is not None]
            kept.add(max(candidates)[1] if candidates else None)
        for folder in folders:
            if folder not in kept:
                _delete(folder)


def _set_aside(folders: list[Path]) -> None:
    dist.barrier()  # every rank has read what it wanted to
    for folder in folders if dist.get_rank() == 0 else []:
        aside = folder.with_name(f"{_DAMAGED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def _delete(folder: Path) -> None:
    """Under another name first: a folder that is half gone must not look like a checkpoint."""
    if folder.exists():
        gone = folder.with_name(f"{_DELETING}{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB are free there" if folder.exists() else "it is not there"


def check(folder: Path) -> None:
    """A checkpoint that somebody named is whole; collective.

    Raises:
        UserError: it is not.
    """
    problem = manifest.first_problem(folder)
    if problem is not None:
        raise UserError(
            f"{folder} is damaged: {problem}", field="checkpoint", fix="name another step_* folder of a run"
        )


def read_state(folder: Path) -> RunState:
    """The state stored with a checkpoint.

    Raises:
        UserError: the folder is not a complete checkpoint.
    """
    try:
        stored = json.loads((folder / _STATE).read_text())
        stored["reference_rates"] = tuple(stored["reference_rates"])
        return RunState(**stored)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder} is not a complete checkpoint", field="checkpoint", fix="name a step_* folder of a run"
        ) from error


def recipe_file(folder: Path) -> Path:
    """The resolved recipe stored with a checkpoint."""
    read_state(folder)
    return folder / _RECIPE
