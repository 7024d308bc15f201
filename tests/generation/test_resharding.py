"""From a trainer's layout into another one of real engines: what they draw is what transformers says of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_klrl.generation.engine import Completion
from megatron_klrl.generation.vllm_engine import VLLMEngine
from megatron_klrl.mcore.compat import run_on_cpu
from megatron_klrl.runtime import world as ranks
from megatron_klrl.weight_sync.checksum import checksums
from tests.generation.cases import REQUESTS, SAMPLING, assert_sampled_from, oracle
from tests.generation.conftest import SETTINGS, named_weights
from tests.support.models import LLAMA31_ROPE, SMALL, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer_in

pytestmark = pytest.mark.long

# vLLM's attention on CPU wants heads of 32 at least
SIZES = {**SMALL, "hidden_size": 128, "num_hidden_layers": 2}
MODELS: dict[str, PretrainedConfig] = {
    # 51 is not a multiple of 2: trainer and engine pad the vocabulary, each in its own way
    "qwen25_untied": Qwen2Config(**{**SIZES, "vocab_size": 51}, tie_word_embeddings=False),
    "qwen25_tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3_tied": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "llama31_untied": LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA31_ROPE),
    "qwen3_moe": Qwen3MoeConfig(
        **{**SIZES, "hidden_size": 32},
        head_dim=32,
        tie_word_embeddings=False,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
}
TP, PP, EP = {"tensor": 2}, {"pipeline": 2}, {"expert": 2}
# The mixture comes first: a process's first engine makes vLLM's groups, those for experts only if it has some.
TO_ONE_RANK_EACH = [("qwen3_moe", EP), ("qwen25_untied", TP), ("qwen3_tied", PP), ("llama31_untied", PP)]
TO_TWO_RANKS_EACH = [("qwen3_moe", PP | EP), ("qwen25_untied", TP | PP), ("qwen25_tied", TP | PP)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One rank's engine before a refit, after it, and after another one back; and whether the checksums agree."""

    before: list[Completion]
    after: list[Completion]
    back: list[Completion]
    same_bits: bool


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of each model the weights that the engine starts with, and those that the trainer holds."""
    root = tmp_path_factory.mktemp("resharding")
    return {
        name: (write_model(root / name / "engine", config), write_model(root / name / "trainer", config, seed=1))
        for name, config in MODELS.items()
    }


def refits(cases: list[tuple[Path, Path, dict[str, int]]], engine_ranks: int) -> list[Seen]:
    """All cases in one process per rank, whose imports are most of the time."""
    run_on_cpu()
    world = ranks.join(timeout_s=120)
    found = []
    for own, trained, layout in cases:
        with (
            trainer_in(world, trained, with_reference=False, **layout) as trainer,
            engine_of(own, world, engine_ranks) as engine,
        ):
            before = engine.generate(REQUESTS, SAMPLING)
            report = engine.update_weights(trainer.export_weights(), version=1, verify=True)
            same_bits = report.checksums == trainer.weight_checksums() == checksums(named_weights(trained))
            after = engine.generate(REQUESTS, SAMPLING)
            engine.update_weights(named_weights(own), version=0)
            back = engine.generate(REQUESTS, SAMPLING)
            found.append(Seen(before=before, after=after, back=back, same_bits=same_bits))
            trainer.close()
    ranks.leave()
    return found


@contextmanager
def engine_of(folder: Path, world: ranks.World, engine_ranks: int) -> Iterator[VLLMEngine]:
    settings = replace(SETTINGS, tensor=engine_ranks, max_model_len=64, max_num_seqs=16, kv_cache_bytes=8 << 20)
    engine = VLLMEngine(folder=folder, world=world, settings=settings)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("size", "engine_ranks", "cases"), [(2, 1, TO_ONE_RANK_EACH), (4, 2, TO_TWO_RANKS_EACH)], ids=["tp1x2", "tp2x2"]
)
def test_every_engine_samples_from_the_trainers_weights(
    folders: dict[str, tuple[Path, Path]], size: int, engine_ranks: int, cases: list[tuple[str, dict[str, int]]]
) -> None:
    jobs = [(*folders[model], layout) for model, layout in cases]
    by_rank = run_ranks(size, refits, jobs, engine_ranks)
    for number, (own, trained, _) in enumerate(jobs):
        models = oracle(own), oracle(trained)
        for seen in (rank[number] for rank in by_rank):
            assert seen.same_bits, cases[number]
            assert_sampled_from(models[0], REQUESTS, seen.before)
            assert_sampled_from(models[1], REQUESTS, seen.after)
            assert [c.token_ids for c in seen.after] != [c.token_ids for c in seen.before], (
                "other weights, other tokens"
            )
            assert seen.back == seen.before
