"""Weights pushed into vLLM: what is sampled afterwards, what is refused, and what a refusal leaves behind."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_klrl.errors import WorkError
from megatron_klrl.generation.engine import Request
from megatron_klrl.generation.vllm_engine import VLLMEngine
from megatron_klrl.weight_sync.checksum import checksums
from tests.generation.cases import REQUESTS, SAMPLING, NamedWeights, assert_sampled_from, oracle, perturbed
from tests.generation.conftest import named_weights


def test_pushed_weights_are_what_is_sampled_from(engine: VLLMEngine, folder: Path) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    weights = perturbed(folder)
    engine.update_weights(iter(weights), version=5)
    after = engine.generate(REQUESTS, SAMPLING)
    assert [c.token_ids for c in after] != [c.token_ids for c in before], "changed weights must change the samples"
    assert {version for c in after for version in c.weight_versions} == {5}
    assert_sampled_from(oracle(folder, weights), REQUESTS, after)
    engine.update_weights(named_weights(folder), version=6)
    assert engine.generate(REQUESTS, SAMPLING) == [replace(c, weight_version=6) for c in before]


def test_prefixes_of_the_old_weights_are_forgotten(
    engine: VLLMEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they are wrong if not: the cache's block of 128 tokens lies inside this prompt."""
    requests = [Request(prompt_ids=(2, *(4 + i % 15 for i in range(200))), seed=seed) for seed in range(4)]
    engine.generate(requests, SAMPLING)
    engine.update_weights(perturbed(folder), version=1)
    assert_sampled_from(oracle(folder, perturbed(folder)), requests, engine.generate(requests, SAMPLING))
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda **_: True)
    engine.update_weights(perturbed(folder, seed=1), version=2)
    with pytest.raises(AssertionError, match="not close"):
        assert_sampled_from(oracle(folder, perturbed(folder, seed=1)), requests, engine.generate(requests, SAMPLING))


def broken_update(kind: str, weights: NamedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """An update that goes wrong after the first three tensors."""
    name, tensor = weights[3]
    yield from weights[:3]
    match kind:
        case "missing":
            pass
        case "shape":
            yield name, tensor[:-1]
        case "format":
            yield name, tensor.to(torch.bfloat16)
        case "nan":
            yield name, tensor * float("nan")
        case "stream":
            raise OSError("weight update cut off")
        case _:
            yield name, tensor
    yield from weights[4:]
    if kind in ("unknown", "repeated"):
        yield ("model.layers.0.extra" if kind == "unknown" else name), tensor


SAID = {
    "missing": "lacks 1 tensors, {name} first",
    "unknown": "extra but the engine's model has no such tensor",
    "repeated": "{name} twice",
    "shape": "{name} as",
    "format": "{name} as bfloat16, the engine computes in float32",
    "nan": "{name} with values that are not finite",
    "stream": "cut off",
}


@pytest.mark.parametrize("kind", SAID)
def test_a_failed_update_leaves_the_engine_unusable_until_a_complete_one(
    engine: VLLMEngine, folder: Path, kind: str
) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    weights = named_weights(folder)
    with pytest.raises((WorkError, OSError), match="weight update.*" + SAID[kind].format(name=weights[3][0])):
        engine.update_weights(broken_update(kind, weights), version=1)
    with pytest.raises(WorkError, match="incomplete weights"):
        engine.generate(REQUESTS, SAMPLING)
    assert engine.weight_version == 0, "the version names complete weights"
    engine.update_weights(weights, version=0)
    assert engine.generate(REQUESTS, SAMPLING) == before


def test_a_failure_after_the_last_tensor_counts_too(
    engine: VLLMEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "reset_prefix_cache", lambda **_: False)
        with pytest.raises(WorkError, match="cached prefixes"):
            engine.update_weights(named_weights(folder), version=1)
    with pytest.raises(WorkError, match="incomplete weights"):
        engine.generate(REQUESTS, SAMPLING)


def test_nan_in_the_cache_does_not_outlive_the_weights(engine: VLLMEngine, folder: Path) -> None:
    """Finite weights can overflow in the forward; what that leaves in the cache would poison later requests."""
    before = engine.generate(REQUESTS, SAMPLING)
    large = [
        (name, weight * (1e30 if "v_proj" in name or "o_proj" in name else 1)) for name, weight in named_weights(folder)
    ]
    engine.update_weights(large, version=1)
    with pytest.raises(WorkError, match="NaN"):
        engine.generate(REQUESTS, SAMPLING)
    engine.update_weights(named_weights(folder), version=0)
    assert engine.generate(REQUESTS, SAMPLING) == before


def test_a_verified_update_reports_what_arrived(engine: VLLMEngine, folder: Path) -> None:
    weights = perturbed(folder)
    plain = engine.update_weights(weights, version=1)
    assert (plain.version, plain.tensors, plain.checksums) == (1, len(weights), None)
    assert plain.bytes == sum(weight.numel() * 4 for _, weight in weights)
    verified = engine.update_weights(reversed(weights), version=2, verify=True)
    assert verified.checksums == checksums(weights)
    assert verified.checksums != checksums(named_weights(folder))
