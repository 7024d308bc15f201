"""What a step has to do: sequences, tokens, microbatches."""

from dataclasses import dataclass

from megatron_klrl.config.prompt_lengths import longest_prompt
from megatron_klrl.config.recipe import Dtype, Fp8, Recipe
from megatron_klrl.planning.layout import Layout
from megatron_klrl.planning.model import PlannedModel

NUMBER_BYTES = {Dtype.FP32: 4, Dtype.BF16: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One train step.

    Attributes:
        sequences: that are sampled and trained on.
        prompt: tokens of each prompt.
        response: tokens of each response, on average.
        longest: tokens of the longest sequence, which padded rows have all.
        number_bytes: of a weight or an activation.
        fp8: products are taken of 8-bit numbers.
        has_reference: a frozen reference is scored.
    """

    sequences: int
    prompt: int
    response: int
    longest: int
    number_bytes: int
    fp8: bool
    has_reference: bool

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * (self.prompt + self.response)


def of_recipe(recipe: Recipe, model: PlannedModel, *, prompt: int | None, response: int | None) -> Work:
    """The work of a recipe's step.

    Args:
        recipe: resolved.
        model: whose longest sequence bounds it.
        prompt: tokens of a prompt; None takes the longest that is known without a tokenizer.
        response: mean tokens of a response; None takes the longest allowed, which bounds time from above.
    """
    generation = recipe.generation
    known = prompt if prompt is not None else longest_prompt(recipe.data.train)
    limit = generation.max_model_len or model.positions
    return Work(
        sequences=recipe.loop.prompts_per_step * recipe.loop.group_size,
        prompt=known,
        response=response if response is not None else generation.max_tokens,
        longest=min(known + generation.max_tokens, limit),
        number_bytes=NUMBER_BYTES[recipe.precision.dtype],
        fp8=recipe.precision.fp8 is not Fp8.NONE,
        has_reference=recipe.has_reference,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """One forward pass of one rank.

    Attributes:
        tokens: of all its rows, before context parallelism cuts them.
        responses: of those that the head sees.
        count: of them on a rank, in an update.
    """

    tokens: int
    responses: int
    count: int


def microbatch(recipe: Recipe, work: Work, layout: Layout) -> Microbatch:
    """The largest microbatch of a rank, and how many it has in an update."""
    rows = -(-work.sequences // recipe.loop.updates_per_batch)
    per_rank = max(1, -(-rows // layout.data))
    packed = recipe.loop.tokens_per_microbatch
    if packed is not None:
        mean = work.prompt + work.response
        count = max(1, -(-per_rank * mean // packed))
        tokens = min(packed, per_rank * work.longest)
        share = work.response / mean
        return Microbatch(tokens=tokens, responses=round(tokens * share), count=count)
    size = min(recipe.loop.micro_batch_size or 1, per_rank)
    responses = size * (work.longest - work.prompt)
    return Microbatch(tokens=size * work.longest, responses=responses, count=-(-per_rank // size))
