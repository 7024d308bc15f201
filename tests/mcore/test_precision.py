"""Kinds of layers and 8-bit products, as far as a machine without a GPU can show; tests/gpu has the rest."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_klrl.config.model_folder import describe_model
from megatron_klrl.config.precision import alignment
from megatron_klrl.config.recipe import Fp8
from megatron_klrl.errors import UserError
from megatron_klrl.mcore import layout, microbatches
from megatron_klrl.mcore.layers import Layers, choose
from megatron_klrl.mcore.microbatches import Batching, Rows
from megatron_klrl.mcore.model import transformer_config, unwrap
from megatron_klrl.mcore.precision import Products
from tests.gpu.programs import carried, update
from tests.support.models import FAMILIES, MIXTURE, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import rollout_batch, trainer

FUSED_NAMES = {
    # Transformer Engine's parameters of a dense layer that the local layers do not have (megatron-core 0.19.2, where
    # get_gpt_layer_with_transformer_engine_submodules has one module for norm and projection)
    "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.3.input_layernorm.weight",
    "decoder.layers.3.mlp.linear_fc1.layer_norm_weight": "decoder.layers.3.pre_mlp_layernorm.weight",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense"), FAMILIES["qwen3_tied"])


def test_parameters_of_both_kinds_of_layers_have_one_name(dense: Path) -> None:
    names = {parameter.name for parameter in layout.parameters(describe_model(dense))}
    for fused, here in FUSED_NAMES.items():
        assert layout.general(fused) == here
        assert here in names
    assert {layout.general(name) for name in names} == names


def keys_and_flags(folder: Path) -> tuple[set[str], dict[str, dict[str, object]]]:
    """Keys of a checkpoint of the local layers, and what Megatron makes of each format."""
    with trainer(folder) as engine:
        state = unwrap(engine.chunks[0]).sharded_state_dict()
        keys = {value.key for value in state.values() if hasattr(value, "key")}
        flags = {}
        for fp8 in Fp8:
            products = Products(fp8=fp8, first_last_bf16=fp8 in (Fp8.TENSORWISE, Fp8.BLOCKWISE))
            config = transformer_config(
                engine.shape, groups=engine.groups, dtype=torch.bfloat16, sequence_parallel=False, products=products
            )
            names = ("fp8", "fp8_recipe", "first_last_layers_bf16", "fp8_amax_history_len", "fp8_amax_compute_algo")
            flags[str(fp8)] = {name: getattr(config, name) for name in names}
        return keys, flags


def test_checkpoints_go_by_transformer_engines_keys_and_formats_by_megatrons_words(dense: Path) -> None:
    ((keys, flags),) = run_ranks(1, keys_and_flags, dense)
    wanted = {layout.general(key.replace("decoder.layers.", "decoder.layers.0.", 1)) for key in keys}
    names = {parameter.name for parameter in layout.parameters(describe_model(dense)) if parameter.layer in (None, 0)}
    assert names <= wanted | keys, "every parameter is in a checkpoint under a key that both kinds of layers have"
    assert any(key.endswith("self_attention.linear_qkv.layer_norm_weight") for key in keys)
    assert any(key.endswith("mlp.linear_fc1.layer_norm_weight") for key in keys)
    assert flags["none"]["fp8"] is None
    assert {name: (one["fp8"], str(one["fp8_recipe"])) for name, one in flags.items() if name != "none"} == {
        "tensorwise": ("hybrid", "tensorwise"),
        "delayed": ("hybrid", "delayed"),
        "blockwise": ("e4m3", "blockwise"),
        "mxfp8": ("e4m3", "mxfp8"),
    }
    assert (flags["delayed"]["fp8_amax_history_len"], flags["delayed"]["fp8_amax_compute_algo"]) == (1024, "max")
    assert {name for name, one in flags.items() if one["first_last_layers_bf16"]} == {"tensorwise", "blockwise"}


def test_a_cpu_has_local_layers_and_no_8_bit_products() -> None:
    cpu = torch.device("cpu")
    assert choose(cpu, fp8=Fp8.NONE) is Layers.LOCAL
    with pytest.raises(UserError, match=r"precision\.fp8: needs a GPU"):
        choose(cpu, fp8=Fp8.TENSORWISE)


def passes(folder: Path) -> list[tuple[int, int, int]]:
    """Tokens that a layer multiplies at once, what they must be a multiple of, and response tokens in all."""
    found = []
    with trainer(folder, context=1) as engine:
        batch = rollout_batch(rows=6, width=50)
        for fp8 in Fp8:
            for rows, size in ((Rows.PADDED, 2), (Rows.PADDED, 3), (Rows.PADDED, 16), (Rows.PACKED, 120)):
                batching = Batching(rows=rows, size=size, sequence_parallel=False, token_multiple=alignment(fp8))
                every = microbatches.make(batch, batching=batching, groups=engine.groups)
                tokens = {one.input_ids.numel() for one in every}
                responses = sum(one.hidden_at.numel() for one in every)
                found += [(count, alignment(fp8), responses) for count in tokens]
    return found


def test_passes_have_whole_multiples_of_tokens(dense: Path) -> None:
    (found,) = run_ranks(1, passes, dense)
    batch = rollout_batch(rows=6, width=50)
    assert all(tokens % multiple == 0 for tokens, multiple, _ in found)
    assert {responses for _, _, responses in found} == {int(batch.response_mask.sum())}
    assert any(tokens % 16 for tokens, multiple, _ in found if multiple == 1), "without products nothing is padded"


@pytest.mark.parametrize(
    ("rows", "size", "context", "tensor", "multiple", "expected"),
    [
        (Rows.PADDED, 2, 1, 1, 16, 8),
        (Rows.PADDED, 3, 1, 1, 16, 16),
        (Rows.PADDED, 16, 1, 1, 16, 1),
        (Rows.PACKED, 500, 1, 1, 32, 32),
        (Rows.PACKED, 500, 2, 1, 16, 32),
        (Rows.PACKED, 500, 2, 4, 16, 32),
        (Rows.PADDED, 4, 2, 4, 16, 16),
        (Rows.PACKED, 500, 1, 3, 16, 48),
    ],
)
def test_steps_by_hand(rows: Rows, size: int, context: int, tensor: int, multiple: int, expected: int) -> None:
    """Lengths over context ranks, times rows, in multiples; over the tensor ranks too where they cut the sequence."""

    class Group:
        def __init__(self, ranks: int) -> None:
            self.ranks = ranks

        def size(self) -> int:
            return self.ranks

    class Groups:
        cp, tp = Group(context), Group(tensor)

    batching = Batching(rows=rows, size=size, sequence_parallel=tensor > 1, token_multiple=multiple)
    assert microbatches.pass_step(Groups(), batching) == expected  # type: ignore[arg-type]
    per_rank = expected // context * (size if rows is Rows.PADDED else 1)
    assert math.gcd(per_rank, multiple) == multiple


def test_the_programs_of_the_gpu_tests_run(dense: Path) -> None:
    (first,) = run_ranks(1, update, dense, "local", "none", "float32", {})
    (second,) = run_ranks(1, update, dense, None, "none", "float32", {"tokens_per_microbatch": 256})
    torch.testing.assert_close(first.logprobs, second.logprobs, rtol=0, atol=2e-5)
    assert first.loss == pytest.approx(second.loss, abs=1e-5)
    assert first.gradients.keys() == second.gradients.keys()


@pytest.mark.parametrize("model", [*FAMILIES.values(), MIXTURE], ids=[*FAMILIES, "mixture"])
@pytest.mark.parametrize(("writes", "reads"), [("local", "local"), ("fused", "local"), ("local", "fused")])
def test_a_checkpoint_of_one_kind_of_layers_goes_on_in_the_other(
    tmp_path: Path, model: Any, writes: str, reads: str
) -> None:
    if "fused" in (writes, reads) and not HAVE_TE:
        pytest.skip("Transformer Engine is not installed")
    assert run_ranks(1, carried, write_model(tmp_path / "m", model), writes, reads, "float32") == [True]
