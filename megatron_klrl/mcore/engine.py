"""The training engine: one policy, at most one reference, in any Megatron layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_klrl.batch import RolloutBatch, TokenScores, TrainBatch, padding_rows
from megatron_klrl.config.model_folder import ModelShape
from megatron_klrl.losses.policy_loss import PolicyLoss, kl_part, policy_part
from megatron_klrl.mcore import checkpoint, conversion, loss_scaling, moves, passes
from megatron_klrl.mcore.groups import ProcessGroups
from megatron_klrl.mcore.model import build_model, padded_vocab_size, transformer_config, unwrap
from megatron_klrl.runtime.world import World
from megatron_klrl.vocab_parallel.divergence import entropy, full_kl
from megatron_klrl.vocab_parallel.logprobs import token_logprobs
from megatron_klrl.vocab_parallel.shard import VocabShard

KeptGradient = dict[str, Tensor]
"""This rank's part of a gradient by Megatron's parameter names."""

_SCORE_WINDOW = 16
"""Microbatches per pipeline stage whose reference hidden states are alive at once while scoring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Adam with a constant learning rate after a linear warm-up."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    warmup_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """How the trainer computes.

    Attributes:
        dtype: of parameters and activations; gradients and Adam are float32.
        sequence_parallel: cut activations along the sequence inside the tensor-parallel group.
        micro_batch_size: sequences of one forward pass.
        temperature: divides the logits of policy and reference alike: that of the sampling.
        with_reference: hold a frozen copy of the starting weights.
        optimizer: of the policy.
    """

    dtype: torch.dtype
    sequence_parallel: bool
    micro_batch_size: int
    temperature: float
    with_reference: bool
    optimizer: OptimizerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSplit:
    """The two parts of an update's gradient.

    Attributes:
        loss: of the whole batch.
        kl_norm: L2 norm of the KL term's gradient, beta included.
        cosine: of the angle between the policy gradient and the KL term's gradient; 0 when either vanishes.
    """

    loss: float
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
            folder: Hugging Face folder both models start from.
            settings: how to compute.
        """
        self.world, self.groups, self.shape = world, groups, shape
        self._folder, self._settings, self._temperature = folder, settings, settings.temperature
        columns = padded_vocab_size(shape.vocab_size, groups.tp.size()) // groups.tp.size()
        start = columns * groups.tp.rank()
        self.shard = VocabShard(start=start, size=min(columns, shape.vocab_size - start), group=groups.tp)
        self.reference = self._plain_model() if settings.with_reference else None
        self.model, self.optimizer = self._trained_model()
        self.step = 0

    # -- scoring ---------------------------------------------------------------------------------------------------

    def score(self, batch: RolloutBatch) -> TokenScores:
        """Forward passes of policy and reference over a batch, without gradient; the same result on every rank."""
        rows, count = self._local_rows(batch)
        found = [self._score_window(window) for window in self._windows(rows)]
        kinds = 4 if self.reference is not None else 2
        size = (kinds, rows.tokens.shape[0], rows.tokens.shape[1] - 1)
        local = torch.cat([part for part in found if part is not None], 1) if self.groups.is_last_stage else None
        stacked = passes.share_from_last_stage(local, size, groups=self.groups, device=self.world.device)
        stacked = passes.gather_rows(stacked.transpose(0, 1).contiguous(), groups=self.groups)[:count]
        names = ("old_logprobs", "entropy", "ref_logprobs", "full_kl")
        return TokenScores(**{name: stacked[:, kind] for kind, name in enumerate(names[:kinds])})

    def _score_window(self, window: list[RolloutBatch]) -> Tensor | None:
        ref_hidden = iter(self._reference_hidden(window))

        def on_logits(rows: RolloutBatch, logits: Tensor) -> Tensor:
            found = [self._logprobs(rows, logits), entropy(logits, shard=self.shard, temperature=self._temperature)]
            if self.reference is not None:
                theirs = self._reference_logits(next(ref_hidden))
                found += [self._logprobs(rows, theirs), self._full_kl(logits, theirs)]
            return torch.stack([f.where(rows.response_mask, 0.0) for f in found])

        parts = passes.run(self.model, window, on_output=on_logits, mode=passes.Mode.FORWARD)
        return torch.cat(parts, 1) if parts else None

    def _reference_hidden(self, rows: list[RolloutBatch] | list[TrainBatch]) -> list[Tensor]:
        """What the reference's output layer takes, per microbatch; on the last stage. Small beside its logits."""
        if self.reference is None:
            return []
        return passes.run(
            self.reference,
            rows,
            on_output=lambda _, hidden: hidden,
            mode=passes.Mode.FORWARD,
            output=passes.Output.HIDDEN,
        )

    @torch.no_grad()
    def _reference_logits(self, hidden: Tensor) -> Tensor:
        """``[B, S, columns]`` of one microbatch, from what ``_reference_hidden`` kept of it."""
        model = unwrap(self.reference)
        weight = model.shared_embedding_or_output_weight() if self.shape.tied else None
        # Megatron's bf16 wrapper hands outputs over in float32; going back loses nothing
        logits, _ = model.output_layer(hidden.to(self._settings.dtype), weight=weight)
        return logits.transpose(0, 1)

    def _full_kl(self, logits: Tensor, ref_logits: Tensor) -> Tensor:
        return full_kl(logits, ref_logits, shard=self.shard, temperature=self._temperature)

    def _logprobs(self, rows: Any, logits: Tensor) -> Tensor:
        return token_logprobs(logits, rows.tokens[:, 1:], shard=self.shard, temperature=self._temperature)

    def _windows(self, rows: RolloutBatch) -> Iterator[list[RolloutBatch]]:
        microbatches = self._split(rows)
        size = _SCORE_WINDOW * self.groups.pp.size()
        for start in range(0, len(microbatches), size):
            yield microbatches[start : start + size]

    # -- training --------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: TrainBatch, loss: PolicyLoss, *, keep_whole_gradient: bool = False) -> float:
        """Take the gradient of the whole batch's loss, reduced over the layout.

        Args:
            batch: the same on every rank.
            loss: its denominators count the whole batch.
            keep_whole_gradient: leave the whole gradient on every data-parallel rank, for ``export_gradients``; the
                optimizer needs no more than each rank's share.

        Returns:
            The loss of the whole batch, on every rank.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        microbatches = self._split(self._local_rows(batch)[0])
        ref_hidden = iter(self._reference_hidden(microbatches) if loss.needs_full_kl else ())

        def on_logits(rows: TrainBatch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            kl = self._full_kl(logits, self._reference_logits(next(ref_hidden))) if loss.needs_full_kl else None
            value = loss(self._logprobs(rows, logits), rows, full_kl=kl)
            return loss_scaling.complete(value, {"loss": value.detach()})

        reports = passes.run(
            self.model,
            microbatches,
            on_output=on_logits,
            mode=passes.Mode.TRAIN_WHOLE_GRADIENT if keep_whole_gradient else passes.Mode.TRAIN,
        )
        local = torch.stack([r["loss"] for r in reports]).sum().view(1) if reports else None
        total = passes.share_from_last_stage(local, (1,), groups=self.groups, device=self.world.device)
        return float(passes.gather_rows(total, groups=self.groups).sum())

    def split_gradient(self, batch: TrainBatch, loss: PolicyLoss) -> GradientSplit:
        """``forward_backward`` in two passes, the KL term apart from the policy gradient; their sum is what stays.

        Costs a second forward and backward, and streams both gradients once.
        """
        kl_loss = self.forward_backward(*kl_part(batch, loss), keep_whole_gradient=True)
        kept = self.keep_gradient()
        policy_loss = self.forward_backward(*policy_part(batch, loss), keep_whole_gradient=True)
        kl = self.export_gradients(kept)
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for (_, ours), (_, theirs) in zip(kl, self.export_gradients(), strict=True):
            sums += torch.stack(
                [(a * b).sum(dtype=torch.float64) for a, b in ((ours, ours), (theirs, theirs), (ours, theirs))]
            )
        for name, parameter in conversion.local_parameters(unwrap(self.model)):
            _main_grad(parameter).add_(kept[name])
        kl_norm, policy_norm = float(sums[0].sqrt()), float(sums[1].sqrt())
        cosine = float(sums[2]) / (kl_norm * policy_norm) if kl_norm * policy_norm > 0 else 0.0
        return GradientSplit(loss=kl_loss + policy_loss, kl_norm=kl_norm, cosine=cosine)

    def optim_step(self) -> UpdateReport:
        """Clip, step Adam, count the step."""
        schedule = self._settings.optimizer
        lr = schedule.lr * min(1.0, (self.step + 1) / max(1, schedule.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        self.step += 1
        return UpdateReport(grad_norm=float(grad_norm), lr=lr)

    # -- weights ---------------------------------------------------------------------------------------------------

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Stream the policy's weights under Hugging Face names to every rank; consume to the end on all of them."""
        return conversion.export_hf(unwrap(self.model), shape=self.shape, groups=self.groups)

    def keep_gradient(self) -> KeptGradient:
        """A copy of this rank's part of the last ``forward_backward(keep_whole_gradient=True)``."""
        return {name: _main_grad(p).clone() for name, p in conversion.local_parameters(unwrap(self.model))}

    def export_gradients(self, kept: KeptGradient | None = None) -> Iterator[tuple[str, Tensor]]:
        """Stream a reduced gradient under Hugging Face names to every rank, float32; consume to the end on all of them.

        Args:
            kept: from ``keep_gradient``; by default that of the last ``forward_backward(keep_whole_gradient=True)``.
        """
        model = unwrap(self.model)
        if kept is None:
            return conversion.export_hf(model, shape=self.shape, groups=self.groups, value=_main_grad)
        by_identity = {id(p): kept[name] for name, p in conversion.local_parameters(model)}
        return conversion.export_hf(
            model, shape=self.shape, groups=self.groups, value=lambda parameter: by_identity[id(parameter)]
        )

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
        moves.rewrite(unwrap(self.model), weights, shape=self.shape, groups=self.groups)
        self.optimizer.reload_model_params()  # its float32 copies of bf16 weights

    def save(self, folder: Path) -> None:
        """Write model and optimizer to an existing, empty folder."""
        checkpoint.save(folder, self.model, self.optimizer, groups=self.groups)

    def load(self, folder: Path) -> None:
        """Read model and optimizer back, whatever layout wrote them."""
        checkpoint.load(folder, self.model, self.optimizer, groups=self.groups)

    # -- construction ----------------------------------------------------------------------------------------------

    def _plain_model(self) -> Any:
        return plain_model(
            self.shape,
            self._folder,
            groups=self.groups,
            dtype=self._settings.dtype,
            device=self.world.device,
            sequence_parallel=self._settings.sequence_parallel,
        )

    def _trained_model(self) -> tuple[DistributedDataParallel, Any]:
        model = self._plain_model()
        config = model.config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, check_for_nan_in_grad=True
        )
        wrapped = DistributedDataParallel(config, ddp, model)
        adam = self._settings.optimizer
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=adam.lr,
                adam_beta1=adam.betas[0],
                adam_beta2=adam.betas[1],
                adam_eps=adam.eps,
                weight_decay=adam.weight_decay,
                clip_grad=adam.clip_grad,
                bf16=self._settings.dtype == torch.bfloat16,
                params_dtype=self._settings.dtype,
                use_distributed_optimizer=True,
            ),
            [wrapped],
            use_gloo_process_groups=self.world.device.type == "cuda",
        )
        config.finalize_model_grads_func = loss_scaling.finalize
        config.grad_scale_func = optimizer.scale_loss
        config.no_sync_func = wrapped.no_sync
        return wrapped, optimizer

    # -- rows ------------------------------------------------------------------------------------------------------

    def _local_rows[B: (RolloutBatch, TrainBatch)](self, batch: B) -> tuple[B, int]:
        """This data-parallel rank's rows, blank rows added so that all ranks hold the same whole microbatches."""
        count = batch.tokens.shape[0]
        per_rank = (
            -(-count // (self.groups.dp.size() * self._settings.micro_batch_size)) * self._settings.micro_batch_size
        )
        missing = per_rank * self.groups.dp.size() - count
        if missing:
            batch = batch.rows(padding_rows(batch, missing))
            batch.response_mask[count:] = False
        start = per_rank * self.groups.dp.rank()
        return batch.rows(slice(start, start + per_rank)), count

    def _split[B: (RolloutBatch, TrainBatch)](self, rows: B) -> list[B]:
        size = self._settings.micro_batch_size
        return [rows.rows(slice(start, start + size)) for start in range(0, rows.tokens.shape[0], size)]


def _main_grad(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient buffer that Megatron's DDP attaches to a parameter."""
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def plain_model(
    shape: ModelShape,
    folder: Path,
    *,
    groups: ProcessGroups,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
) -> Any:
    """This rank's part of a model with the weights of a Hugging Face folder; no gradients are reduced or applied."""
    config = transformer_config(shape, groups=groups, dtype=dtype, sequence_parallel=sequence_parallel)
    built = build_model(shape, config, groups=groups, max_sequence_length=shape.max_position_embeddings)
    model = built.to(device)
    conversion.load_hf(model, folder, shape=shape, groups=groups)
    return Float16Module(config, model) if dtype == torch.bfloat16 else model
