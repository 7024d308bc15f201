"""In a run, nothing that only an update needs is on the device while the engine generates."""

from pathlib import Path
from typing import Any

import pytest

from megatron_klrl.config.load import load_recipe
from megatron_klrl.jobs import train_rank
from tests.e2e.test_train import RECIPE
from tests.mcore.test_offload import bytes_of_state
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.e2e, pytest.mark.long]
SHORT = ["loop.steps=2", "loop.checkpoint_every=1", "data.eval={}", "optimum.prompts=0", "parallel.tensor=1"]


def held_while_generating(run_dir: Path) -> list[int]:
    """Bytes of state and gradients at each call of the engine: at each step, and in the first verification.

    On CPU the command refuses the setting, since nothing is gained; what it does is the same.
    """
    from megatron_klrl.generation.vllm_engine import VLLMEngine  # noqa: PLC0415  in the rank alone
    from megatron_klrl.mcore.engine import MegatronEngine  # noqa: PLC0415

    engines: list[MegatronEngine] = []
    held: list[int] = []
    build, generate = MegatronEngine.__init__, VLLMEngine.generate

    def noted(self: MegatronEngine, **options: Any) -> None:
        build(self, **options)
        engines.append(self)

    def watched(self: VLLMEngine, *arguments: Any) -> Any:
        held.append(bytes_of_state(engines[0]))
        return generate(self, *arguments)

    MegatronEngine.__init__, VLLMEngine.generate = noted, watched  # type: ignore[method-assign]
    train_rank(load_recipe(RECIPE, [*SHORT, "memory.offload_while_generating=true"]), run_dir, resume=False)
    return held


def test_state_is_out_while_the_engine_generates(tmp_path: Path) -> None:
    (held,) = run_ranks(1, held_while_generating, tmp_path)
    assert held == [0, 0, 0]
