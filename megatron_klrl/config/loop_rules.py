"""Rules on algorithm, loop, kl_control and reference, which need the recipe alone; errors name the key to change."""

from collections.abc import Callable, Iterator

from megatron_klrl.config.algorithm import Advantage, Aggregation, MismatchCorrection, Overlong, RatioTo, Surrogate
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.regularisation import BetaKind, KLControlSection
from megatron_klrl.errors import UserError

_NEED_NO_SIBLINGS = (Advantage.REINFORCE, Advantage.REINFORCE_PP)


def check_group_size(recipe: Recipe) -> None:
    """A baseline from siblings needs some."""
    advantage = recipe.algorithm.advantage
    if recipe.loop.group_size < 2 and advantage not in _NEED_NO_SIBLINGS:
        problem = f"is 1, but {advantage} compares the completions of one prompt"
        raise UserError(problem, field="loop.group_size", fix="set loop.group_size to 2 or more")


def check_updates(recipe: Recipe) -> None:
    """Every update of a step has the same number of whole groups."""
    loop = recipe.loop
    if loop.prompts_per_step % loop.updates_per_batch:
        divisors = [n for n in range(1, loop.prompts_per_step + 1) if loop.prompts_per_step % n == 0]
        problem = f"{loop.updates_per_batch} does not divide the {loop.prompts_per_step} prompts of a step"
        fix = f"set it to one of: {', '.join(map(str, divisors))}"
        raise UserError(problem, field="loop.updates_per_batch", fix=fix)


def check_surrogate_ratio(recipe: Recipe) -> None:
    """One ratio to the rollout policy leaves nothing for a mismatch correction, and REINFORCE has no ratio."""
    algorithm = recipe.algorithm
    if algorithm.ratio_to is RatioTo.OLD:
        return
    field = "algorithm.ratio_to"
    if algorithm.surrogate is Surrogate.REINFORCE:
        problem = f"is {algorithm.ratio_to}, but surrogate reinforce has no ratio"
        raise UserError(problem, field=field, fix=f"set {field}=old, or use mismatch.correction")
    if recipe.mismatch.correction is not MismatchCorrection.NONE:
        problem = f"puts into one ratio what mismatch.correction={recipe.mismatch.correction} would correct again"
        raise UserError(problem, field=field, fix=f"set mismatch.correction=none, or {field}=old")


def check_aggregation(recipe: Recipe) -> None:
    """A divisor stands beside the aggregation that has one."""
    algorithm = recipe.algorithm
    if algorithm.norm_length is not None and algorithm.aggregation is not Aggregation.CONSTANT_NORM:
        problem = f"is {algorithm.norm_length}, but aggregation {algorithm.aggregation} has no divisor"
        fix = "set algorithm.norm_length=null, or algorithm.aggregation=constant_norm"
        raise UserError(problem, field="algorithm.norm_length", fix=fix)


def check_overlong(recipe: Recipe) -> None:
    """The penalty has a length over which it grows, and nothing else has one."""
    algorithm, longest, field = recipe.algorithm, recipe.generation.max_tokens, "algorithm.overlong_buffer"
    buffer = algorithm.overlong_buffer
    if algorithm.overlong is Overlong.PENALTY and buffer is None:
        fix = f"set {field} to 1 to {longest} tokens"
        raise UserError("is missing, and algorithm.overlong=penalty grows over it", field=field, fix=fix)
    if algorithm.overlong is not Overlong.PENALTY and buffer is not None:
        problem = f"is {buffer}, but algorithm.overlong={algorithm.overlong} has no buffer"
        raise UserError(problem, field=field, fix=f"set algorithm.overlong=penalty, or {field}=null")
    if buffer is not None and buffer > longest:
        problem = f"is {buffer}, longer than the longest response ({longest} tokens)"
        raise UserError(problem, field=field, fix=f"set it to {longest} or less")


def check_dynamic_sampling(recipe: Recipe) -> None:
    """Groups of one are always equal."""
    if recipe.algorithm.dynamic_sampling_rounds and recipe.loop.group_size == 1:
        problem = "replaces groups whose rewards are all equal, and every group of one is"
        fix = "set loop.group_size to 2 or more, or algorithm.dynamic_sampling_rounds=0"
        raise UserError(problem, field="algorithm.dynamic_sampling_rounds", fix=fix)


def check_kl_control(recipe: Recipe) -> None:
    """A schedule has an end, a target a budget; and there is a KL to weigh."""
    control, kind = recipe.kl_control, recipe.kl_control.kind
    if kind is not BetaKind.FIXED and recipe.kl.beta == 0:
        problem = f"is {kind}, but kl.beta=0 loads no reference to measure a KL against"
        raise UserError(problem, field="kl_control.kind", fix="set kl.beta to the first step's weight, above 0")
    scheduled = kind in (BetaKind.LINEAR, BetaKind.COSINE)
    _check_belongs(control, "final", wanted=scheduled, required=True)
    _check_belongs(control, "steps", wanted=scheduled, required=False)
    _check_belongs(control, "target", wanted=kind is BetaKind.TARGET, required=True)
    if kind is BetaKind.TARGET and not control.low <= recipe.kl.beta <= control.high:
        problem = f"is {recipe.kl.beta:g}, outside of [kl_control.low, kl_control.high]"
        fix = f"set it between {control.low:g} and {control.high:g}, or change those"
        raise UserError(problem, field="kl.beta", fix=fix)


def _check_belongs(control: KLControlSection, name: str, *, wanted: bool, required: bool) -> None:
    value, field = getattr(control, name), f"kl_control.{name}"
    if wanted and required and value is None:
        raise UserError(f"is missing, and kl_control.kind={control.kind} needs it", field=field, fix=f"set {field}")
    if not wanted and value is not None:
        problem = f"is {value:g}, but kl_control.kind={control.kind} has none"
        raise UserError(problem, field=field, fix=f"set {field}=null, or another kl_control.kind")


def check_reference(recipe: Recipe) -> None:
    """A reference is there to be changed, in one way; and its optimum is reported only where it is the start."""
    reference = recipe.reference
    changed = {"path": reference.path is not None, "reset_every": reference.reset_every > 0}
    changed["ema"] = reference.ema is not None
    for name, is_set in changed.items():
        if is_set and not recipe.has_reference:
            problem = "is set, but kl.beta=0 loads no reference"
            fix = f"set kl.beta above 0 or reference.measure=true, or leave {name} out"
            raise UserError(problem, field=f"reference.{name}", fix=fix)
    if changed["reset_every"] and changed["ema"]:
        fix = "set reference.reset_every=0, or reference.ema=null"
        raise UserError("and reference.reset_every are both set", field="reference.ema", fix=fix)
    if recipe.optimum.prompts and (any(changed.values()) or recipe.kl_control.kind is not BetaKind.FIXED):
        problem = "asks for the optimum of an objective with a fixed beta and the starting model as reference"
        fix = "set optimum.prompts=0, or kl_control.kind=fixed and no key of reference"
        raise UserError(problem, field="optimum.prompts", fix=fix)


def check_keep_best(recipe: Recipe) -> None:
    """The best of the checkpoints that go is kept: some go, and an evaluation named is one of the recipe's."""
    name, field = recipe.checkpoint.keep_best, "checkpoint.keep_best"
    if name is None:
        return
    if recipe.checkpoint.keep is None:
        fix = f"set checkpoint.keep, or leave {field} out"
        raise UserError(f"is {name}, but without checkpoint.keep all checkpoints stay", field=field, fix=fix)
    if name.startswith("eval/") and name not in {f"eval/{each}/accuracy" for each in recipe.data.eval}:
        known = ", ".join(f"eval/{each}/accuracy" for each in recipe.data.eval) or "none: data.eval is empty"
        raise UserError(
            f"{name} is not measured", field=field, fix=f"name one of the evaluations ({known}), or a metric"
        )


def warn_keep_best(recipe: Recipe) -> Iterator[str]:
    """A checkpoint without an evaluation in its own step is never the best one."""
    loop, name = recipe.loop, recipe.checkpoint.keep_best
    if name is None or not name.startswith("eval/") or not loop.checkpoint_every:
        return
    if not loop.eval_every or loop.checkpoint_every % loop.eval_every:
        yield (
            f"checkpoint.keep_best: {name} is measured every {loop.eval_every} steps (loop.eval_every; 0: at the end), "
            f"and checkpoints of other steps never count as the best one"
        )


def warn_stale_reward(recipe: Recipe) -> Iterator[str]:
    """What stale samples earn says little of the policy that trains on them."""
    loop = recipe.loop
    if loop.max_staleness and (not recipe.data.eval or loop.eval_every == 0):
        yield (
            f"loop.max_staleness: reward/mean is that of a policy {loop.max_staleness} updates old; evaluate the "
            "current one with data.eval and loop.eval_every"
        )


def warn_stale_gradient(recipe: Recipe) -> Iterator[str]:
    """REINFORCE on old samples without weights follows the reward of neither policy."""
    stale = recipe.loop.max_staleness > 0 or recipe.loop.updates_per_batch > 1
    bare = recipe.mismatch.correction is MismatchCorrection.NONE
    if stale and bare and recipe.algorithm.surrogate is Surrogate.REINFORCE:
        yield (
            "mismatch.correction: the policy gradient of the reward has no importance weights although rollouts are "
            "older than the policy; set token_truncate or prefix_truncate, or a surrogate with a ratio"
        )
    if _ratio_is_always_one(recipe):
        yield (
            "algorithm.ratio_to: with one update per batch the ratio to the old policy is 1, so nothing is clipped or "
            "corrected for staleness; set algorithm.ratio_to=rollout, or mismatch.correction"
        )


def _ratio_is_always_one(recipe: Recipe) -> bool:
    """Whether a surrogate with a ratio trains on stale rollouts and never sees it."""
    algorithm, loop = recipe.algorithm, recipe.loop
    return (
        loop.max_staleness > 0
        and loop.updates_per_batch == 1
        and algorithm.surrogate is not Surrogate.REINFORCE
        and algorithm.ratio_to is RatioTo.OLD
        and recipe.mismatch.correction is MismatchCorrection.NONE
    )


LOOP_RULES: tuple[Callable[[Recipe], None], ...] = (
    check_group_size,
    check_updates,
    check_surrogate_ratio,
    check_aggregation,
    check_overlong,
    check_dynamic_sampling,
    check_kl_control,
    check_reference,
    check_keep_best,
)
LOOP_WARNINGS: tuple[Callable[[Recipe], Iterator[str]], ...] = (
    warn_stale_reward,
    warn_stale_gradient,
    warn_keep_best,
)
