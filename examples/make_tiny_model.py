"""Makes the tiny model that the default recipe trains: tokenizer, Qwen3 weights, supervised pretraining, evaluation.

    OMP_NUM_THREADS=1 python examples/make_tiny_model.py --out my-model

The result is an ordinary Hugging Face folder (about 1 MB). The demonstrations are made bad on purpose, so that
reinforcement learning has something to find: half of the chains are answered at once with a random digit, and in the
others each step goes wrong with probability 0.12. A policy that copies them perfectly is right about 0.4 of the time;
reasoning step by step without slips is in its repertoire, only not preferred.

The shipped model (two minutes on one thread, the same bytes in each of two runs), 1024 problems a set:

    set   problems                          T=1    greedy
    id    sums, 3 or 4 operations           0.398  0.556
    long  sums, 5 or 6 operations           0.337  0.608
    op    maxima and minima, 3 or 4         0.452  0.699
    rev   reversals of 3 to 5 digits        0.679  1.000

With a chain of thought 68 % of the `id` answers are right, which is what the slips leave; without, 11 %.
"""

import argparse
import math
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_klrl.tasks.arithmetic import (
    ArithmeticKind,
    ArithmeticTask,
    Problem,
    apply_operator,
    draw_below,
    draw_problem,
)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<unk>")
WORDS = (*"0123456789", "+", "-", "^", "v", "=", "\\boxed{", "}", "calc", "rev")
RESERVED_TOKENS = tuple(f"<|reserved_{index}|>" for index in range(8))
# The generation block marks what the supervised loss covers; it renders as nothing else.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<eos>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|im_start|>' + message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
)
MAX_POSITIONS = 256

BATCH_SIZE = 64
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 30
DIRECT_ANSWER_PROBABILITY = 0.5
SLIP_PROBABILITY = 0.12
CHAIN_TERMS = (1, 2, 3, 3, 4, 4, 5, 6)

# Name -> kind, fewest and most terms. Reinforcement learning trains on problems like those of the first.
EVALUATION_SETS = {
    "id": (ArithmeticKind.CHAIN, (3, 4)),
    "long": (ArithmeticKind.CHAIN, (5, 6)),
    "op": (ArithmeticKind.EXTREMUM, (3, 4)),
    "rev": (ArithmeticKind.REVERSAL, (3, 5)),
}
# The longest right answer, six operations, takes 29.
MAX_NEW_TOKENS = 32
EVALUATION_SEED = 1_000_003


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `WORDS`, five special tokens and eight reserved ids: 32 in all."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS, *RESERVED_TOKENS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|calc|rev|."), behavior="isolated")
    # Without Fuse, decoding would put a space between any two tokens.
    tokenizer.decoder = decoders.Fuse()
    special = [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, *RESERVED_TOKENS)]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """216k parameters in the Qwen3 architecture; two heads, so that tensor parallelism over two ranks is possible."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=192,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # 0.02, the default, suits widths of thousands: at 64 it halves the accuracy after the same number of steps.
        initializer_range=0.1,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
    )
    return model


def draw_training_problem(rng: random.Random) -> Problem:
    """55 % sums, 20 % maxima and minima, 25 % reversals."""
    share = rng.random()
    if share < 0.55:
        return draw_problem(rng, kind=ArithmeticKind.CHAIN, terms=CHAIN_TERMS[draw_below(rng, len(CHAIN_TERMS))])
    if share < 0.75:
        return draw_problem(rng, kind=ArithmeticKind.EXTREMUM, terms=1 + draw_below(rng, 4))
    return draw_problem(rng, kind=ArithmeticKind.REVERSAL, terms=2 + draw_below(rng, 4))


def noisy_digit(rng: random.Random, digit: int) -> int:
    """The digit, or with `SLIP_PROBABILITY` a random one."""
    return draw_below(rng, 10) if rng.random() < SLIP_PROBABILITY else digit


def demonstrate(rng: random.Random, problem: Problem) -> str:
    """A response as a careless and often impatient person would write it. A slip is carried on to the end."""
    if problem.kind is ArithmeticKind.REVERSAL:
        digits = (noisy_digit(rng, digit) for digit in reversed(problem.digits))
        return "\\boxed{" + "".join(map(str, digits)) + "}"
    if rng.random() < DIRECT_ANSWER_PROBABILITY:
        return f"\\boxed{{{draw_below(rng, 10)}}}"
    total = problem.digits[0]
    steps = str(total)
    for operator, digit in zip(problem.operators, problem.digits[1:], strict=True):
        total = noisy_digit(rng, apply_operator(operator, total, digit))
        steps += f"{operator}{digit}={total}"
    return f"{steps}\\boxed{{{total}}}"


def draw_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, both [BATCH_SIZE, longest]; the target is -100 outside of the response."""
    problems = [draw_training_problem(rng) for _ in range(BATCH_SIZE)]
    conversations = [
        [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": demonstrate(rng, problem)},
        ]
        for problem in problems
    ]
    batch: Any = tokenizer.apply_chat_template(
        conversations, return_dict=True, return_assistant_tokens_mask=True, padding=True, return_tensors="pt"
    )
    token_ids = batch["input_ids"]
    response_mask = torch.as_tensor(batch["assistant_masks"], dtype=torch.bool)
    return token_ids, token_ids.masked_fill(~response_mask, -100)


def learning_rate_factor(step: int, *, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def pretrain(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int, log_every: int = 50
) -> None:
    """Supervised next-token training on demonstrations, in place. About 100 CPU seconds for 1000 steps."""
    rng = random.Random(f"demonstrations/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps=steps))
    model.train()
    progress = tqdm(range(steps), desc="pretraining", unit="step")
    for step in progress:
        token_ids, targets = draw_batch(rng, tokenizer)
        # Padding stands to the right: causal attention never looks at it, so no attention mask is needed.
        logits = model(input_ids=token_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % log_every == 0:
            progress.set_postfix(nats_per_token=f"{loss.item():.3f}")


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: ArithmeticTask, *, problems: int, sample: bool
) -> float:
    """Share of `problems` answered rightly, one response each: sampled at temperature 1, or greedy."""
    model.eval()
    prompts = task.prompts(0, problems)
    padded = tokenizer.pad(
        {"input_ids": [list(prompt.token_ids) for prompt in prompts]}, padding_side="left", return_tensors="pt"
    )
    generate: Any = model.generate  # its own annotation does not admit its own models
    output = generate(**padded, max_new_tokens=MAX_NEW_TOKENS, do_sample=sample, top_k=0 if sample else None)
    right = 0.0
    for prompt, row in zip(prompts, output[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        right += task.is_right(row[:end], prompt.answer)
    return right / problems


def report_accuracies(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, problems: int) -> None:
    """Prints one line per evaluation set."""
    print(f"accuracy over {problems} problems each   T=1    greedy")
    for name, (kind, terms) in EVALUATION_SETS.items():
        task = ArithmeticTask(kind=kind, terms=terms, seed=EVALUATION_SEED, tokenizer=tokenizer)
        sampled = accuracy(model, tokenizer, task, problems=problems, sample=True)
        greedy = accuracy(model, tokenizer, task, problems=problems, sample=False)
        print(f"{name:>36}  {sampled:.3f}  {greedy:.3f}")


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Writes the Hugging Face folder."""
    model.save_pretrained(folder)
    # A new tokenizer: one that has made batches remembers their padding and would pad every later user's text.
    build_tokenizer().save_pretrained(folder)
    # safetensors makes its file readable by its owner alone, which a wheel would carry to every other user.
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. my-model")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps of 64 demonstrations")
    parser.add_argument("--seed", type=int, default=2, help="2 made the shipped model")
    parser.add_argument("--problems", type=int, default=1024, help="problems per evaluation set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=arguments.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, tokenizer, steps=arguments.steps, seed=arguments.seed)
    save(model, arguments.out)
    report_accuracies(model, tokenizer, problems=arguments.problems)


if __name__ == "__main__":
    main()
