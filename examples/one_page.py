"""The whole algorithm on one page: reinforcement learning of a language model that is held near a reference.

    python examples/one_page.py --steps 30
    python examples/one_page.py --beta 0.5                            # reaches J = 0.54 at 0.5 nats; optimum 0.59
    python examples/one_page.py --beta 0.5 --kl loss/k1/token/none    # 0.33 at 1.1: in expectation nothing holds it

The objective is J = E[R] - beta * KL(policy || reference), the KL summed over the tokens of a response, in nats. An
update applies an estimate of its gradient, and of the many ways to write the KL part of that down, few are estimates of
that gradient: --kl takes any name of `klrl audit`, placement/estimator/credit/correction.

Read from top to bottom: one process, one small model, no engine. Everything that decides the gradient is the package's
own, so this page and a run on many ranks follow the same mathematics; each step says who does the same at scale.
"""

import argparse
import copy
import difflib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from megatron_klrl.assets import embedded_model
from megatron_klrl.errors import UserError
from megatron_klrl.kl import KLConfig, catalogue, loss_terms, reward_advantages
from megatron_klrl.loop.optimum import Point, optimal_point
from megatron_klrl.metrics.step import per_sequence
from megatron_klrl.rl.advantages import rloo
from megatron_klrl.tasks.arithmetic import ArithmeticTask
from megatron_klrl.tasks.task import Response, Task
from megatron_klrl.types import Prompt
from megatron_klrl.vocab_parallel.measures import TokenMeasures, measure
from megatron_klrl.vocab_parallel.shard import VocabShard

PROMPTS_PER_STEP = 16
GROUP_SIZE = 8  # completions of each prompt: the others are what one completion's reward is compared with
MAX_TOKENS = 32
LEARNING_RATE = 5e-4
EVALUATED_PROMPTS = 64
EVALUATION_START = 10_000_000  # far behind what training draws from the same stream of prompts


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Completions of one step, siblings of one prompt next to each other. B rows, P prompt and T response columns.

    Attributes:
        tokens: ``[B, P + T]``, prompts padded on the left, responses on the right.
        attention: ``[B, P + T]``, 0 on the padding of prompts.
        mask: ``[B, T]`` bool, true where the policy wrote the token, end-of-sequence included.
        rollout_logprobs: ``[B, T]`` nats, what each token was sampled with.
        rewards: ``[B]`` 0 or 1.
    """

    tokens: Tensor
    attention: Tensor
    mask: Tensor
    rollout_logprobs: Tensor
    rewards: Tensor

    @property
    def responses(self) -> Tensor:
        """``[B, T]``."""
        return self.tokens[:, -self.mask.shape[1] :]


@dataclass(frozen=True, kw_only=True)
class Models:
    """The policy, which is trained, and the reference, a frozen copy of where it started."""

    policy: Any
    reference: Any
    tokenizer: Any


def load_models() -> Models:
    """The tiny model that ships with the package. At scale: mcore/conversion.py cuts the same files over the ranks."""
    folder = embedded_model("arithmetic")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Models(
        policy=policy,
        reference=copy.deepcopy(policy).requires_grad_(False),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


# 1. Sample and verify. At scale: generation/vllm_engine.py samples, loop/rollout.py gathers, tasks/ verifies.
@torch.no_grad()
def sample(models: Models, task: Task, prompts: Sequence[Prompt]) -> Samples:
    """``GROUP_SIZE`` completions of every prompt at temperature 1, rewarded."""
    repeated = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]
    token_ids = {"input_ids": [list(prompt.token_ids) for prompt in repeated]}
    padded = models.tokenizer.pad(token_ids, padding_side="left", return_tensors="pt")
    written = models.policy.generate(
        **padded,
        max_new_tokens=MAX_TOKENS,
        do_sample=True,
        top_k=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    responses = written.sequences[:, padded["input_ids"].shape[1] :]
    ends = responses == models.tokenizer.eos_token_id
    mask = (ends.cumsum(-1) - ends.long()) == 0  # up to the first end-of-sequence token, itself included
    every_logprob = torch.stack(written.logits, 1).log_softmax(-1)
    answers = [
        Response(prompt, row[kept].tolist()) for prompt, row, kept in zip(repeated, responses, mask, strict=True)
    ]
    return Samples(
        tokens=written.sequences,
        attention=torch.cat([padded["attention_mask"], torch.ones_like(responses)], 1),
        mask=mask,
        rollout_logprobs=every_logprob.gather(-1, responses.unsqueeze(-1)).squeeze(-1).where(mask, 0.0),
        rewards=torch.tensor(task.verify(answers).rewards),
    )


# 2. Score. At scale: mcore/engine.py runs both models, vocab_parallel/ measures from shards of the vocabulary.
def score(models: Models, samples: Samples) -> TokenMeasures:
    """Of each response token: both models' log-probability, and the exact KL over the vocabulary at its position.

    The policy's log-probability and the KL can be differentiated. One forward pass serves scores and update, because
    there is one update per batch: with more (``loop.updates_per_batch``), the policy would move between the two.
    """
    with torch.no_grad():
        ref_logits = response_logits(models.reference, samples)
    logits = response_logits(models.policy, samples)
    shard = VocabShard.whole(logits.shape[-1])
    return measure(logits, samples.responses, shard=shard, ref_logits=ref_logits)


def response_logits(model: Any, samples: Samples) -> Tensor:
    """``[B, T, V]``: a token's logits stand at the position before it."""
    positions = (samples.attention.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=samples.tokens, attention_mask=samples.attention, position_ids=positions, use_cache=False
    ).logits
    return logits[:, -samples.mask.shape[1] - 1 : -1]


# 3. The loss. At scale: loop/update.py makes the advantages, losses/policy_loss.py the scalar of each microbatch.
def loss_of(scores: TokenMeasures, samples: Samples, kl: KLConfig) -> Tensor:
    """What an update minimises; in expectation its gradient is that of -E[R], plus what the KL's catalogue row states.

    A KL has up to two sides: one multiplies the score, as if it were a reward (but is never normalised with the
    task's), the other is differentiated. kl/surrogate.py has both; the one that a configuration lacks is zero.
    """
    mask, logprobs, ref_logprobs = samples.mask, scores.logprobs, present(scores.ref_logprobs)
    of_task = rloo(samples.rewards, group_size=GROUP_SIZE).unsqueeze(-1)
    known: Any = {"config": kl, "rollout_logprobs": samples.rollout_logprobs, "full_kl": scores.full_kl}
    reward_side = reward_advantages(logprobs, ref_logprobs, mask, group_size=GROUP_SIZE, **known)
    loss_side = loss_terms(logprobs, ref_logprobs, mask, **known)
    score_function = (of_task + reward_side) * logprobs.where(mask, 0.0)
    # sum over the tokens of a response, mean over responses: any other mean would change what beta means
    return (loss_side - score_function).sum(-1).mean()


def present(values: Tensor | None) -> Tensor:
    """Values that a reference gives."""
    if values is None:
        raise ValueError("scores lack a reference")
    return values


def point(scores: TokenMeasures, samples: Samples, kl: KLConfig) -> Point:
    """Mean reward, exact KL and objective of the samples. At scale: metrics/step.py."""
    reward, nats = float(samples.rewards.mean()), per_sequence(present(scores.full_kl).detach(), samples.mask)
    return Point(accuracy=reward, kl=nats, objective=reward - kl.beta * nats)


# 4. The loop. At scale: loop/run.py around the one train step of loop/step.py, weight_sync/ between trainer and engine.
def train(models: Models, task: Task, kl: KLConfig, *, steps: int) -> Iterator[Point]:
    """Where the policy stood before each update."""
    optimizer = torch.optim.AdamW(models.policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        samples = sample(models, task, task.prompts(step * PROMPTS_PER_STEP, PROMPTS_PER_STEP))
        scores = score(models, samples)
        optimizer.zero_grad()
        loss_of(scores, samples, kl).backward()
        torch.nn.utils.clip_grad_norm_(models.policy.parameters(), 1.0)
        optimizer.step()
        yield point(scores, samples, kl)


# 5. How far it got. For a 0/1 reward the best policy is known, reference * exp(R / beta): loop/optimum.py.
@torch.no_grad()
def evaluate(models: Models, task: Task, kl: KLConfig) -> tuple[Point, list[float]]:
    """Where the policy stands on prompts of their own, and the success rate of each."""
    samples = sample(models, task, task.prompts(EVALUATION_START, EVALUATED_PROMPTS))
    rates = samples.rewards.view(-1, GROUP_SIZE).mean(-1).tolist()
    return point(score(models, samples), samples, kl), rates


def find_kl(name: str, *, beta: float) -> KLConfig:
    """The catalogue's configuration of this name; UserError if there is none, or beta is no weight."""
    rows = {entry.name: entry.config for entry in catalogue()}
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=1, cutoff=0.0)[0]
        raise UserError(f"no configuration {name!r} in the catalogue", field="--kl", fix=f"use for example {near}")
    if not (math.isfinite(beta) and beta > 0):
        raise UserError(f"{beta} is not a positive number of nats", field="--beta", fix="use for example 0.1")
    return KLConfig(beta=beta).with_axes(rows[name].axes)


def run(kl: KLConfig, *, steps: int, seed: int) -> None:
    """Train, and print a row per step."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    logging.disable_progress_bar()
    models = load_models()
    task = ArithmeticTask(kind="chain", terms=(3, 4), seed=seed, tokenizer=models.tokenizer)
    verdict = next(entry.verdict_sequence for entry in catalogue() if entry.name == kl.name)
    print(f"{kl.name}: {verdict} for J = E[R] - {kl.beta:g} KL(policy || reference)")
    start, rates = evaluate(models, task, kl)
    best = optimal_point(rates, beta=kl.beta)
    print("step   reward   KL nats        J")
    for step, now in enumerate(train(models, task, kl, steps=steps)):
        print(f"{step:4d}   {now.accuracy:6.3f}   {now.kl:7.4f}   {now.objective:6.3f}", flush=True)
    reached, _ = evaluate(models, task, kl)
    for name, at in (("start", start), ("reached", reached), ("optimum", best)):
        print(f"{name:>8}: J = {at.objective:6.3f}   reward {at.accuracy:.3f}   KL {at.kl:.3f} nats")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 for a wrong argument."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kl", default="reward/k1/to_go/none", help="placement/estimator/credit/correction")
    parser.add_argument("--beta", type=float, default=0.1, help="reward that a nat costs")
    parser.add_argument("--steps", type=int, default=30, help="updates")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and samples")
    options = parser.parse_args(arguments)
    try:
        run(find_kl(options.kl, beta=options.beta), steps=options.steps, seed=options.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
