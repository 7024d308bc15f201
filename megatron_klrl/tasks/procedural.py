"""Procedural tasks of reasoning-gym (optional: the extra [tasks]): generated from a seed, verified by its scorers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_klrl.errors import UserError
from megatron_klrl.tasks.rendering import Framing, last_boxed, render_prompt
from megatron_klrl.tasks.row_task import decode
from megatron_klrl.tasks.task import Response, Verdicts
from megatron_klrl.tasks.verifier_pool import VerifierPool
from megatron_klrl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_REFUSED = {
    "composite": "takes objects, which a recipe cannot hold",
    # They draw from sets of strings, whose order differs from process to process: ranks would disagree on prompts.
    "isomorphic_strings": "makes other entries in every process",
    "polynomial_multiplication": "makes other entries in every process",
    "ransom_note": "makes other entries in every process",
}


def procedural_dataset(name: str, *, size: int, seed: int, config: Mapping[str, object], field: str) -> Any:
    """One of reasoning-gym's data sets.

    Raises:
        UserError: reasoning-gym is not installed, there is no such data set, or it does not take these settings.
    """
    try:
        from reasoning_gym import create_dataset  # noqa: PLC0415 - optional, and seconds of import
        from reasoning_gym.factory import DATASETS  # noqa: PLC0415
    except ImportError as error:
        fix = "pip install 'megatron-klrl[tasks]'"
        raise UserError(f"reasoning-gym cannot be imported ({error})", field=f"{field}.task", fix=fix) from error
    if name not in DATASETS or name in _REFUSED:
        problem = f"{name} {_REFUSED[name]}" if name in _REFUSED else f"reasoning-gym has no data set {name!r}"
        fix = f"use one of: {', '.join(sorted(set(DATASETS) - set(_REFUSED)))}"
        raise UserError(problem, field=f"{field}.dataset", fix=fix)
    try:
        return create_dataset(name, size=size, seed=seed, **config)
    except (TypeError, ValueError, AssertionError) as error:
        fix = f"see the configuration of {name} in reasoning-gym"
        raise UserError(f"{name} does not take it: {error}", field=f"{field}.config", fix=fix) from error


class ProceduralTask:
    """Stream over a generated data set (implements `tasks.task.Task`), from the start again after its last entry."""

    notes: Sequence[str] = ()

    def __init__(
        self, dataset: Any, *, size: int, pool: VerifierPool, framing: Framing, tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        """Take the data set.

        Args:
            dataset: of `procedural_dataset`.
            size: its entries.
            pool: of its `verifiers.ReasoningGymVerifier`.
            framing: what stands around the question.
            tokenizer: renders the prompts and decodes the responses.
        """
        self._dataset, self._size, self._pool = dataset, size, pool
        self._framing, self._tokenizer = framing, tokenizer

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` .. `start + count - 1` of the stream."""
        return [self._prompt(index) for index in range(start, start + count)]

    def _prompt(self, index: int) -> Prompt:
        entry = self._entry(index)
        text, token_ids = render_prompt(self._tokenizer, entry["question"], self._framing)
        return Prompt(index=index, token_ids=token_ids, text=text, answer=str(entry["answer"]))

    def _entry(self, index: int) -> dict[str, Any]:
        return self._dataset[index % self._size]

    def verify(self, responses: Sequence[Response]) -> Verdicts:
        """1 if the last balanced box earns the scorer's full score, else 0."""
        boxed = [last_boxed(decode(self._tokenizer, response.token_ids)) for response in responses]
        places = [place for place, box in enumerate(boxed) if box is not None]
        cases = [((boxed[place] or "").strip(), self._entry(responses[place].prompt.index)) for place in places]
        found = self._pool.score(cases)
        rewards = [0.0] * len(responses)
        for place, reward in zip(places, found.rewards, strict=True):
            rewards[place] = reward
        return Verdicts(rewards=rewards, timeouts=found.timeouts, errors=found.errors)
