"""Rules that need more than one section, the model or the world: a function each; errors name the key to change."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_klrl.config.model_folder import ModelShape, describe_model
from megatron_klrl.config.presets import find_preset
from megatron_klrl.config.prompt_lengths import count_rows, longest_prompt, longest_worked_answer
from megatron_klrl.config.recipe import ArithmeticSource, Fp8, JsonlSource, Recipe
from megatron_klrl.errors import UserError
from megatron_klrl.kl.refusal import refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the rules look at.

    Attributes:
        recipe: the resolved recipe.
        shape: shape of its model.
        world_size: ranks of the job.
    """

    recipe: Recipe
    shape: ModelShape
    world_size: int


def validate(recipe: Recipe, world_size: int) -> list[str]:
    """Check a recipe against its model and the number of ranks.

    Args:
        recipe: the resolved recipe.
        world_size: ranks of the job.

    Returns:
        Warnings: things that work and that the user may not have meant.

    Raises:
        UserError: the run cannot do what the recipe says; the first rule that does not hold.
    """
    plan = Plan(recipe=recipe, shape=describe_model(recipe.model.path), world_size=world_size)
    for rule in RULES:
        rule(plan)
    return [text for warning in WARNINGS for text in warning(plan)]


def check_unsupported_parallelism(plan: Plan) -> None:
    """Context and expert parallelism are not in this version."""
    for name in ("context", "expert"):
        size = getattr(plan.recipe.parallel, name)
        if size > 1:
            field = f"parallel.{name}"
            raise UserError(
                f"is {size}, but {name} parallelism is not in this version", field=field, fix=f"set {field}=1"
            )


def check_tensor(plan: Plan) -> None:
    """Tensor parallelism splits heads and feed-forward columns evenly."""
    shape = plan.shape
    sizes = {"attention heads": shape.heads, "key-value heads": shape.kv_heads, "feed-forward columns": shape.ffn}
    _check_divides("parallel.tensor", plan.recipe.parallel.tensor, sizes)


def check_generation_heads(plan: Plan) -> None:
    """The engine splits its heads evenly too; it may repeat key-value heads."""
    _check_divides("generation.tensor", plan.recipe.generation.tensor, {"attention heads": plan.shape.heads})


def _check_divides(field: str, parts: int, sizes: dict[str, int]) -> None:
    for what, size in sizes.items():
        if size % parts:
            common = [n for n in range(1, size + 1) if all(other % n == 0 for other in sizes.values())]
            fix = f"set {field} to one of: {', '.join(map(str, common))}"
            raise UserError(f"{parts} does not divide the model's {size} {what}", field=field, fix=fix)


def check_pipeline(plan: Plan) -> None:
    """Every pipeline stage has the same number of layers."""
    _check_divides("parallel.pipeline", plan.recipe.parallel.pipeline, {"layers": plan.shape.layers})


def check_sequence(plan: Plan) -> None:
    """Sequence parallelism splits over the tensor group."""
    if plan.recipe.parallel.sequence and plan.recipe.parallel.tensor == 1:
        fix = "set parallel.tensor to 2 or more, or parallel.sequence=false"
        raise UserError("needs a tensor group to split over", field="parallel.sequence", fix=fix)


def check_world(plan: Plan) -> None:
    """The world is a whole number of model copies."""
    parallel, world = plan.recipe.parallel, plan.world_size
    copy = parallel.ranks_per_replica
    if world % copy:
        product = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = {copy}"
        fix = f"start {copy * max(1, world // copy)} ranks (launch.ranks), or change parallel"
        raise UserError(f"{product} does not divide the {world} ranks", field="parallel", fix=fix)


def check_generation_world(plan: Plan) -> None:
    """The world is a whole number of engines."""
    tensor, world = plan.recipe.generation.tensor, plan.world_size
    if world % tensor:
        fix = "set generation.tensor=1, or a divisor of the number of ranks"
        raise UserError(f"{tensor} does not divide the {world} ranks", field="generation.tensor", fix=fix)


def check_fp8(plan: Plan) -> None:
    """FP8 needs a GPU with Transformer Engine, and this version does not train in it."""
    fp8 = plan.recipe.precision.fp8
    if fp8 is not Fp8.NONE:
        problem = f"is {fp8}, but FP8 training is not in this version (and never on CPU)"
        raise UserError(problem, field="precision.fp8", fix="set precision.fp8=none")


def check_on_policy(plan: Plan) -> None:
    """Only strictly on-policy runs are in this version."""
    loop = plan.recipe.loop
    if loop.max_staleness != 0:
        problem = f"is {loop.max_staleness}, but only runs without stale rollouts are in this version"
        raise UserError(problem, field="loop.max_staleness", fix="set loop.max_staleness=0")
    if loop.updates_per_batch != 1:
        problem = f"is {loop.updates_per_batch}, but only one update per batch is in this version"
        raise UserError(problem, field="loop.updates_per_batch", fix="set loop.updates_per_batch=1")


def check_group_size(plan: Plan) -> None:
    """Every advantage of this version compares completions of the same prompt."""
    if plan.recipe.loop.group_size < 2:
        problem = f"is 1, but {plan.recipe.algorithm.advantage} compares the completions of one prompt"
        raise UserError(problem, field="loop.group_size", fix="set loop.group_size to 2 or more")


def check_files(plan: Plan) -> None:
    """Files of prompts exist and hold as many rows as are asked for."""
    for field, source in sources(plan.recipe):
        if not isinstance(source, JsonlSource):
            continue
        rows, wanted = count_rows(source.path, field=f"{field}.path"), getattr(source, "prompts", 1)
        if rows < wanted:
            problem = f"is {wanted}, but {source.path} holds {rows} prompts"
            raise UserError(problem, field=f"{field}.prompts", fix=f"set {field}.prompts to {rows} or less")


def check_lengths(plan: Plan) -> None:
    """Prompt plus response fit into the model and into the engine."""
    generation, limit = plan.recipe.generation, plan.shape.max_position_embeddings
    model_limit = f"the model's {limit} positions (max_position_embeddings)"
    if generation.max_model_len is not None and generation.max_model_len > limit:
        problem = f"{generation.max_model_len} is more than {model_limit}"
        raise UserError(problem, field="generation.max_model_len", fix=f"set it to {limit} or less")
    room = generation.max_model_len or limit
    where = f"generation.max_model_len {room}" if generation.max_model_len else model_limit
    for field, source in sources(plan.recipe):
        longest = longest_prompt(source)
        if longest + generation.max_tokens > room:
            problem = (
                f"{generation.max_tokens} response tokens after prompts of {field} (up to {longest}) exceed {where}"
            )
            fix = f"set generation.max_tokens to {max(1, room - longest)} or less"
            raise UserError(problem, field="generation.max_tokens", fix=fix)


def check_greedy_samples(plan: Plan) -> None:
    """Greedy decoding has one completion per prompt."""
    for name, evaluation in plan.recipe.data.eval.items():
        if evaluation.temperature == 0 and evaluation.samples > 1:
            field = f"data.eval.{name}.samples"
            problem = f"is {evaluation.samples}, but at temperature 0 all completions of a prompt are the same"
            raise UserError(problem, field=field, fix=f"set {field}=1, or a temperature above 0")


def check_kl(plan: Plan) -> None:
    """The KL configuration follows the stated objective, unless the user takes the bias knowingly."""
    kl = plan.recipe.kl
    refused = None if kl.allow_biased else refusal(kl, on_policy=True)
    if refused is not None:
        near = refused.nearest
        settings = ("objective", "estimator", "placement", "credit", "correction", "log_ratio_clamp")
        changed = {name: getattr(near, name) for name in settings if getattr(near, name) != getattr(kl, name)}
        changes = [f"kl.{name}={'null' if value is None else value}" for name, value in changed.items()]
        fix = f"set {' '.join(changes)}, or kl.allow_biased=true to run it all the same"
        raise UserError(refused.reason.removeprefix("kl "), field="kl", fix=fix)


def warn_biased(plan: Plan) -> Iterator[str]:
    """A bias that was allowed is still said."""
    kl = plan.recipe.kl
    refused = refusal(kl, on_policy=True) if kl.allow_biased else None
    if refused is not None:
        yield f"kl.allow_biased: {refused.reason}"


def warn_preset_beta(plan: Plan) -> Iterator[str]:
    """A preset's number for beta means more here where its library divides the KL."""
    kl, algorithm = plan.recipe.kl, plan.recipe.algorithm
    if plan.recipe.preset is None or kl.beta == 0:
        return
    preset = find_preset(plan.recipe.preset)
    as_there = kl.beta == preset.kl.get("beta") and algorithm.aggregation == preset.algorithm["aggregation"]
    if preset.conversion and as_there:
        yield f"kl.beta: {kl.beta:g} is the number of preset {preset.name}, not its strength. {preset.conversion}"


def warn_cut_answers(plan: Plan) -> Iterator[str]:
    """A worked answer that cannot fit makes a set look worse than the model is."""
    limit = plan.recipe.generation.max_tokens
    for field, source in sources(plan.recipe):
        needed = longest_worked_answer(source) if isinstance(source, ArithmeticSource) else 0
        if needed > limit:
            yield f"generation.max_tokens: worked answers of {field} take up to {needed} tokens, {limit} are allowed"


def sources(recipe: Recipe) -> Iterator[tuple[str, ArithmeticSource | JsonlSource]]:
    """Every source of prompts with its dotted key."""
    yield "data.train", recipe.data.train
    for name, evaluation in recipe.data.eval.items():
        yield f"data.eval.{name}", evaluation


RULES: tuple[Callable[[Plan], None], ...] = (
    check_unsupported_parallelism,
    check_tensor,
    check_pipeline,
    check_sequence,
    check_world,
    check_generation_heads,
    check_generation_world,
    check_fp8,
    check_on_policy,
    check_group_size,
    check_files,
    check_lengths,
    check_greedy_samples,
    check_kl,
)
WARNINGS: tuple[Callable[[Plan], Iterator[str]], ...] = (warn_biased, warn_preset_beta, warn_cut_answers)
