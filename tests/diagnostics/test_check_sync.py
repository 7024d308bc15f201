"""``klrl check sync`` on real engines: it holds for a refit, and fails for one that was skipped or spoilt."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_klrl import build
from megatron_klrl.config.load import load_recipe
from megatron_klrl.diagnostics.report import Report, Verdict
from megatron_klrl.diagnostics.sync_check import SyncCheck
from megatron_klrl.errors import WorkError
from megatron_klrl.generation.vllm_engine import VLLMEngine
from megatron_klrl.loop.refit import refit
from tests.e2e.test_train import RECIPE, klrl
from tests.support.ranks import run_ranks

SKIPPED = "same tokens, scored by both after it"
BITS = "checksums of all tensors"

pytestmark = pytest.mark.e2e


def test_the_default_recipe_holds() -> None:
    """Trainer on two ranks, an engine in each."""
    done = klrl("check", "sync", RECIPE, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["ranks"], report["engines"]) == (2, 2)
    assert {check["verdict"] for check in report["checks"]} == {"holds"}
    numbers = {check["check"]: check["numbers"] for check in report["checks"]}
    assert numbers[SKIPPED]["largest"] < 1e-4 < 1e-2 < numbers["same tokens, scored by both before the refit"]["mean"]


def test_half_precision_holds_within_its_own_bounds() -> None:
    done = klrl("check", "sync", RECIPE, "--json", "precision.dtype=bf16", "parallel.tensor=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["format"] == "bf16"


def _reports() -> tuple[list[Report], list[str]]:
    """A refit, one that the engine only pretends to make, and one whose last tensor is changed on the way.

    Of each the report of the check, and what the verification in a running training says.
    """
    recipe = load_recipe(RECIPE, ["kl.beta=0"])
    with build.site(recipe) as place:
        trainer, engine = build.build_trainer(recipe, place), build.build_engine(recipe, place)
        parts = build.build_parts(recipe, place, trainer=trainer, engine=engine)
        check, found, said = SyncCheck(parts), [], []

        def both_ways() -> None:
            found.append(check.run())
            try:
                said.append(", ".join(refit(parts, version=engine.weight_version + 1, verify=True)))
            except WorkError as error:
                said.append(str(error))

        both_ways()
        vllm: Any = engine._llm
        load = vllm.collective_rpc
        # everything happens but the loading: names, checksums, version and report are right
        vllm.collective_rpc = lambda *_, kwargs: [None for _ in kwargs["weights_iterator"]]
        both_ways()
        vllm.collective_rpc = load

        def spoilt(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                last = name == "model.norm.weight" and place.world.rank == 1
                yield name, torch.cat([weight[1:], weight[:1]]) if last else weight

        engine.update_weights = lambda weights, **options: VLLMEngine.update_weights(  # type: ignore[method-assign]
            engine, spoilt(weights), **options
        )
        both_ways()
        del engine.update_weights
        engine.close()
    return found, said


def test_a_skipped_refit_and_a_spoilt_tensor_are_found() -> None:
    """On every rank, though only the engine of one got the spoilt tensor."""
    for (held, skipped, spoilt), said in run_ranks(2, _reports):
        assert held.holds
        assert skipped.failures == [SKIPPED, "tokens drawn by the engine after it"]
        assert BITS in spoilt.failures
        (named,) = (check.found for check in spoilt.checks if check.name == BITS)
        assert named == "model.norm.weight is another in the engine of rank 1 than in the trainer of rank 0"
        assert said[0] == "mismatch/verified_abs_max"
        assert "trainer and engine disagree on the log-probabilities" in said[1]
        assert named in said[2]
        assert all(check.verdict is not Verdict.REPORTED for check in held.checks)
