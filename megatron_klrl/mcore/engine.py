"""The training engine: one policy, at most one reference, in any Megatron layout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores, TrainBatch
from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.config.recipe import Recompute
from megatron_klrl.losses.policy_loss import PolicyLoss, kl_part, policy_part
from megatron_klrl.mcore import checkpoint, conversion, microbatches, moves, optimizer, passes
from megatron_klrl.mcore.chunks import plain_chunks
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.head import Head
from megatron_klrl.mcore.layers import Layers
from megatron_klrl.mcore.microbatches import Batching, Microbatch
from megatron_klrl.mcore.model import padded_vocab_size, unwrap
from megatron_klrl.mcore.offload import Offload
from megatron_klrl.mcore.optimizer import OptimizerSettings
from megatron_klrl.mcore.passes import AtHead, Mode
from megatron_klrl.mcore.precision import Products
from megatron_klrl.mcore.reference import Reference
from megatron_klrl.mcore.streams import Streams, SyncSettings
from megatron_klrl.mcore.writing import Writing
from megatron_klrl.runtime.world import World
from megatron_klrl.vocab_parallel.head import ReferenceHead
from megatron_klrl.vocab_parallel.shard import VocabShard

KeptGradient = dict[str, Tensor]
"""This rank's part of a gradient by Megatron's parameter names."""

_SCORE_WINDOW = 16
"""Microbatches per pipeline stage whose reference hidden states are alive at once while scoring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """How the trainer computes.

    Attributes:
        dtype: of parameters and activations; gradients and Adam are float32.
        batching: what one forward pass takes.
        temperature: divides the logits of policy and reference alike: that of the sampling.
        head_chunk_tokens: most tokens whose logits are alive at once; None takes all of a microbatch.
        recompute: activations computed again in the backward.
        reference: Hugging Face folder of the reference; None holds none.
        averages_reference: the reference will be a running average of the policy.
        optimizer: of the policy.
        sync: how weights leave the trainer.
        products: how layers multiply: policy and reference alike, in training and in scoring.
        layers: what they are built of; None takes what runs quickest on the device.
    """

    dtype: torch.dtype
    batching: Batching
    temperature: float
    head_chunk_tokens: int | None
    recompute: Recompute
    reference: Path | None
    averages_reference: bool
    optimizer: OptimizerSettings
    sync: SyncSettings
    products: Products = field(default_factory=Products)
    layers: Layers | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossReport:
    """The loss of an update.

    Attributes:
        loss: of the whole batch.
        metrics: what the loss counts beside its value, by metric name.
    """

    loss: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSplit:
    """The two parts of an update's gradient.

    Attributes:
        loss: of the whole batch.
        metrics: as in ``LossReport``.
        kl_norm: L2 norm of the KL term's gradient, beta included.
        cosine: of the angle between the policy gradient and the KL term's gradient; 0 when either vanishes.
    """

    loss: float
    metrics: dict[str, float]
    kl_norm: float
    cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one optimizer step did.

    Attributes:
        grad_norm: L2 norm of the whole gradient before clipping.
        lr: learning rate the step was taken with.
    """

    grad_norm: float
    lr: float


class MegatronEngine:
    """Scores batches, takes gradients, steps, and streams its weights out.

    Order of one update: ``score`` (any number of times), ``forward_backward``, ``optim_step``, ``export_weights``.
    Every method is collective: all ranks call it with the same batch, which each cuts for itself.
    """

    def __init__(
        self, *, world: World, groups: ProcessGroups, shape: ModelShape, folder: Path, settings: TrainerSettings
    ) -> None:
        """Load the policy, and the reference where wanted.

        Args:
            world: this rank's place.
            groups: the layout.
            shape: of the model.
            folder: Hugging Face folder that the policy starts from.
            settings: how to compute.
        """
        self.world, self.groups, self.shape = world, groups, shape
        self._settings = settings
        columns = padded_vocab_size(shape.vocab_size, groups.tp.size()) // groups.tp.size()
        start = columns * groups.tp.rank()
        self._head = Head(
            shard=VocabShard(start=start, size=max(0, min(columns, shape.vocab_size - start)), group=groups.tp),
            groups=groups,
            sequence_parallel=settings.batching.sequence_parallel,
            temperature=settings.temperature,
            chunk_tokens=settings.head_chunk_tokens,
        )
        self.reference = None if settings.reference is None else self._reference(settings.reference)
        self.chunks, self.optimizer = optimizer.trained(
            self._plain_chunks(folder, settings.dtype), settings.optimizer, dtype=settings.dtype, device=world.device
        )
        self._offload = Offload(self.chunks, self.optimizer, device=world.device)
        self._streams = Streams(self._bare(), shape=shape, groups=groups, world=world, settings=settings.sync)
        self.step = 0

    # -- scoring ---------------------------------------------------------------------------------------------------

    def score(self, batch: RolloutBatch) -> TokenScores:
        """Forward passes of policy and reference over a batch, without gradient; the same result on every rank."""
        names = ("old_logprobs", "entropy", "ref_logprobs", "full_kl")[: 4 if self.reference is not None else 2]
        size = batch.response_mask.shape
        scores = torch.zeros(len(names), *size, device=self.world.device)
        every = microbatches.make(batch, batching=self._settings.batching, groups=self.groups)
        window = _SCORE_WINDOW * self.groups.pp.size()
        for start in range(0, len(every), window):
            part = every[start : start + window]
            for microbatch, found in zip(part, self._score_window(part), strict=False):  # empty before the last stage
                row, place = microbatch.target_at // size[1], microbatch.target_at % size[1]
                scores[:, microbatch.numbers[row], place] = found
        passes.add_over_ranks(scores, groups=self.groups)
        return TokenScores(**dict(zip(names, scores, strict=True)))

    def _score_window(self, window: list[Microbatch[RolloutBatch]]) -> list[Tensor]:
        references = self._reference_heads(window) if self.reference is not None else None

        def on_head(microbatch: Microbatch, at: AtHead) -> Tensor:
            found = self._head.measure(microbatch, at, reference=references[id(microbatch)] if references else None)
            parts = (found.logprobs, found.entropy, found.ref_logprobs, found.full_kl)
            return torch.stack([part for part in parts if part is not None])

        return passes.run(self.chunks, window, on_head=on_head, mode=Mode.FORWARD, groups=self.groups)

    def _reference_heads(self, rows: Sequence[Microbatch]) -> dict[int, ReferenceHead]:
        """What the reference's output layer takes, by microbatch; on the last stage. Small beside its logits."""
        found: dict[int, ReferenceHead] = {}

        def on_head(microbatch: Microbatch, at: AtHead) -> Tensor:
            hidden = self._head.select(microbatch, at)
            found[id(microbatch)] = ReferenceHead(hidden=hidden, weight=at.weight.detach())
            return hidden.new_zeros(())  # the schedule collects something; what counts is kept above

        passes.run(self._present_reference().chunks, rows, on_head=on_head, mode=Mode.FORWARD, groups=self.groups)
        return found

    # -- training --------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: TrainBatch, loss: PolicyLoss, *, keep_whole_gradient: bool = False) -> LossReport:
        """Take the gradient of the whole batch's loss, reduced over the layout.

        Args:
            batch: the same on every rank.
            loss: its denominators count the whole batch.
            keep_whole_gradient: leave the whole gradient on every data-parallel rank, for ``export_gradients``; the
                optimizer needs no more than each rank's share.

        Returns:
            The loss of the whole batch and the metrics that the loss adds up, on every rank.
        """
        self._offload.move_back()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        every = microbatches.make(batch, batching=self._settings.batching, groups=self.groups)
        references = self._reference_heads(every) if loss.needs_full_kl else None
        sums: list[dict[str, Tensor]] = []

        def on_head(microbatch: Microbatch, at: AtHead) -> Tensor:
            reference = references[id(microbatch)] if references else None
            return self._head.loss(microbatch, at, loss=loss, reference=reference, report=sums.append)

        mode = Mode.TRAIN_WHOLE_GRADIENT if keep_whole_gradient else Mode.TRAIN
        losses = passes.run(self.chunks, every, on_head=on_head, mode=mode, groups=self.groups)
        names = loss.metrics
        totals = torch.zeros(1 + len(names), device=self.world.device)
        if losses:
            totals[0] = torch.stack(losses).sum()
            for number, name in enumerate(names, start=1):
                totals[number] = sum((part[name] for part in sums), start=totals.new_zeros(()))
        passes.add_over_ranks(totals, groups=self.groups)
        value, *rest = totals.tolist()
        return LossReport(loss=value, metrics=dict(zip(names, rest, strict=True)))

    def split_gradient(self, batch: TrainBatch, loss: PolicyLoss) -> GradientSplit:
        """``forward_backward`` in two passes, the KL term apart from the policy gradient; their sum is what stays.

        Costs a second forward and backward, and streams both gradients once.
        """
        of_kl = self.forward_backward(*kl_part(batch, loss), keep_whole_gradient=True)
        kept = self.keep_gradient()
        of_policy = self.forward_backward(*policy_part(batch, loss), keep_whole_gradient=True)
        kl = self.export_gradients(kept)
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for (_, ours), (_, theirs) in zip(kl, self.export_gradients(), strict=True):
            sums += torch.stack(
                [(a * b).sum(dtype=torch.float64) for a, b in ((ours, ours), (theirs, theirs), (ours, theirs))]
            )
        for name, parameter in conversion.local_parameters(self._bare(), groups=self.groups):
            _main_grad(parameter).add_(kept[name])
        kl_norm, policy_norm = float(sums[0].sqrt()), float(sums[1].sqrt())
        cosine = float(sums[2]) / (kl_norm * policy_norm) if kl_norm * policy_norm > 0 else 0.0
        return GradientSplit(
            loss=of_kl.loss + of_policy.loss, metrics=of_policy.metrics, kl_norm=kl_norm, cosine=cosine
        )

    def optim_step(self) -> UpdateReport:
        """Clip, step Adam, count the step."""
        lr = self._settings.optimizer.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        self.step += 1
        return UpdateReport(grad_norm=float(grad_norm), lr=lr)

    def offload(self) -> None:
        """Free device memory that only an update needs, gradient included; what needs it next brings it back."""
        self._offload.move_out()

    def _bare(self) -> list[Any]:
        return [unwrap(chunk) for chunk in self.chunks]

    # -- reference -------------------------------------------------------------------------------------------------

    def follow_policy(self, *, decay: float) -> None:
        """Move the reference towards the policy: ``decay`` times itself plus the rest of the policy; 0 copies it."""
        self._present_reference().follow(self._bare(), decay=decay)

    def reference_checksums(self) -> dict[str, str]:
        """Checksums of the reference's weights under Hugging Face names; the same on every rank."""
        return self._streams.checksums([unwrap(chunk) for chunk in self._present_reference().chunks])

    def save_reference(self, folder: Path) -> None:
        """Write the reference to an existing, empty folder."""
        self._present_reference().save(folder, groups=self.groups)

    def load_reference(self, folder: Path) -> None:
        """Read the reference back, whatever layout wrote it."""
        self._present_reference().load(folder, groups=self.groups)

    def _present_reference(self) -> Reference:
        if self.reference is None:
            raise ValueError("there is no reference: build the trainer with one")
        return self.reference

    # -- weights ---------------------------------------------------------------------------------------------------

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Stream the policy's weights under Hugging Face names to every rank; consume to the end on all of them.

        A tensor is good until the tensors of the next module but one are taken: whoever keeps one copies it.
        """
        return self._streams.weights()

    def weight_checksums(self) -> dict[str, str]:
        """Checksums of the policy's weights under Hugging Face names, taken where they lie; the same on every rank."""
        return self._streams.checksums()

    def keep_gradient(self) -> KeptGradient:
        """A copy of this rank's part of the last ``forward_backward(keep_whole_gradient=True)``."""
        return {
            name: _main_grad(p).clone() for name, p in conversion.local_parameters(self._bare(), groups=self.groups)
        }

    def export_gradients(self, kept: KeptGradient | None = None) -> Iterator[tuple[str, Tensor]]:
        """Stream a reduced gradient under Hugging Face names to every rank, float32; consume to the end on all of them.

        Args:
            kept: from ``keep_gradient``; by default that of the last ``forward_backward(keep_whole_gradient=True)``.
        """
        if kept is None:
            return self._streams.values(_main_grad)
        by_identity = {id(p): kept[name] for name, p in conversion.local_parameters(self._bare(), groups=self.groups)}
        return self._streams.values(lambda parameter: by_identity[id(parameter)])

    def perturb(self, *, scale: float, seed: int) -> None:
        """Add Gaussian noise of ``scale`` times its root mean square to every tensor; the same in every layout."""
        self._rewrite(
            (name, moves.with_noise(name, weight, scale=scale, seed=seed)) for name, weight in self.export_weights()
        )

    def move(self, *, eta: float) -> None:
        """Subtract ``eta`` times the gradient of the last ``forward_backward(keep_whole_gradient=True)``.

        Neither Adam nor clipping has a part in it; Adam's moments stay what they are.
        """
        pairs = zip(self.export_weights(), self.export_gradients(), strict=True)
        self._rewrite((name, moves.against(name, weight, gradient, eta=eta)) for (name, weight), (_, gradient) in pairs)

    def _rewrite(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._offload.move_back()
        moves.rewrite(self._bare(), weights, shape=self.shape, groups=self.groups)
        self.optimizer.reload_model_params()  # its float32 copies of bf16 weights

    def close(self) -> None:
        """Give back what is shared with other ranks; collective."""
        self._streams.close()

    def save(self, folder: Path) -> None:
        """Write model and optimizer to an existing, empty folder."""
        self._offload.move_back()
        checkpoint.save(folder, self.chunks, self.optimizer, groups=self.groups)

    def begin_save(self, folder: Path) -> Writing:
        """Copy model and optimizer to host memory and write them from there, while training goes on."""
        self._offload.move_back()
        return checkpoint.begin_save(folder, self.chunks, self.optimizer, groups=self.groups)

    def load(self, folder: Path) -> None:
        """Read model and optimizer back, whatever layout wrote them."""
        self._offload.move_back()
        checkpoint.load(folder, self.chunks, self.optimizer, groups=self.groups)

    def _reference(self, folder: Path) -> Reference:
        settings = self._settings
        with torch.no_grad():  # 8-bit weights then have no second copy, which only a backward reads
            chunks = self._plain_chunks(folder, settings.dtype)
        keeps_exact = settings.averages_reference and settings.dtype != torch.float32
        plain = replace(settings.products, primary_weights=False)
        exact = self._plain_chunks(folder, torch.float32, products=plain) if keeps_exact else None
        return Reference(chunks, exact=exact)

    def _plain_chunks(self, folder: Path, dtype: torch.dtype, *, products: Products | None = None) -> list[Any]:
        return plain_chunks(
            self.shape,
            folder,
            groups=self.groups,
            dtype=dtype,
            device=self.world.device,
            sequence_parallel=self._settings.batching.sequence_parallel,
            recompute=self._settings.recompute,
            layers=self._settings.layers,
            products=products or self._settings.products,
        )


def _main_grad(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient buffer that Megatron's DDP attaches to a parameter."""
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient
