"""TRL: the part of a GRPOTrainer step that follows generation, on completions that exist."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.harness.parity import Answer
from benchmarks.workloads.replay import BETA, CLIP, CLIP_GRAD, GROUP_SIZE, LEARNING_RATE, Replay

Step = Callable[[], Answer]
_NEVER = 2**30


def replay(work: Replay, *, recompute: bool) -> Step:
    """Its methods in its order: ``_get_per_token_logps_and_entropies`` of policy and reference without gradient, as
    ``_generate_and_score_completions`` calls it; ``training_step``, which calls ``_prepare_inputs``, ``compute_loss``
    (``_compute_loss``) and the backward; then clipping, its AdamW and zeroing, as the ``Trainer``'s inner loop does.

    Decoding, rewards, advantages and logs are left out. The weights' type is the workload's.

    Args:
        work: the rows.
        recompute: compute activations again in the backward, which is its default.
    """
    trainer = _trainer(work, recompute=recompute)
    rows = {name: tensor.to(work.device) for name, tensor in _inputs(work, trainer).items()}

    def step() -> Answer:
        scored = _scored(trainer, rows)
        parts = _parts(scored, work.micro_batch_size)
        trainer.current_gradient_accumulation_steps = len(parts)
        loss = torch.stack([_trained(trainer, part) for part in parts]).sum()
        grad_norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP_GRAD)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        old, ref = (scored[name] * rows["completion_mask"] for name in ("old_per_token_logps", "ref_per_token_logps"))
        return work.answer(loss, old, ref, grad_norm=float(grad_norm))

    return step


def _trainer(work: Replay, *, recompute: bool) -> Any:
    """A trainer whose next step would not generate, and whose optimizer exists."""
    scratch = tempfile.TemporaryDirectory(prefix="klrl-trl-")
    settings = GRPOConfig(
        output_dir=scratch.name, use_cpu=work.device.type == "cpu", bf16=False, gradient_checkpointing=recompute,
        report_to=[], model_init_kwargs={"dtype": str(work.dtype).removeprefix("torch.")},
        learning_rate=LEARNING_RATE, max_grad_norm=CLIP_GRAD,
        per_device_train_batch_size=work.micro_batch_size, num_generations=GROUP_SIZE,
        max_completion_length=work.tokens,
        # More than one iteration is what makes it compute old log-probabilities; so many that none generates.
        num_iterations=_NEVER, beta=BETA, epsilon=CLIP, loss_type="dr_grpo", use_bias_correction_kl=False,
    )  # fmt: skip
    trainer: Any = GRPOTrainer(
        model=str(work.policy),
        reward_funcs=_no_reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * len(work.prompts)}),
    )
    trainer.scratch = scratch  # lives as long as the trainer
    reference = AutoModelForCausalLM.from_pretrained(work.reference, dtype=work.dtype)
    trainer.ref_model.load_state_dict(reference.state_dict())
    if recompute:
        trainer.model.activation_checkpointing_enable()  # as train() does at its start
    trainer.create_optimizer()
    trainer._step = 1  # the first step, 0, generates
    trainer.model.train()
    return trainer


def _no_reward(prompts: list[str], **_: object) -> list[float]:
    raise RuntimeError(f"nothing generates here, yet {len(prompts)} completions came to be rewarded")


def _inputs(work: Replay, trainer: Any) -> dict[str, Tensor]:
    """Prompts padded on the left, completions on the right, as the trainer pads them."""
    pad = trainer._tokenizer.pad_token_id
    longest = max(map(len, work.prompts))
    lengths = [len(row) for row in work.completions]
    return {
        "prompt_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in work.prompts]),
        "prompt_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in work.prompts]),
        "completion_ids": torch.tensor([row + [pad] * (work.tokens - len(row)) for row in work.completions]),
        "completion_mask": torch.tensor([[1] * count + [0] * (work.tokens - count) for count in lengths]),
        "advantages": work.advantages,
        "num_items_in_batch": torch.tensor(sum(lengths)),
    }


def _parts(rows: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Microbatches; what is no row is the same in each."""
    count = len(rows["completion_ids"])
    return [
        {name: value[start : start + size] if value.ndim else value for name, value in rows.items()}
        for start in range(0, count, size)
    ]


def _trained(trainer: Any, part: dict[str, Tensor]) -> Tensor:
    trainer._buffered_inputs = [part]
    loss: Tensor = trainer.training_step(trainer.model, part, None)
    return loss


def _scored(trainer: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    tokens = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1)
    attention = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1)
    kept, batch_size = rows["completion_ids"].shape[1], trainer.args.per_device_train_batch_size
    with torch.no_grad():
        old, ref = (
            trainer._get_per_token_logps_and_entropies(model, tokens, attention, kept, batch_size=batch_size)[0]
            for model in (trainer.model, trainer.ref_model)
        )
    return {**rows, "old_per_token_logps": old, "ref_per_token_logps": ref}
