"""Completions that were sampled before: the log-probabilities of a step, its loss, its gradient and its update."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness.parity import Answer

BETA = 0.04
CLIP = 0.2
GROUP_SIZE = 4
LEARNING_RATE = 1e-4
CLIP_GRAD = 1.0
_SHORTEST_PROMPT, _LONGEST_PROMPT = 8, 16
_PAD, _END = 0, 1
_HEAD_DIM = 64
# Both spread the logits enough that log-probabilities, and with them the loss, are not those of a uniform policy.
_INITIALISER_RANGE = 0.08
_REFERENCE_NOISE = 0.1


class Replay:
    """A seeded Qwen3, a reference near it, and completions with an advantage each.

    The loss of a sequence is the sum over its tokens of the clipped policy gradient less ``BETA`` times k3, over the
    longest length; that of the batch the mean over sequences (Dr. GRPO's form). Old log-probabilities are taken of the
    policy before the update, as part of the work.

    Attributes:
        policy: Hugging Face folder, in ``dtype``.
        reference: the same with another set of weights.
        prompts: token ids of each row's prompt; rows of one prompt stand together.
        completions: token ids of each row.
        advantages: ``[B]``.
        tokens: the longest completion.
        device: where contestants compute.
        dtype: of weights and activations.
        micro_batch_size: rows of a forward pass.
    """

    def __init__(  # noqa: PLR0913  a model and a batch
        self,
        *,
        sequences: int,
        tokens: int,
        layers: int,
        width: int,
        vocab: int,
        seed: int = 0,
        device: str = "cpu",
        dtype: str = "float32",
        micro_batch_size: int | None = None,
    ) -> None:
        """Write both models to a folder that goes with this object, and draw the rows."""
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.micro_batch_size = micro_batch_size or sequences
        generator = torch.Generator().manual_seed(seed)
        self._folder = tempfile.TemporaryDirectory(prefix="klrl-replay-")
        root = Path(self._folder.name)
        self.policy, self.reference, self.tokens = root / "policy", root / "reference", tokens
        positions = tokens + _LONGEST_PROMPT
        self._parameters = _write_models(
            self.policy, self.reference, layers=layers, width=width, vocab=vocab, dtype=dtype, positions=positions
        )

        def drawn(shortest: int, longest: int) -> list[int]:
            length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
            return torch.randint(_END + 1, vocab, (length,), generator=generator).tolist()

        questions = [drawn(_SHORTEST_PROMPT, _LONGEST_PROMPT) for _ in range(sequences // GROUP_SIZE)]
        self.prompts = [question for question in questions for _ in range(GROUP_SIZE)]
        self.completions = [drawn(3 * tokens // 4, tokens) for _ in self.prompts]
        self.completions[0] = [_END + 1] * tokens  # the longest length occurs
        self.advantages = torch.randn(len(self.prompts), generator=generator)

    def restore(self) -> None:
        """Nothing is written over: a call leaves other weights, and its work is the same."""

    def size(self) -> Mapping[str, float]:
        """Two products per parameter and token in each of three forwards, four in the backward; and Adam's tensors."""
        weights = self.dtype.itemsize * self._parameters
        count = sum(map(len, self.prompts)) + sum(map(len, self.completions))
        return {"input_bytes": weights, "least_bytes": 7 * weights, "least_flops": 10 * self._parameters * count}

    def padded(self, values: Tensor) -> Tensor:
        """``[B, tokens]`` from the values of all completions one after the other; zero behind a completion's end."""
        mask = torch.arange(self.tokens) < torch.tensor([[len(row)] for row in self.completions])
        return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values.cpu())

    def truth(self) -> Answer:
        """In float64 with transformers, a row at a time."""
        policy, reference = self.loaded(self.policy), self.loaded(self.reference)
        scale = self.tokens * len(self.prompts)
        old, ref, losses = [], [], []
        for number in range(len(self.prompts)):
            logprobs = self.logprobs(policy, number)
            with torch.no_grad():
                ref.append(self.logprobs(reference, number))
            old.append(logprobs.detach())
            distance = ref[-1] - logprobs
            ratio = torch.exp(logprobs - old[-1])  # 1 in value: no bound acts before the first update
            advantage = self.advantages[number].double().to(self.device)
            loss = (BETA * (distance.exp() - distance - 1) - advantage * ratio).sum() / scale
            loss.backward()
            losses.append(loss.detach())
        squares = [parameter.grad.square().sum() for parameter in policy.parameters() if parameter.grad is not None]
        return self.answer(
            torch.stack(losses).sum().cpu(), self.padded(torch.cat(old)), self.padded(torch.cat(ref)),
            grad_norm=float(torch.stack(squares).sum().sqrt()),
        )  # fmt: skip

    def answer(self, loss: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, *, grad_norm: float) -> Answer:
        """Both ``[B, tokens]``; the norm is that of the whole gradient before it is clipped."""
        return Answer(
            loss=loss,
            values={
                "old_logprobs": old_logprobs,
                "ref_logprobs": ref_logprobs,
                "grad_norm": torch.tensor([grad_norm], dtype=torch.float64),
            },
        )

    def loaded(self, folder: Path) -> Qwen3ForCausalLM:
        """A model in float64: its weights exactly, whatever they were written in."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).to(self.device)

    def scored(self, logprobs: Tensor) -> Answer:
        """Of contestants that score and do not train: log-probabilities of all completions, one after the other."""
        return Answer(values={"old_logprobs": self.padded(logprobs)})

    def logprobs(self, model: Qwen3ForCausalLM, number: int) -> Tensor:
        """Of the tokens of one completion."""
        prompt, completion = self.prompts[number], self.completions[number]
        tokens, taken = (torch.tensor(row, device=self.device) for row in (prompt + completion, completion))
        logits = model(tokens[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(-1, taken[:, None]).squeeze(-1)


def _write_models(
    policy: Path, reference: Path, *, layers: int, width: int, vocab: int, dtype: str, positions: int
) -> int:
    """Policy, the same with noise as the reference, a tokenizer beside each; returns the number of parameters."""
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // _HEAD_DIM, num_key_value_heads=max(1, width // (2 * _HEAD_DIM)),
        head_dim=_HEAD_DIM, max_position_embeddings=max(256, positions), tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=_END, pad_token_id=_PAD, initializer_range=_INITIALISER_RANGE, dtype=dtype,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
        model.save_pretrained(policy)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(_REFERENCE_NOISE * _INITIALISER_RANGE * torch.randn_like(parameter))
        model.save_pretrained(reference)
    words = {"<pad>": _PAD, "<eos>": _END} | {f"w{number}": number for number in range(_END + 1, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    for folder in (policy, reference):
        fast.save_pretrained(folder)
    return model.num_parameters()
