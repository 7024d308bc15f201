"""The open requests of one vLLM engine, driven a step at a time by its caller."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_klrl.errors import WorkError
from megatron_klrl.generation.engine import Completion, Request, Sampling, Ticket

_REASONS: dict[str, Literal["stop", "length", "aborted"]] = {"stop": "stop", "length": "length", "abort": "aborted"}


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A response that grows.

    Attributes:
        version: of the weights when the request was submitted, then of its first token.
        updates: as in ``Completion``.
    """

    version: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    updates: list[tuple[int, int]] = field(default_factory=list)

    def grow(self, output: Any, *, version: int) -> None:
        """Take the tokens that one step drew."""
        if not self.token_ids:
            self.version = version
        elif version != (self.updates[-1][1] if self.updates else self.version):
            self.updates.append((len(self.token_ids), version))
        for token, entry in zip(output.token_ids, output.logprobs, strict=True):
            self.token_ids.append(int(token))
            self.logprobs.append(float(entry[token].logprob))

    def finish(self, reason: Literal["stop", "length", "aborted"]) -> Completion:
        """The response as it is now."""
        return Completion(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=reason,
            weight_version=self.version,
            weight_updates=tuple(self.updates),
        )


class RequestQueue:
    """Keeps what vLLM forgets: the tokens of requests that are still open, and which weights drew them.

    vLLM reports the tokens of each step once. An aborted request has no last report, and neither version gives the
    weights of a token in a form that both have, so both are noted here.
    """

    def __init__(self, engine: Any) -> None:
        """Take vLLM's ``LLMEngine``, which lives in this process."""
        self._engine = engine
        self._drafts: dict[Ticket, _Draft] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Number of open requests."""
        return len(self._drafts)

    def submit(self, requests: Sequence[Request], sampling: Sampling, *, version: int) -> list[Ticket]:
        """Queue requests; the weights' version is that of now."""
        tickets: list[Ticket] = []
        try:
            for request in requests:
                ticket = f"request-{next(self._numbers)}"
                tickets.append(ticket)
                self._drafts[ticket] = _Draft(version=version)
                prompt = {"prompt_token_ids": list(request.prompt_ids)}
                self._engine.add_request(ticket, prompt, _parameters(request, sampling))
        except BaseException:
            self.abort(tickets)
            raise
        return tickets

    def step(self, *, version: int) -> tuple[dict[Ticket, Completion], int]:
        """One step of the engine with weights ``version``: the responses that ended, and the number of new tokens."""
        finished: dict[Ticket, Completion] = {}
        new = 0
        for report in self._engine.step():
            draft, output = self._drafts[report.request_id], report.outputs[0]
            new += len(output.token_ids)
            draft.grow(output, version=version)
            if report.finished:
                if output.finish_reason not in _REASONS:
                    raise WorkError(f"vLLM ended a request for the reason {output.finish_reason!r}: see the log")
                finished[report.request_id] = draft.finish(_REASONS[output.finish_reason])
                del self._drafts[report.request_id]
        if any(value != value for completion in finished.values() for value in completion.logprobs):
            raise WorkError("vLLM returned NaN log-probabilities: the weights or the KV cache hold NaN")
        return finished, new

    def score(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        """Log-probability of every token of each row but its first. Nothing else may be open."""
        from vllm import SamplingParams  # noqa: PLC0415  heavy

        tickets = [f"score-{next(self._numbers)}" for _ in rows]
        for ticket, row in zip(tickets, rows, strict=True):
            wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
            self._engine.add_request(ticket, {"prompt_token_ids": list(row)}, wanted)
        found: dict[Ticket, Any] = {}
        while self._engine.has_unfinished_requests():
            found |= {report.request_id: report.prompt_logprobs for report in self._engine.step() if report.finished}
        return [
            tuple(float(entry[token].logprob) for entry, token in zip(found[ticket][1:], row[1:], strict=True))
            for ticket, row in zip(tickets, rows, strict=True)
        ]

    def abort(self, tickets: Sequence[Ticket]) -> dict[Ticket, Completion]:
        """Drop open requests; what they had written."""
        dropped = {ticket: self._drafts.pop(ticket) for ticket in tickets if ticket in self._drafts}
        if dropped:
            self._engine.abort_request(list(dropped))
        return {ticket: draft.finish("aborted") for ticket, draft in dropped.items()}

    def clear(self) -> None:
        """Forget every request, whoever made it: left in the engine, it makes the next call loop for ever."""
        self._drafts.clear()
        left = list(self._engine.output_processor.request_states)
        if left:
            self._engine.abort_request(left, internal=True)

    def describe(self) -> str:
        """Where the open requests stand, in words."""
        running, waiting = self._engine.engine_core.engine_core.scheduler.get_request_counts()
        return f"{len(self)} requests unfinished, {running} of them running and {waiting} waiting"


def _parameters(request: Request, sampling: Sampling) -> Any:
    from vllm import SamplingParams  # noqa: PLC0415  heavy, and only after the host is prepared
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # else tokens of the folder's generation_config.json would end responses too
        seed=request.seed,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
