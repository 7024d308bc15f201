"""The memory model against what ranks really allocate: weights, gradients, Adam, activations, logits, buckets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recompute
from megatron_klrl.planning.layout import of_recipe
from megatron_klrl.planning.model import read_model
from megatron_klrl.planning.plan import LayoutPlan, plan, request
from tests.support.allocations import Rises, alive_bytes
from tests.support.models import write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import policy_loss, rollout_batch, train_batch, trainer
from tests.unit.config.folders import make_recipe

ROWS, PROMPT, WIDTH, VOCAB = 8, 4, 256, 8192
TOLERANCE = 0.15
"""What the plan promises, of a rank's tensors in each phase."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
DENSE = Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)
UNTIED = Qwen2Config(**SIZES, tie_word_embeddings=False)
MIXTURE = Qwen3MoeConfig(
    **SIZES,
    head_dim=32,
    tie_word_embeddings=False,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=384,
    norm_topk_prob=True,
)
CASES: dict[str, tuple[PretrainedConfig, int, dict[str, Any]]] = {
    "dense": (DENSE, 1, {}),
    "dense, recompute full": (DENSE, 1, {"recompute": Recompute.FULL}),
    "experts": (MIXTURE, 1, {}),
}
LONG_CASES: dict[str, tuple[PretrainedConfig, int, dict[str, Any]]] = {
    "untied": (UNTIED, 1, {}),
    "recompute attention": (DENSE, 1, {"recompute": Recompute.ATTENTION}),
    "packed": (DENSE, 1, {"tokens_per_microbatch": 4 * (WIDTH + 4)}),
    "tp2": (DENSE, 2, {"tensor": 2}),
    "tp2 sequence": (DENSE, 2, {"tensor": 2, "sequence": True}),
    "pp2": (DENSE, 2, {"pipeline": 2}),
    "dp2": (DENSE, 2, {"micro_batch_size": 2}),
    "cp2": (DENSE, 2, {"context": 2}),
    "ep2": (MIXTURE, 2, {"expert": 2}),
}


def measured(folder: Path, options: dict[str, Any]) -> dict[str, int]:
    """Bytes of this rank's tensors at the peak of each phase, in the second of two steps: Adam has its moments."""
    rises = Rises()
    with trainer(folder, **{"micro_batch_size": 4, "head_chunk_tokens": 256, **options}) as engine:
        torch.set_num_threads(1)
        batch = rollout_batch(rows=ROWS, width=WIDTH, vocab_size=VOCAB)
        if "tokens_per_microbatch" in options:  # the plan is for full packs, which short rows would not make
            batch = replace(batch, response_mask=(torch.arange(WIDTH) >= PROMPT - 1).expand(ROWS, WIDTH))
        rows = train_batch(batch)
        engine.forward_backward(rows, policy_loss(batch))
        engine.optim_step()
        rest = alive_bytes() - sum(t.numel() * t.element_size() for t in vars(batch).values())
        rest -= sum(t.numel() * t.element_size() for t in vars(rows).values() if isinstance(t, torch.Tensor))
        with rises.watched():
            with rises.span("score"):
                engine.score(batch)
            with rises.span("train"):
                engine.forward_backward(rows, policy_loss(batch))
                engine.optim_step()
            with rises.span("sync"):
                for _ in engine.export_weights():
                    pass
    return {name: rest + rise for name, rise in rises.bytes.items()}


def planned(tmp_path: Path, folder: Path, ranks: int, options: dict[str, Any]) -> LayoutPlan:
    """The plan of the recipe that describes the same run, without an engine."""
    keys = {"tensor": "parallel.tensor", "pipeline": "parallel.pipeline", "context": "parallel.context"}
    keys |= {"expert": "parallel.expert", "sequence": "parallel.sequence", "recompute": "memory.recompute"}
    keys |= {"micro_batch_size": "loop.micro_batch_size", "tokens_per_microbatch": "loop.tokens_per_microbatch"}
    given = {keys[name]: str(value).lower() for name, value in options.items()}
    if "loop.tokens_per_microbatch" not in given:
        given = {"loop.micro_batch_size": "4", **given}
    settings = {
        "model.path": folder,
        "head.chunk_tokens": 256,
        "generation.max_tokens": WIDTH - PROMPT,
        "generation.kv_cache_mib": 1,
        "loop.prompts_per_step": ROWS // 2,
        **given,
    }
    recipe = load_recipe(make_recipe(tmp_path), [f"{key}={value}" for key, value in settings.items()])
    wanted = request(recipe, read_model(str(folder)), hardware=None, prompt=PROMPT)
    return plan(wanted, of_recipe(recipe, gpus=ranks))


def check(tmp_path: Path, case: tuple[PretrainedConfig, int, dict[str, Any]]) -> None:
    """The rank that the plan says needs most, in every phase."""
    config, ranks, options = case
    folder = write_model(tmp_path / "model", config)
    found = run_ranks(ranks, measured, folder, options)
    expected = planned(tmp_path, folder, ranks, options)
    for phase in expected.memory:
        if phase.name == "generate":
            continue  # the engine's part is vLLM's
        ours = sum(size for name, size in phase.parts.items() if not name.startswith(("engine", "key-value")))
        most = max(rank[phase.name] for rank in found)
        assert ours == pytest.approx(most, rel=TOLERANCE), (phase.name, ours / 2**20, most / 2**20, dict(phase.parts))


@pytest.mark.parametrize("name", CASES)
def test_a_ranks_memory_is_what_the_plan_says(tmp_path: Path, name: str) -> None:
    check(tmp_path, CASES[name])


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_CASES)
def test_a_ranks_memory_is_what_the_plan_says_in_other_layouts(tmp_path: Path, name: str) -> None:
    check(tmp_path, LONG_CASES[name])
