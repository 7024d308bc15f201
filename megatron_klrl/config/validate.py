"""Rules that need more than one section, the model or the world: a function each; errors name the key to change."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_klrl.config.bounds import CLIPS, WEIGHT_RANGES, Bounds, weight_range
from megatron_klrl.config.data import (
    TABLE_SUFFIXES,
    AnySource,
    ArithmeticSource,
    JsonlSource,
    TableSource,
    is_hub_name,
)
from megatron_klrl.config.loop_rules import LOOP_RULES, LOOP_WARNINGS
from megatron_klrl.config.model_folder import ModelShape, describe_model
from megatron_klrl.config.precision import check_fp8_settings, check_quantised_engine, warn_precision
from megatron_klrl.config.presets import find_preset
from megatron_klrl.config.prompt_lengths import count_rows, longest_prompt, longest_worked_answer
from megatron_klrl.config.recipe import Recipe, WeightTransport
from megatron_klrl.config.sampling import LOWEST_TEMPERATURE, on_policy, truncation
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
    for loop_rule in LOOP_RULES:
        loop_rule(recipe)
    check_fp8_settings(recipe, plan.shape)
    check_quantised_engine(recipe)
    check_kl(plan)
    warned = [text for warning in WARNINGS for text in warning(plan)]
    warned += [text for warning in LOOP_WARNINGS for text in warning(recipe)]
    return warned + list(warn_precision(recipe))


def check_tensor(plan: Plan) -> None:
    """Tensor parallelism splits heads and feed-forward columns evenly; experts stay whole."""
    shape = plan.shape
    sizes = {"attention heads": shape.heads, "key-value heads": shape.kv_heads}
    if shape.experts is None:
        sizes["feed-forward columns"] = shape.ffn
    _check_divides("parallel.tensor", plan.recipe.parallel.tensor, sizes)


def check_experts(plan: Plan) -> None:
    """Expert parallelism splits experts evenly over ranks that hold different tokens."""
    parallel, experts = plan.recipe.parallel, plan.shape.experts
    if experts is None:
        if parallel.expert > 1:
            problem = f"is {parallel.expert}, but the model has no experts"
            raise UserError(problem, field="parallel.expert", fix="set parallel.expert=1")
        return
    _check_divides("parallel.expert", parallel.expert, {"experts": experts.count})
    ranks = plan.world_size // parallel.pipeline
    if ranks % parallel.expert:
        problem = f"{parallel.expert} does not divide the {ranks} ranks of a pipeline stage"
        raise UserError(problem, field="parallel.expert", fix="set it to a divisor of that number")
    if parallel.tensor > 1 and not parallel.sequence:
        problem = "is false, but a model with experts and parallel.tensor > 1 needs it"
        raise UserError(problem, field="parallel.sequence", fix="set parallel.sequence=true")


def check_weight_sync(plan: Plan) -> None:
    """A transport fits the layout and the machine."""
    sync, parallel = plan.recipe.weight_sync, plan.recipe.parallel
    if sync.transport is WeightTransport.IN_PROCESS and parallel.tensor * parallel.pipeline * parallel.expert > 1:
        problem = "is in_process, but the model is spread over several ranks"
        raise UserError(problem, field="weight_sync.transport", fix="set weight_sync.transport=auto")
    if (sync.transport is WeightTransport.DISK) != (sync.folder is not None):
        problem = "and weight_sync.folder belong together: the one is set without the other"
        fix = "set weight_sync.transport=disk and weight_sync.folder to a folder that all ranks share, or neither"
        raise UserError(problem, field="weight_sync.transport", fix=fix)


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
    """Every pipeline stage has the same number of layers, and so has every chunk of a stage."""
    parallel = plan.recipe.parallel
    _check_divides("parallel.pipeline", parallel.pipeline, {"layers": plan.shape.layers})
    if parallel.virtual_pipeline == 1:
        return
    if parallel.pipeline == 1:
        fix = "set parallel.pipeline to 2 or more, or parallel.virtual_pipeline=1"
        raise UserError("needs a pipeline to interleave", field="parallel.virtual_pipeline", fix=fix)
    per_stage = {"layers of a stage": plan.shape.layers // parallel.pipeline}
    _check_divides("parallel.virtual_pipeline", parallel.virtual_pipeline, per_stage)


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


def check_files(plan: Plan) -> None:
    """Files of prompts exist and hold as many rows as are asked for."""
    for field, source in sources(plan.recipe):
        if isinstance(source, TableSource):
            _check_table(source, field)
        if not isinstance(source, JsonlSource):
            continue
        rows, wanted = count_rows(source.path, field=f"{field}.path"), getattr(source, "prompts", 1)
        if rows < wanted:
            problem = f"is {wanted}, but {source.path} holds {rows} prompts"
            raise UserError(problem, field=f"{field}.prompts", fix=f"set {field}.prompts to {rows} or less")


def _check_table(source: TableSource, field: str) -> None:
    file = Path(source.path).expanduser()
    if not file.exists() and not is_hub_name(source.path):
        fix = "give a file, a folder, or a name on the hub (owner/name); paths start from the current directory"
        raise UserError(f"there is nothing at {source.path}", field=f"{field}.path", fix=fix)
    if file.is_file() and file.suffix not in TABLE_SUFFIXES:
        problem = f"{source.path} is not a table that can be read"
        raise UserError(problem, field=f"{field}.path", fix=f"give a file ending in {', '.join(TABLE_SUFFIXES)}")
    if file.is_file() and (source.subsets or source.split != "train"):
        key = "subsets" if source.subsets else "split"
        problem = f"is set, but {source.path} is a file, which has one split and no subsets"
        raise UserError(problem, field=f"{field}.{key}", fix=f"leave {key} out, or give the folder")
    if file.exists() and source.revision is not None:
        problem = f"is set, but {source.path} is on this machine"
        raise UserError(problem, field=f"{field}.revision", fix="leave it out; only names on the hub have revisions")


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


def check_microbatch(plan: Plan) -> None:
    """Rows are padded or packed, and the longest fits into a pack."""
    loop, limit = plan.recipe.loop, plan.recipe.generation.max_tokens
    if loop.tokens_per_microbatch is None:
        return
    field = "loop.tokens_per_microbatch"
    if loop.micro_batch_size is not None:
        problem = "packs sequences, loop.micro_batch_size pads them; both are given"
        raise UserError(problem, field=field, fix="set loop.micro_batch_size=null, or loop.tokens_per_microbatch=null")
    parallel = plan.recipe.parallel
    step = 2 * parallel.context if parallel.context > 1 else 1
    needed = -(-(longest_prompt(plan.recipe.data.train) + limit) // step) * step
    if loop.tokens_per_microbatch < needed:
        problem = f"is {loop.tokens_per_microbatch}, but one sequence of data.train can take {needed} tokens"
        raise UserError(problem, field=field, fix=f"set it to {needed} or more")


def check_greedy_samples(plan: Plan) -> None:
    """Greedy decoding has one completion per prompt."""
    for name, evaluation in plan.recipe.data.eval.items():
        if evaluation.temperature == 0 and evaluation.samples > 1:
            field = f"data.eval.{name}.samples"
            problem = f"is {evaluation.samples}, but at temperature 0 all completions of a prompt are the same"
            raise UserError(problem, field=field, fix=f"set {field}=1, or a temperature above 0")


def check_temperature(plan: Plan) -> None:
    """The engine samples at the temperature that the trainer divides by."""
    temperatures = {"generation.temperature": plan.recipe.generation.temperature}
    temperatures |= {f"data.eval.{name}.temperature": one.temperature for name, one in plan.recipe.data.eval.items()}
    for field, value in temperatures.items():
        if 0 < value < LOWEST_TEMPERATURE:
            problem = f"is {value:g}, but vLLM samples at {LOWEST_TEMPERATURE:g} at the lowest"
            raise UserError(problem, field=field, fix=f"set it to {LOWEST_TEMPERATURE:g} or more")


def check_truncation(plan: Plan) -> None:
    """Training rollouts are samples of the policy, unless the user takes the bias knowingly."""
    generation = plan.recipe.generation
    reason = None if plan.recipe.kl.allow_biased else truncation(generation)
    if reason is not None:
        field = "generation.top_p" if generation.top_p < 1 else "generation.top_k"
        fix = "set generation.top_p=1.0 generation.top_k=null, or kl.allow_biased=true to run it all the same"
        raise UserError(reason, field=field, fix=fix)


def check_memory(recipe: Recipe, *, gpus: int) -> None:
    """Only a GPU's memory is given back: vLLM ignores the request on CPU, and the trainer has nowhere to move to."""
    if recipe.generation.sleep and gpus == 0:
        problem = "is true, but there is no GPU whose memory the engine could give back"
        raise UserError(problem, field="generation.sleep", fix="set generation.sleep=false")
    if recipe.memory.offload_while_generating and gpus == 0:
        raise UserError(
            "is true, but there is no GPU: the trainer's memory is the host's already",
            field="memory.offload_while_generating",
            fix="set memory.offload_while_generating=false",
        )


def check_kl(plan: Plan) -> None:
    """The KL configuration follows the stated objective, unless the user takes the bias knowingly."""
    kl = plan.recipe.kl
    refused = None if kl.allow_biased else refusal(kl, on_policy=on_policy(plan.recipe.loop))
    if refused is not None:
        near = refused.nearest
        settings = ("objective", "estimator", "placement", "credit", "correction", "log_ratio_clamp", "ratio_max")
        changed = {name: getattr(near, name) for name in settings if getattr(near, name) != getattr(kl, name)}
        changes = [f"kl.{name}={'null' if value is None else value}" for name, value in changed.items()]
        fix = f"set {' '.join(changes)}, or kl.allow_biased=true to run it all the same"
        raise UserError(refused.reason.removeprefix("kl "), field="kl", fix=fix)


def check_surrogate(plan: Plan) -> None:
    """No bound stands beside a surrogate that does not have it."""
    _check_taken("algorithm", plan.recipe.algorithm, choice="surrogate", bounds=CLIPS)


def check_mismatch(plan: Plan) -> None:
    """The correction takes the bounds that are set, and they leave something between them."""
    mismatch = plan.recipe.mismatch
    _check_taken("mismatch", mismatch, choice="correction", bounds=WEIGHT_RANGES)
    bounds = weight_range(mismatch)
    low, high = bounds.get("low"), bounds.get("high")
    if low is not None and high is not None and low >= high:
        field = "mismatch.high" if mismatch.low is None else "mismatch.low"
        fix = f"set mismatch.low below {high:g}, or mismatch.high above {low:g}"
        raise UserError(f"the range [{low:g}, {high:g}] keeps nothing", field=field, fix=fix)


def check_reference_model(plan: Plan) -> None:
    """Another reference has the policy's shape: the KL compares them token by token."""
    path = plan.recipe.reference.path
    if path is None:
        return
    try:
        found = describe_model(path)
    except UserError as error:
        raise UserError(error.problem, field="reference.path", fix=error.fix) from error
    if replace(found, path=plan.shape.path, eos_ids=plan.shape.eos_ids) != plan.shape:
        problem = f"{path} is a model of another shape than model.path"
        raise UserError(problem, field="reference.path", fix="name a model of the same architecture and vocabulary")


def _check_taken(section: str, settings: BaseModel, *, choice: str, bounds: Mapping[Any, Bounds]) -> None:
    chosen = getattr(settings, choice)
    for name in dict.fromkeys(name for taken in bounds.values() for name in taken):
        value = getattr(settings, name)
        if value is None or name in bounds[chosen]:
            continue
        takers = " or ".join(other for other, taken in bounds.items() if name in taken)
        problem = f"is {value:g}, but {choice} {chosen} has no such bound"
        fix = f"set {section}.{name}=null, or {section}.{choice} to {takers}"
        raise UserError(problem, field=f"{section}.{name}", fix=fix)


def warn_biased(plan: Plan) -> Iterator[str]:
    """A bias that was allowed is still said."""
    kl = plan.recipe.kl
    refused = refusal(kl, on_policy=on_policy(plan.recipe.loop)) if kl.allow_biased else None
    if refused is not None:
        yield f"kl.allow_biased: {refused.reason}"
    truncated = truncation(plan.recipe.generation) if kl.allow_biased else None
    if truncated is not None:
        yield f"kl.allow_biased: {truncated}"


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


def sources(recipe: Recipe) -> Iterator[tuple[str, AnySource]]:
    """Every source of prompts with its dotted key."""
    yield "data.train", recipe.data.train
    for name, evaluation in recipe.data.eval.items():
        yield f"data.eval.{name}", evaluation


RULES: tuple[Callable[[Plan], None], ...] = (
    check_tensor,
    check_experts,
    check_pipeline,
    check_sequence,
    check_world,
    check_generation_heads,
    check_generation_world,
    check_weight_sync,
    check_files,
    check_lengths,
    check_microbatch,
    check_greedy_samples,
    check_temperature,
    check_truncation,
    check_surrogate,
    check_mismatch,
    check_reference_model,
)
WARNINGS: tuple[Callable[[Plan], Iterator[str]], ...] = (warn_biased, warn_preset_beta, warn_cut_answers)
