"""The recipe: every setting of a run, its meaning, its unit and its default, in one typed tree.

Defaults stand here and nowhere else. Numbers are strict: text or ``true`` where a number belongs is an error.
Paths are taken relative to the directory the command is started in.
"""

from enum import StrEnum
from typing import Any

from pydantic import Field, model_validator

from megatron_klrl.config.algorithm import AlgorithmSection, MismatchSection
from megatron_klrl.config.checkpoint import CheckpointSection
from megatron_klrl.config.data import DataSection
from megatron_klrl.config.fields import (
    Count,
    Flag,
    Momentum,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Section,
    Share,
    Text,
)
from megatron_klrl.config.regularisation import KLControlSection, ReferenceSection
from megatron_klrl.kl.config import KLConfig

DEFAULT_MICRO_BATCH_SIZE = 16


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


class Quantization(StrEnum):
    """Number format of the engine's weights, where it is not the trainer's."""

    NONE = "none"
    FP8 = "fp8"


class Engine(StrEnum):
    """What generates completions."""

    VLLM = "vllm"


class Recompute(StrEnum):
    """Which activations are computed again in the backward instead of kept."""

    NONE = "none"
    ATTENTION = "attention"
    FULL = "full"


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
    virtual_pipeline: Positive = 1
    """Chunks of layers that each pipeline stage holds; more than 1 is the interleaved schedule: less waiting, more
    messages. Needs pipeline > 1."""
    context: Positive = 1
    """Ranks each sequence is split over."""
    expert: Positive = 1
    """Ranks the experts of each layer are split over; they lie inside data and context parallelism."""
    sequence: Flag = False
    """Split activations along the sequence inside a tensor group; saves memory, needs tensor > 1."""

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


class MemorySection(Section):
    """What is traded for memory; none of it changes a result."""

    recompute: Recompute = Recompute.NONE
    """Activations computed again in the backward: none; attention, the core attention of each layer; full, whole
    layers, for a third more work."""
    offload_while_generating: Flag = False
    """Optimiser state is in host memory, and gradient buffers are freed, from each update to the next. Needs CUDA."""


class HeadKernels(StrEnum):
    """How the passes over logits run."""

    AUTO = "auto"
    EAGER = "eager"
    COMPILED = "compiled"


class HeadSection(Section):
    """The output layer and the loss; none of it changes a result beyond rounding."""

    chunk_tokens: Positive | None = 1024
    """Response tokens of a microbatch whose logits exist at the same time, in scoring and in training; none: all. A
    loss that needs whole sequences (gspo, sequence and prefix corrections) takes at least one sequence at a time."""
    kernels: HeadKernels = HeadKernels.AUTO
    """auto compiles the passes over logits where a chunk is large enough to pay for it (5 to 20 seconds, once), which
    needs a C++ compiler on CPU and Triton on GPUs; eager never compiles, compiled always."""


class PrecisionSection(Section):
    """Number formats of the trainer."""

    dtype: Dtype = Dtype.BF16
    """Weights and activations; gradients and optimiser state are fp32 in either case."""
    fp8: Fp8 = Fp8.NONE
    """Scaling of 8-bit matrix products, in training, scoring and reference alike: tensorwise, by the largest number of
    each tensor; delayed, by that of earlier passes; blockwise, of each 128 x 128 block (Hopper and later); mxfp8, of
    each 32 numbers (Blackwell). Needs a GPU, Transformer Engine and dtype bf16."""
    first_last_bf16: Flag = False
    """The first and the last layer take their products in bf16 all the same; not with delayed."""
    fp8_primary_weights: Flag = False
    """Weights that are multiplied in 8 bits are kept in 8 bits alone, half the memory of bf16 beside 8-bit copies; what
    is sampled from, exported and saved is the rounded policy, the optimiser keeps the exact weights. With tensorwise
    and blockwise."""


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
    top_p: Share = 1.0
    """Training rollouts draw from the most probable tokens that reach this probability together; below 1 needs
    kl.allow_biased, for the samples are then not the policy's."""
    top_k: Positive | None = None
    """Training rollouts draw from this many most probable tokens, on the same condition; none: from all."""
    max_tokens: Positive
    """Longest response, in tokens, end-of-sequence included."""
    max_model_len: Positive | None = None
    """Longest prompt plus response the engine reserves memory for, in tokens; none: the model's own limit."""
    kv_cache_mib: Positive | None = None
    """Memory of the engine's key-value cache, in MiB per rank; none: the engine decides."""
    max_num_seqs: Positive = 128
    """Sequences one engine decodes at the same time."""
    timeout_s: PositiveNumber = 600.0
    """Longest time in sampling without a new token, in seconds; after it the run fails and says where it stood."""
    verify_every: Count = 100
    """Weight updates from one verification to the next: checksums of all tensors and log-probabilities of a few tokens,
    trainer against engine. The first update is always verified; 0: it alone."""
    quantization: Quantization = Quantization.NONE
    """fp8: the engine quantises each weight to 8 bits as it arrives, and samples from that model, which is not the one
    that is trained: needs a correction (mismatch). Needs a GPU with FP8."""
    sleep: Flag = False
    """The engine gives its weights and cache back while the trainer works. Needs CUDA."""


class WeightTransport(StrEnum):
    """How weights move from the trainer's ranks to the engines'."""

    AUTO = "auto"
    IN_PROCESS = "in_process"
    SHARED_MEMORY = "shared_memory"
    CUDA_IPC = "cuda_ipc"
    BROADCAST = "broadcast"
    DISK = "disk"


class WeightSyncSection(Section):
    """How weights reach the engines after an update."""

    transport: WeightTransport = WeightTransport.AUTO
    """auto takes the quickest that works in the layout: in_process where each rank holds the model, shared_memory
    (cuda_ipc on GPUs) on one machine, broadcast between machines; disk writes safetensors to folder."""
    bucket_mib: Positive = 256
    """Most MiB of whole tensors that travel together; a rank needs two buckets beside its weights."""
    folder: Text | None = None
    """Folder that all ranks share, for transport disk."""


class LoopSection(Section):
    """Length of the run and size of a step."""

    steps: Positive
    """Train steps: each generates, scores and updates."""
    prompts_per_step: Positive
    """Prompts of one step, over all ranks."""
    group_size: Positive
    """Completions of each prompt."""
    updates_per_batch: Positive = 1
    """Optimiser steps of a train step, each on its own share of the batch's prompts; the engine gets the weights after
    the last. All but the first train on rollouts of an older policy."""
    max_staleness: Count = 0
    """Weight versions by which rollouts are older than the policy that trains on them: sampling runs this many steps
    ahead, as it does in asynchronous training. 0 samples every step from the current policy."""
    seed: Count = 0
    """Seed of prompts and sampling; the same seed and layout repeat the run."""
    micro_batch_size: Positive | None = None
    """Sequences of one forward pass on one rank, padded to the longest; 16 if tokens_per_microbatch is not given
    either. Changes memory and speed, not the result."""
    tokens_per_microbatch: Positive | None = None
    """Packs sequences one after the other without padding, up to this many tokens in one forward pass on one rank; in
    place of micro_batch_size."""
    eval_every: Count = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    split_gradient_every: Count = 0
    """Steps between measurements of the KL term's own gradient (grad/kl_norm, grad/policy_kl_cosine), each of which
    costs a second forward and backward; 0: never."""
    checkpoint_every: Count = 0
    """Steps between checkpoints; 0: only at the end."""
    step_timeout_s: PositiveNumber = 3600.0
    """Longest time of a step, of an evaluation and of a checkpoint, each for itself, in seconds: after it every rank
    writes its stacks to stacks/ and the run ends. The timeout of collectives is a minute longer."""

    @model_validator(mode="before")
    @classmethod
    def _padded_by_default(cls, values: Any) -> Any:
        keys = ("micro_batch_size", "tokens_per_microbatch")
        if isinstance(values, dict) and all(values.get(key) is None for key in keys):
            return {**values, "micro_batch_size": DEFAULT_MICRO_BATCH_SIZE}
        return values


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
    memory: MemorySection = Field(default_factory=MemorySection)
    """What is traded for memory."""
    head: HeadSection = Field(default_factory=HeadSection)
    """The output layer and the loss."""
    kl: KLConfig = Field(default_factory=KLConfig)
    """The KL regularisation."""
    kl_control: KLControlSection = Field(default_factory=KLControlSection)
    """How beta changes over the run."""
    reference: ReferenceSection = Field(default_factory=ReferenceSection)
    """What the policy is held to."""
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    """The policy gradient of the task reward."""
    mismatch: MismatchSection = Field(default_factory=MismatchSection)
    """Correction for the gap between trainer and engine."""
    optimizer: OptimizerSection
    """AdamW."""
    generation: GenerationSection
    """Sampling of completions."""
    weight_sync: WeightSyncSection = Field(default_factory=WeightSyncSection)
    """How weights reach the engines."""
    loop: LoopSection
    """Length of the run and size of a step."""
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    """Which checkpoints stay."""
    data: DataSection
    """Prompts."""
    launch: LaunchSection = Field(default_factory=LaunchSection)
    """Processes on this machine."""
    optimum: OptimumSection = Field(default_factory=OptimumSection)
    """Closed-form optimum report."""

    @property
    def has_reference(self) -> bool:
        """Whether the trainer holds a reference beside the policy."""
        return self.kl.beta > 0 or self.reference.measure
