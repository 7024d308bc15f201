"""Rollouts that wait for their train step, and the bound on how old they may be when it comes."""

from collections.abc import Iterable

from megatron_klrl.loop.producer import Produced, Producer


class RolloutBuffer:
    """Keeps sampling ``max_staleness`` steps ahead of training, as the two run side by side in asynchronous training.

    The rollouts of step s are sampled with the weights that step s - max_staleness - 1 left behind (the first ones with
    the untouched weights), so after the first steps all are exactly ``max_staleness`` versions old. With 0 each step
    samples for itself.
    """

    def __init__(self, producer: Producer, *, max_staleness: int, last_step: int) -> None:
        """An empty buffer.

        Args:
            producer: samples.
            max_staleness: most weight versions between sampling and training.
            last_step: of the run; nothing is sampled for later ones.
        """
        self._producer, self._ahead, self._last = producer, max_staleness, last_step
        self._waiting: dict[int, Produced] = {}

    @property
    def waiting(self) -> tuple[Produced, ...]:
        """In the order of their steps."""
        return tuple(self._waiting[step] for step in sorted(self._waiting))

    def restore(self, waiting: Iterable[Produced]) -> None:
        """Take back what a checkpoint held."""
        self._waiting = {each.step: each for each in waiting}

    def fill(self, step: int, *, weight_version: int) -> int:
        """Sample what is missing for this step and those ahead of it; collective.

        Args:
            step: about to be trained.
            weight_version: of the policy now.

        Returns:
            Rollouts dropped because they would be older than allowed when their step comes: some of a run that is
            resumed with a smaller bound.
        """
        dropped = 0
        for known in self.waiting:
            if weight_version + known.step - step - known.weight_version > self._ahead:
                dropped += len(self._waiting.pop(known.step).rollouts.prompts)
        for wanted in range(step, min(step + self._ahead, self._last) + 1):
            if wanted not in self._waiting:
                self._waiting[wanted] = self._producer.produce(wanted)
        return dropped

    def take(self, step: int) -> Produced:
        """The rollouts of a step, which leave the buffer."""
        return self._waiting.pop(step)
