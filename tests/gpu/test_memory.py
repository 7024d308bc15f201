"""Peak device memory of each phase against the plan."""

from pathlib import Path

import pytest
from transformers import Qwen3Config

from megatron_klrl.config.load import load_recipe
from megatron_klrl.config.recipe import Recompute
from megatron_klrl.planning.hardware import choose
from megatron_klrl.planning.layout import of_recipe
from megatron_klrl.planning.model import read_model
from megatron_klrl.planning.plan import plan, request
from tests.gpu.programs import ROWS, VOCAB, peaks
from tests.support.models import write_model
from tests.support.ranks import run_ranks
from tests.unit.config.folders import make_recipe

TOLERANCE = 0.15
WIDTH = 1000  # tokens of a row, so that activations count beside weights
LARGER = Qwen3Config(
    vocab_size=VOCAB,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=1024,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=None,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_peaks_are_the_plans(tmp_path: Path, recompute: str) -> None:
    folder = write_model(tmp_path / "model", LARGER)
    options = {"micro_batch_size": 4, "head_chunk_tokens": 256, "recompute": Recompute(recompute)}
    (found,) = run_ranks(1, peaks, folder, options, WIDTH)
    settings = [
        f"model.path={folder}",
        "precision.dtype=bf16",
        "loop.micro_batch_size=4",
        f"loop.prompts_per_step={ROWS // 2}",
        "head.chunk_tokens=256",
        f"generation.max_tokens={WIDTH - 4}",
        "generation.kv_cache_mib=1",
        f"memory.recompute={recompute}",
    ]
    recipe = load_recipe(make_recipe(tmp_path), settings)
    wanted = request(recipe, read_model(str(folder)), hardware=choose("h200", []), prompt=4)
    for phase in plan(wanted, of_recipe(recipe, gpus=1)).memory:
        if phase.name in found:
            ours = sum(size for name, size in phase.parts.items() if not name.startswith(("engine", "key-value")))
            assert ours == pytest.approx(found[phase.name], rel=TOLERANCE), (phase.name, dict(phase.parts))
