"""Which weights sample the rollouts of which step, what is dropped, and what a checkpoint holds, bit for bit."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_klrl.assets import embedded_model
from megatron_klrl.generation.engine import Completion
from megatron_klrl.loop import rollout_file
from megatron_klrl.loop.buffer import RolloutBuffer
from megatron_klrl.loop.producer import Produced
from megatron_klrl.loop.rollout import Rollouts
from megatron_klrl.tasks.arithmetic import ArithmeticTask

TASK = ArithmeticTask(
    kind="chain", terms=(2, 3), seed=0, tokenizer=AutoTokenizer.from_pretrained(embedded_model("arithmetic"))
)


@dataclass
class Sampler:
    """Samples one prompt a step and remembers which version did."""

    version: int = 0
    made: list[tuple[int, int]] = field(default_factory=list)

    def produce(self, step: int) -> Produced:
        self.made.append((step, self.version))
        completions = [
            Completion(
                token_ids=(3, 4, step),
                logprobs=(-0.1, -1 / 3, -2.7e-7),
                finish_reason="stop",
                weight_version=self.version,
            ),
            Completion(token_ids=(5,), logprobs=(-1.5,), finish_reason="length", weight_version=self.version),
        ]
        prompts = TASK.prompts(step, 1) * 2
        found = Rollouts(prompts=prompts, completions=completions, rewards=[1.0, 0.1])
        return Produced(step=step, rollouts=found, rounds=step % 2, equal_groups=0.0)


def ages(staleness: int, *, steps: int) -> list[int]:
    """How old the rollouts of each step are when it trains, one version a step."""
    sampler = Sampler()
    buffer = RolloutBuffer(sampler, max_staleness=staleness, last_step=steps)
    found = []
    for step in range(1, steps + 1):
        assert buffer.fill(step, weight_version=sampler.version) == 0
        taken = buffer.take(step)
        assert taken.step == step
        found.append(sampler.version - taken.weight_version)
        sampler.version += 1
    assert [step for step, _ in sampler.made] == list(range(1, steps + 1)), "each step is sampled once, in order"
    assert not buffer.waiting
    return found


@pytest.mark.parametrize(
    ("staleness", "expected"),
    [(0, [0, 0, 0, 0, 0, 0]), (1, [0, 1, 1, 1, 1, 1]), (3, [0, 1, 2, 3, 3, 3]), (9, [0, 1, 2, 3, 4, 5])],
)
def test_rollouts_are_as_old_as_allowed_and_no_older(staleness: int, expected: list[int]) -> None:
    assert ages(staleness, steps=6) == expected


def test_a_smaller_bound_drops_what_would_be_too_old() -> None:
    sampler = Sampler()
    first = RolloutBuffer(sampler, max_staleness=3, last_step=9)
    first.fill(1, weight_version=0)
    assert [each.step for each in first.waiting] == [1, 2, 3, 4]
    second = RolloutBuffer(sampler, max_staleness=1, last_step=9)
    second.restore(first.waiting)
    assert second.fill(1, weight_version=0) == 4, (
        "steps 1 and 2 may train on version 0, 3 and 4 may not: two rollouts each"
    )
    second.take(1)
    sampler.version = 1
    assert second.fill(2, weight_version=1) == 0
    assert [(each.step, each.weight_version) for each in second.waiting] == [(2, 0), (3, 1)]


def test_a_checkpoint_holds_the_waiting_rollouts_bit_for_bit(tmp_path: Path) -> None:
    sampler = Sampler(version=7)
    waiting = tuple(sampler.produce(step) for step in (4, 5))
    rollout_file.write(tmp_path / "rollouts.safetensors", waiting)
    assert tuple(rollout_file.read(tmp_path / "rollouts.safetensors", TASK)) == waiting
