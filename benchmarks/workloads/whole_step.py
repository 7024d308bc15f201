"""A step with sampling: the rows of `Replay`, and what greedy decoding must give."""

import torch
from torch import Tensor

from benchmarks.harness.parity import Answer
from benchmarks.workloads.replay import Replay


class WholeStep(Replay):
    """The same models, rows and loss; a phase of a step answers with the values that it makes.

    Decoding is greedy, so that there is one right answer: it costs what sampling costs but for the draw.
    """

    def truth(self) -> Answer:
        """All values of all phases, in float64."""
        known = super().truth()
        assert known.loss is not None  # Replay has one
        return Answer(values={**known.values, "loss": known.loss.reshape(1), "greedy_tokens": self._greedy_tokens()})

    @torch.no_grad()
    def _greedy_tokens(self) -> Tensor:
        """``[B, tokens]``; nothing ends a response early."""
        model = self.loaded(self.policy)
        found: dict[tuple[int, ...], Tensor] = {}
        for prompt in self.prompts:
            if tuple(prompt) not in found:
                written = torch.tensor([prompt])
                for _ in range(self.tokens):
                    best = model(written, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                    written = torch.cat([written, best], 1)
                found[tuple(prompt)] = written[0, len(prompt) :].double()
        return torch.stack([found[tuple(prompt)] for prompt in self.prompts])
