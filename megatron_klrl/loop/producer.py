"""Makes the rollouts of a train step: prompts as the task has them, others in place of groups that teach nothing."""

from dataclasses import dataclass

from megatron_klrl.loop.parts import Parts
from megatron_klrl.loop.rollout import Rollouts, rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Produced:
    """The rollouts of one train step.

    Attributes:
        step: that they were made for.
        rollouts: ``prompts_per_step`` groups.
        rounds: of further prompts that it took.
        equal_groups: share of the groups whose rewards are all equal.
        verifier_timeouts: verifications that took too long, of groups that made room too.
        verifier_errors: verifications that failed, likewise.
    """

    step: int
    rollouts: Rollouts
    rounds: int
    equal_groups: float
    verifier_timeouts: int = 0
    verifier_errors: int = 0

    @property
    def weight_version(self) -> int:
        """The oldest version that sampled one of them."""
        return min(completion.weight_version for completion in self.rollouts.completions)


class Producer:
    """Samples for one step after the other.

    Attributes:
        next_prompt: place in the task's stream; a checkpoint holds it.
    """

    def __init__(self, parts: Parts, *, next_prompt: int) -> None:
        """Start at a place in the stream."""
        self._parts, self.next_prompt = parts, next_prompt

    def produce(self, step: int) -> Produced:
        """Sample and verify the rollouts of a step with the engine's current weights; collective.

        With ``algorithm.dynamic_sampling_rounds``, groups whose rewards are all equal, which have no advantage in any
        group baseline, make room for other prompts' (Yu et al. 2025, DAPO, arXiv 2503.14476, section 3.2).
        """
        recipe = self._parts.recipe
        wanted, size = recipe.loop.prompts_per_step, recipe.loop.group_size
        found = self._sample(step, wanted)
        sampled = [found]
        taught, equal = _by_use(found, size=size)
        rounds = 0
        while len(taught) < wanted and rounds < recipe.algorithm.dynamic_sampling_rounds:
            rounds += 1
            sampled.append(self._sample(step, wanted - len(taught)))
            more, spare = _by_use(sampled[-1], size=size)
            taught, equal = taught + more, equal + spare
        if rounds:
            found = _joined([*taught, *equal][:wanted])
        return Produced(
            step=step,
            rollouts=found,
            rounds=rounds,
            equal_groups=max(0, wanted - len(taught)) / wanted,
            verifier_timeouts=sum(each.verifier_timeouts for each in sampled),
            verifier_errors=sum(each.verifier_errors for each in sampled),
        )

    def _sample(self, step: int, prompts: int) -> Rollouts:
        parts, generation = self._parts, self._parts.recipe.generation
        first = self.next_prompt
        self.next_prompt += prompts
        return rollouts(
            parts,
            parts.task,
            parts.task.prompts(first, prompts),
            samples=parts.recipe.loop.group_size,
            temperature=generation.temperature,
            purpose=("rollout", step),
            top_p=generation.top_p,
            top_k=generation.top_k,
        )


def _by_use(found: Rollouts, *, size: int) -> tuple[list[Rollouts], list[Rollouts]]:
    """Groups with different rewards, and groups with equal ones."""
    groups = [
        Rollouts(
            prompts=found.prompts[start : start + size],
            completions=found.completions[start : start + size],
            rewards=found.rewards[start : start + size],
        )
        for start in range(0, len(found.prompts), size)
    ]
    equal = [len(set(group.rewards)) == 1 for group in groups]
    return (
        [group for group, same in zip(groups, equal, strict=True) if not same],
        [group for group, same in zip(groups, equal, strict=True) if same],
    )


def _joined(groups: list[Rollouts]) -> Rollouts:
    return Rollouts(
        prompts=[prompt for group in groups for prompt in group.prompts],
        completions=[completion for group in groups for completion in group.completions],
        rewards=[reward for group in groups for reward in group.rewards],
    )
