"""The recipe: every setting of a run, its meaning, its unit and its default, in one typed tree.

Defaults stand here and nowhere else. Numbers are strict: text or ``true`` where a number belongs is an error.
Paths are taken relative to the directory the command is started in.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from megatron_klrl.kl.config import KLConfig

Integer = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Flag = Annotated[bool, Field(strict=True)]
PositiveNumber = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegativeNumber = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Momentum = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, StringConstraints(min_length=1)]
SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Dtype(StrEnum):
    """Number format of the trained weights and activations."""

    FP32 = "fp32"
    BF16 = "bf16"


class Fp8(StrEnum):
    """Scaling recipe of 8-bit matrix products."""

    NONE = "none"
    TENSORWISE = "tensorwise"
    DELAYED = "delayed"
    BLOCKWISE = "blockwise"
    MXFP8 = "mxfp8"


class Advantage(StrEnum):
    """How task rewards become advantages."""

    RLOO = "rloo"
    GRPO = "grpo"
    DR_GRPO = "dr_grpo"


class Surrogate(StrEnum):
    """Objective whose gradient is the policy gradient."""

    REINFORCE = "reinforce"


class Aggregation(StrEnum):
    """How per-token terms of the task-reward loss become one number; the KL term never passes through it."""

    SEQUENCE_SUM = "sequence_sum"
    SEQUENCE_MEAN = "sequence_mean"
    TOKEN_MEAN = "token_mean"


class Engine(StrEnum):
    """What generates completions."""

    VLLM = "vllm"


class ArithmeticKind(StrEnum):
    """Family of arithmetic prompts."""

    CHAIN = "chain"
    OP = "op"
    REV = "rev"


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSection(Section):
    """Which model is trained; its weights at the start are also the frozen reference."""

    path: Text
    """Hugging Face folder, or embedded:<name> for a model that ships with the package."""


class ParallelSection(Section):
    """How the trainer is split over ranks; data parallelism is what is left of the world."""

    tensor: Positive = 1
    """Ranks each weight matrix is split over."""
    pipeline: Positive = 1
    """Stages the layers are split into."""
    context: Positive = 1
    """Ranks each sequence is split over."""
    expert: Positive = 1
    """Ranks the experts are split over."""
    sequence: Flag = False
    """Split activations along the sequence inside a tensor group; saves memory, needs tensor > 1."""

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


class PrecisionSection(Section):
    """Number formats of the trainer."""

    dtype: Dtype = Dtype.BF16
    """Weights and activations; gradients and optimiser state are fp32 in either case."""
    fp8: Fp8 = Fp8.NONE
    """8-bit matrix products."""


class AlgorithmSection(Section):
    """The policy gradient of the task reward; the KL term is the section kl."""

    advantage: Advantage = Advantage.RLOO
    """Baseline of the reward: rloo subtracts the mean of the other completions of the same prompt; grpo the mean of all
    and divides by their deviation; dr_grpo the mean of all. The KL passes through none of them."""
    surrogate: Surrogate = Surrogate.REINFORCE
    """Objective that is differentiated: reinforce is advantage times log-probability."""
    aggregation: Aggregation = Aggregation.SEQUENCE_SUM
    """sequence_sum is the gradient of the expected reward; the means weigh tokens by response length."""


class OptimizerSection(Section):
    """AdamW."""

    lr: PositiveNumber
    """Learning rate after warm-up."""
    adam_betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """Decay of the first and of the second moment, per step."""
    adam_eps: PositiveNumber = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeNumber = 0.0
    """Decoupled weight decay, per step and unit of learning rate."""
    clip_grad: NonNegativeNumber = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: Count = 0
    """Optimiser steps over which the learning rate rises linearly from 0."""


class GenerationSection(Section):
    """How completions are sampled."""

    engine: Engine = Engine.VLLM
    """Generation engine."""
    tensor: Positive = 1
    """Ranks one engine's weights are split over."""
    temperature: PositiveNumber = 1.0
    """Sampling temperature of training rollouts."""
    max_tokens: Positive
    """Longest response, in tokens, end-of-sequence included."""
    max_model_len: Positive | None = None
    """Longest prompt plus response the engine reserves memory for, in tokens; none: the model's own limit."""
    kv_cache_mib: Positive | None = None
    """Memory of the engine's key-value cache, in MiB per rank; none: the engine decides."""
    max_num_seqs: Positive = 128
    """Sequences one engine decodes at the same time."""


class LoopSection(Section):
    """Length of the run and size of a step."""

    steps: Positive
    """Train steps: each generates, scores and updates."""
    prompts_per_step: Positive
    """Prompts of one step, over all ranks."""
    group_size: Positive
    """Completions of each prompt."""
    updates_per_batch: Positive = 1
    """Optimiser steps made from one batch of rollouts."""
    max_staleness: Count = 0
    """Weight versions a rollout may be behind the policy that trains on it."""
    seed: Count = 0
    """Seed of prompts and sampling; the same seed and layout repeat the run."""
    micro_batch_size: Positive = 16
    """Sequences of one forward pass on one rank; changes memory and speed, not the result."""
    eval_every: Count = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    split_gradient_every: Count = 0
    """Steps between measurements of the KL term's own gradient (grad/kl_norm, grad/policy_kl_cosine), each of which
    costs a second forward and backward; 0: never."""
    checkpoint_every: Count = 0
    """Steps between checkpoints; 0: only at the end."""


def _rising(terms: tuple[int, int]) -> tuple[int, int]:
    if terms[0] > terms[1]:
        raise ValueError(f"the range [{terms[0]}, {terms[1]}] is empty; write the smaller number first")
    return terms


Terms = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=1, le=64)], Annotated[int, Field(strict=True, ge=1, le=64)]],
    AfterValidator(_rising),
]


class ArithmeticSource(Section):
    """Generated arithmetic prompts with an exact verifier."""

    task: Literal["arithmetic"]
    """Chooses generated arithmetic."""
    kind: ArithmeticKind
    """chain: additions and subtractions; op: maxima and minima; rev: reversal of digits."""
    terms: Terms
    """Fewest and most terms (digits for rev) of a prompt, both included: [lo, hi]."""


class JsonlSource(Section):
    """Prompts from a file, one JSON object {"prompt": ..., "answer": ...} a line."""

    task: Literal["jsonl"]
    """Chooses a file of prompts."""
    path: Text
    """The .jsonl file."""


class EvalSampling(Section):
    """What an evaluation set adds to a source."""

    prompts: Positive
    """Number of prompts."""
    samples: Positive = 1
    """Completions per prompt."""
    temperature: NonNegativeNumber = 1.0
    """Sampling temperature; 0 is greedy."""


class ArithmeticEval(EvalSampling, ArithmeticSource):
    """Evaluation on generated arithmetic."""


class JsonlEval(EvalSampling, JsonlSource):
    """Evaluation on the first prompts of a file."""


Source = Annotated[ArithmeticSource | JsonlSource, Field(discriminator="task")]
EvalSet = Annotated[ArithmeticEval | JsonlEval, Field(discriminator="task")]


class DataSection(Section):
    """Prompts of training and of evaluation."""

    train: Source
    """Training prompts: task arithmetic or jsonl and that task's keys."""
    eval: dict[SetName, EvalSet] = Field(default_factory=dict)
    """Evaluation sets by name; the name is part of the metric eval/<name>/accuracy."""


class LaunchSection(Section):
    """Processes on this machine, when not started by torchrun."""

    ranks: Positive | None = None
    """Processes to start; none: all visible GPUs, on CPU the fewest that hold one model copy."""


class OptimumSection(Section):
    """Samples of the reference from which the closed-form optimum of the objective is reported."""

    prompts: Count = 0
    """Training prompts to sample; 0 turns the report off."""
    samples: Positive = 32
    """Completions of each prompt."""


class Recipe(Section):
    """All settings of a run."""

    preset: Text | None = None
    """What another trainer or the paper does, under the keys written here: klrl config presets lists them."""
    model: ModelSection
    """Which model is trained."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """How the trainer is split over ranks."""
    precision: PrecisionSection = Field(default_factory=PrecisionSection)
    """Number formats."""
    kl: KLConfig = Field(default_factory=KLConfig)
    """The KL regularisation."""
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    """The policy gradient of the task reward."""
    optimizer: OptimizerSection
    """AdamW."""
    generation: GenerationSection
    """Sampling of completions."""
    loop: LoopSection
    """Length of the run and size of a step."""
    data: DataSection
    """Prompts."""
    launch: LaunchSection = Field(default_factory=LaunchSection)
    """Processes on this machine."""
    optimum: OptimumSection = Field(default_factory=OptimumSection)
    """Closed-form optimum report."""
