"""Are the engine's weights the trainer's after a refit? Bits of every tensor, and log-probabilities of the same tokens.

The policy is moved away from the weights both start with, so that a refit that does nothing is found: the same tokens
are scored before it, where trainer and engine must differ, and after it, where they must agree.
"""

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_klrl.diagnostics.report import Check, Report, verdict
from megatron_klrl.generation.refit import RefitReport
from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.refit import BOUNDS, Agreement, agreement, difference, sampled
from megatron_klrl.loop.rollout import Rollouts

# Relative noise, far enough that half-precision rounding is small beside what it changes.
_NOISE, _NOISE_SEED = 0.2, 1


class SyncCheck:
    """One refit of the real engines, looked at from both sides. Collective; the same report on every rank."""

    def __init__(self, parts: Parts) -> None:
        """Take the parts of a run whose temperature is 1: that is what an engine scores given tokens at.

        Raises:
            ValueError: it is another.
        """
        if parts.recipe.generation.temperature != 1:
            raise ValueError("build the parts for temperature 1: only weights are compared here")
        self._parts, self._bounds = parts, BOUNDS[parts.recipe.precision.dtype]

    def run(self) -> Report:
        """Perturb, compare, refit, compare."""
        parts = self._parts
        version = parts.engine.weight_version + 1
        fixed = sampled(parts, purpose="sync", version=version)
        parts.trainer.perturb(scale=_NOISE, seed=_NOISE_SEED + version)
        before = self._scored(fixed)
        report = parts.engine.update_weights(parts.trainer.export_weights(), version=version, verify=True)
        wrong = difference(parts, report)
        after = self._scored(fixed)
        drawn = sampled(parts, purpose="sync-after", version=version)
        checks = (
            self._before(before),
            _tensors(report, wrong),
            self._agree("same tokens, scored by both after it", after),
            self._agree("tokens drawn by the engine after it", self._everywhere(agreement(parts, drawn))),
            _versions(drawn, version),
        )
        engines = parts.world.size // parts.recipe.generation.tensor
        facts = {"ranks": parts.world.size, "engines": engines, "format": str(parts.recipe.precision.dtype)}
        facts |= {"tensors": report.tensors, "MiB": round(report.bytes / 2**20, 2), "noise": _NOISE}
        return Report(subject="refit of every engine from the trainer, policy perturbed", facts=facts, checks=checks)

    def _scored(self, found: Rollouts) -> Agreement:
        """Trainer and engine on given tokens; the engine of every rank scores all of them."""
        pairs = list(zip(found.prompts, found.completions, strict=True))
        rows = self._parts.engine.score([prompt.token_ids + completion.token_ids for prompt, completion in pairs])
        completions = [
            replace(completion, logprobs=row[len(row) - len(completion.token_ids) :])
            for (_, completion), row in zip(pairs, rows, strict=True)
        ]
        return self._everywhere(agreement(self._parts, replace(found, completions=completions)))

    def _everywhere(self, found: Agreement) -> Agreement:
        """The worst of all ranks."""
        worst = torch.tensor([found.mean, found.largest], device=self._parts.world.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        mean, largest = worst.tolist()
        return Agreement(tokens=found.tokens, mean=mean, largest=largest)

    def _before(self, found: Agreement) -> Check:
        mean, _ = self._bounds
        return Check(
            name="same tokens, scored by both before the refit",
            found=_text(found),
            wanted=f"a mean above {mean:g}: else the rest would show nothing",
            verdict=verdict(found.mean > mean),
            numbers={"mean": found.mean, "largest": found.largest},
        )

    def _agree(self, name: str, found: Agreement) -> Check:
        mean, largest = self._bounds
        return Check(
            name=name,
            found=_text(found),
            wanted=f"mean below {mean:g}, largest below {largest:g}",
            verdict=verdict(found.within(self._bounds)),
            numbers={"mean": found.mean, "largest": found.largest},
        )


def _tensors(report: RefitReport, wrong: str | None) -> Check:
    return Check(
        name="checksums of all tensors",
        found=wrong or f"{report.tensors} tensors, {report.bytes / 2**20:,.2f} MiB, all equal",
        wanted="the same bits in the trainer and the engine of every rank",
        verdict=verdict(wrong is None),
        numbers={"tensors": report.tensors, "bytes": report.bytes},
    )


def _versions(drawn: Rollouts, version: int) -> Check:
    found = {token for completion in drawn.completions for token in completion.weight_versions}
    return Check(
        name="weight version of what was drawn",
        found=", ".join(map(str, sorted(found))),
        wanted=str(version),
        verdict=verdict(found == {version}),
        numbers={"oldest": min(found), "newest": max(found)},
    )


def _text(found: Agreement) -> str:
    differ = "log-probabilities differ by"
    return f"{differ} {found.mean:.1e} nats on average, {found.largest:.1e} at most ({found.tokens} tokens)"
