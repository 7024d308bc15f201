"""The sections algorithm and mismatch of a recipe: the policy gradient of the task reward."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from megatron_klrl.config.fields import Count, NonNegativeNumber, Positive, PositiveNumber, Section, Share


class Advantage(StrEnum):
    """How task rewards become advantages."""

    REINFORCE = "reinforce"
    RLOO = "rloo"
    GRPO = "grpo"
    DR_GRPO = "dr_grpo"
    REINFORCE_PP = "reinforce_pp"
    REINFORCE_PP_BASELINE = "reinforce_pp_baseline"


class Surrogate(StrEnum):
    """Objective whose gradient is the policy gradient."""

    REINFORCE = "reinforce"
    PPO_CLIP = "ppo_clip"
    GSPO = "gspo"
    CISPO = "cispo"


class RatioTo(StrEnum):
    """Policy that a surrogate's ratio is to."""

    OLD = "old"
    ROLLOUT = "rollout"


class Overlong(StrEnum):
    """What becomes of responses that were cut off, or nearly."""

    KEEP = "keep"
    PENALTY = "penalty"
    MASK = "mask"


class Aggregation(StrEnum):
    """How per-token terms of the task-reward loss become one number; the KL term never passes through it."""

    SEQUENCE_SUM = "sequence_sum"
    SEQUENCE_MEAN = "sequence_mean"
    TOKEN_MEAN = "token_mean"
    CONSTANT_NORM = "constant_norm"


class MismatchCorrection(StrEnum):
    """What is done about the gap between the trainer's and the engine's log-probabilities."""

    NONE = "none"
    TOKEN_TRUNCATE = "token_truncate"
    TOKEN_MASK = "token_mask"
    PREFIX_TRUNCATE = "prefix_truncate"
    SEQUENCE_TRUNCATE = "sequence_truncate"
    SEQUENCE_MASK = "sequence_mask"


class AlgorithmSection(Section):
    """The policy gradient of the task reward; the KL term is the section kl."""

    advantage: Advantage = Advantage.RLOO
    """Baseline of the reward: reinforce has none; rloo subtracts the mean of the other completions of the same prompt;
    grpo the mean of all and divides by their deviation; dr_grpo the mean of all; reinforce_pp subtracts the mean of the
    batch and divides by its deviation; reinforce_pp_baseline the mean of all completions of the prompt, and divides by
    the batch's deviation. The KL passes through none of them."""
    surrogate: Surrogate = Surrogate.REINFORCE
    """Objective that is differentiated: reinforce is advantage times log-probability; ppo_clip clips the ratio to the
    policy before the update; gspo the ratio of whole responses; cispo only its weight. The KL passes through none."""
    ratio_to: RatioTo = RatioTo.OLD
    """Policy that the ratio of ppo_clip, gspo and cispo is to: old, the trainer's recompute at the start of the step;
    rollout, the one that sampled, so that one ratio holds drift, staleness and the engine's rounding."""
    clip_low: Share | None = None
    """Distance of the ratio's lower bound from 1; none: ppo_clip 0.2, gspo 0.0003, cispo 1 (no bound)."""
    clip_high: PositiveNumber | None = None
    """Distance of the ratio's upper bound from 1; none: ppo_clip 0.2, gspo 0.0004, cispo 4."""
    dual_clip: Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)] | None = None
    """Largest ratio of a token with a negative advantage, above 1; ppo_clip alone. none: no bound."""
    aggregation: Aggregation = Aggregation.SEQUENCE_SUM
    """sequence_sum is the gradient of the expected reward; the means weigh tokens by response length; constant_norm is
    sequence_sum over norm_length. The entropy bonus passes through it, the KL does not."""
    norm_length: Positive | None = None
    """Divisor of constant_norm, in tokens; none: generation.max_tokens."""
    entropy_bonus: NonNegativeNumber = 0.0
    """Reward per nat of the policy's entropy at a response token, weighed by aggregation; 0 turns it off. Another
    objective than the stated one: it pulls towards the uniform policy, the KL towards the reference."""

    dynamic_sampling_rounds: Count = 0
    """Most further rounds of prompts in a step, each to replace the groups whose rewards are all equal; what is still
    missing after them is filled with such groups. 0: groups are taken as they come. Another distribution of prompts
    than the data's, for reward and KL alike."""
    overlong: Overlong = Overlong.KEEP
    """Responses near generation.max_tokens: keep leaves them as they are; penalty takes up to 1 from the reward over
    the last overlong_buffer tokens; mask leaves cut-off responses out of the policy gradient (the KL counts them)."""
    overlong_buffer: Positive | None = None
    """Tokens before generation.max_tokens over which the penalty grows from 0 to 1; overlong penalty needs it."""


class MismatchSection(Section):
    """Weights of the policy gradient for the gap between the policy that trains and the one that sampled, by rounding
    of the engine or by staleness; the KL has its own, kl.correction.
    """

    correction: MismatchCorrection = MismatchCorrection.NONE
    """With w = probability under the trainer over probability under the engine, of a token, of a response up to a token
    (prefix) or of a whole response: truncate takes the smaller of w and high, mask takes w inside [low, high] and 0
    outside."""
    low: NonNegativeNumber | None = None
    """Smallest weight that is not masked; none: token_mask 0.5, sequence_mask 0."""
    high: PositiveNumber | None = None
    """Largest weight; none: 5 for token_mask, 2 for the others."""
