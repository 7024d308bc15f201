"""Ranks share verification and agree on its outcome."""

import dataclasses

import pytest

from megatron_klrl.loop.rollout import verify_everywhere
from megatron_klrl.runtime import world as ranks
from megatron_klrl.tasks.task import Response, Verdicts
from megatron_klrl.types import Prompt
from tests.support.ranks import run_ranks


class RankDependent:
    """Gives the prompt's index, and a hundred for each rank: as a verifier whose time limit struck on one of them."""

    notes = ()

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def verify(self, responses: list[Response]) -> Verdicts:
        rewards = [100.0 * self.rank + response.prompt.index for response in responses]
        return Verdicts(rewards=rewards, timeouts=len(responses), errors=self.rank)


def verified(count: int) -> Verdicts:
    world = ranks.join(timeout_s=60)
    responses = [Response(Prompt(index=index, token_ids=(1,), text="", answer=""), (2,)) for index in range(count)]
    found = verify_everywhere(RankDependent(world.rank), responses, world=world)
    ranks.leave()
    return found


@pytest.mark.parametrize(
    ("count", "rewards"), [(5, [0, 1, 2, 103, 104]), (4, [0, 1, 102, 103]), (1, [0])], ids=["uneven", "even", "one"]
)
def test_every_rank_gets_the_same_verdicts(count: int, rewards: list[float]) -> None:
    found = run_ranks(2, verified, count)
    expected = Verdicts(rewards=list(map(float, rewards)), timeouts=count, errors=1)
    assert [dataclasses.asdict(verdicts) for verdicts in found] == [dataclasses.asdict(expected)] * 2
