"""Every metric: its name in metrics.jsonl and in TensorBoard, its unit, and what it says. One place for both."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: also its TensorBoard tag; ``<name>`` stands for an evaluation set.
        unit: of the value.
        meaning: definition; "sequence" means the sum over response tokens, averaged over sequences.
    """

    name: str
    unit: str
    meaning: str


_PHASE_MEMORY = "peak of rank 0's device memory on CUDA; on CPU the resident memory of the process when the phase ends"

METRICS = (
    Metric("reward/mean", "reward", "mean task reward of the step's completions, KL not included"),
    Metric("reward/std", "reward", "standard deviation of the task reward over the step's completions"),
    Metric(
        "reward/length_penalty", "reward", "mean of what algorithm.overlong=penalty takes from the reward, at most 0"
    ),
    Metric(
        "reward/equal_groups", "fraction", "prompts whose completions all have the same reward: no baseline sees them"
    ),
    Metric("reward/verifier_timeouts", "responses", "verifications that took too long, reward 0; in this step"),
    Metric(
        "reward/verifier_errors", "responses", "verifications that failed or gave no finite number, reward 0; likewise"
    ),
    Metric("response/length_mean", "tokens", "mean response length, end-of-sequence token included"),
    Metric("response/truncated_fraction", "fraction", "responses cut off at generation.max_tokens"),
    Metric("response/sampling_rounds", "1", "further rounds of prompts that algorithm.dynamic_sampling_rounds took"),
    Metric("kl/k1", "nats per sequence", "k1 estimate of KL(policy || reference); unbiased, can be negative"),
    Metric("kl/k3", "nats per sequence", "k3 estimate of KL(policy || reference); unbiased, never negative"),
    Metric(
        "kl/exact", "nats per sequence", "full-vocabulary KL at each visited position, summed: the least noisy estimate"
    ),
    Metric("kl/p95", "nats per token", "95th percentile over response tokens of the full-vocabulary KL"),
    Metric("kl/max", "nats per token", "maximum over response tokens of the full-vocabulary KL"),
    Metric("kl/clamp_fraction", "fraction", "response tokens beyond kl.log_ratio_clamp; only where one is set"),
    Metric(
        "kl/ratio_ess",
        "fraction",
        "effective sample size of the ratios of kl.correction, (sum w)^2 / (n sum w^2), n tokens or sequences; only "
        "with a correction",
    ),
    Metric("kl/ratio_log_max", "nats", "largest of their logarithms, before kl.ratio_max"),
    Metric("kl/ratio_truncated_fraction", "fraction", "of them above kl.ratio_max"),
    Metric("kl/reference_step", "steps", "step after which the reference was last changed; 0: it is as it was loaded"),
    Metric("kl/beta", "reward per nat", "weight of the KL in the objective"),
    Metric("objective/mean", "reward", "reward/mean - kl/beta * kl/exact: the objective that is maximised"),
    Metric("policy/entropy", "nats per token", "mean entropy of the policy over response tokens"),
    Metric("policy/clip_fraction", "fraction", "response tokens whose policy gradient a clip removes (cispo: bounds)"),
    Metric("policy/loss", "reward", "value of the minimised loss; its gradient matters, not its level"),
    Metric("policy/lr", "1", "learning rate of the step"),
    Metric("grad/norm", "1", "L2 norm of the whole gradient before clipping"),
    Metric("grad/kl_norm", "1", "L2 norm of the KL term's gradient, beta included; only where it was measured apart"),
    Metric("grad/policy_kl_cosine", "1", "cosine of the angle between policy gradient and KL gradient; likewise"),
    Metric(
        "mismatch/logprob_abs_mean", "nats per token", "mean |old_logprobs - rollout_logprobs|: trainer against engine"
    ),
    Metric(
        "mismatch/verified_abs_max",
        "nats per token",
        "largest |trainer - engine| log-probability of a few tokens drawn right after a weight update; only at updates "
        "that were verified",
    ),
    Metric("mismatch/kl", "nats per token", "k3 estimate of KL(engine || trainer) on the engine's samples"),
    Metric(
        "mismatch/prob_ratio_mean", "1", "mean of trainer probability over engine probability of the sampled tokens"
    ),
    Metric(
        "mismatch/truncated_fraction", "fraction", "weights above mismatch.high; only under a correction that truncates"
    ),
    Metric(
        "mismatch/masked_fraction",
        "fraction",
        "weights outside [mismatch.low, mismatch.high], taken as 0; only under a correction that masks",
    ),
    Metric(
        "mismatch/ess",
        "fraction",
        "effective sample size of the corrected weights, (sum w)^2 / (n sum w^2), n tokens or sequences; only with one",
    ),
    Metric("staleness/mean", "versions", "mean of weight version trained minus weight version sampled"),
    Metric("staleness/max", "versions", "its maximum"),
    Metric("staleness/dropped", "rollouts", "dropped because they would have been older than loop.max_staleness"),
    Metric("time/generate_s", "s", "sampling, verification included"),
    Metric("time/score_s", "s", "forward passes of policy and reference"),
    Metric("time/train_s", "s", "forward, backward and optimizer step"),
    Metric("time/sync_s", "s", "pushing the weights into the engine"),
    Metric("time/verify_s", "s", "part of time/sync_s that a verification took; only at updates that were verified"),
    Metric("time/step_s", "s", "the whole step, evaluation and checkpoints excluded"),
    Metric("throughput/tokens_per_s", "tokens/s", "response tokens of the step over time/step_s"),
    Metric("memory/generate_gib", "GiB", f"while sampling: {_PHASE_MEMORY}"),
    Metric("memory/score_gib", "GiB", "likewise while scoring, the reference included"),
    Metric("memory/train_gib", "GiB", "likewise in forward, backward and optimizer step"),
    Metric("memory/sync_gib", "GiB", "likewise while weights are pushed, verification included"),
    Metric("memory/peak_gib", "GiB", "peak of rank 0: device memory on CUDA, resident memory of the process on CPU"),
    Metric("eval/<name>/accuracy", "fraction", "mean reward of the current policy on an evaluation set"),
    Metric("eval/<name>/stderr", "fraction", "standard error of that mean, prompts taken as independent"),
)

PANELS = {
    "Is it learning?": {
        "reward of the training samples": ["reward/mean"],
        "evaluation of the current policy": ["eval/.*/accuracy"],
        "responses that could not be verified": ["reward/verifier_.*"],
        "objective E[R] - beta KL": ["objective/mean"],
        "response length, tokens": ["response/length_mean"],
    },
    "Is the KL right?": {
        "KL(policy || reference), nats per sequence": ["kl/k1", "kl/k3", "kl/exact"],
        "beta, reward per nat": ["kl/beta"],
        "effective share of the KL's importance ratios": ["kl/ratio_ess"],
        "per token: 95th percentile and maximum, nats": ["kl/p95", "kl/max"],
        "per token: the KL's 95th percentile over the engine's rounding, nats": ["kl/p95", "mismatch/kl"],
        "entropy, nats per token": ["policy/entropy"],
        "gradient norm: whole and KL part": ["grad/norm", "grad/kl_norm"],
        "cosine of policy gradient and KL gradient": ["grad/policy_kl_cosine"],
    },
    "Is the engine consistent?": {
        "|trainer - engine| log-probability, nats": ["mismatch/logprob_abs_mean"],
        "staleness, versions": ["staleness/mean", "staleness/max"],
    },
    "Where does the time go?": {
        "seconds": ["time/.*_s"],
    },
    "Where does the memory go?": {
        "GiB of rank 0, by phase": ["memory/.*_gib"],
    },
}
"""Question -> chart -> metrics (regular expressions): the page that TensorBoard shows under "Custom scalars"."""

NOT_PLOTTED = ("stderr",)
"""Last parts of names that belong to another metric's value and would only fill the page with charts."""


def known(name: str) -> bool:
    """Whether a logged name is defined here."""
    if name.startswith("eval/"):
        return name.rsplit("/", 1)[-1] in {"accuracy", "stderr"}
    return any(metric.name == name for metric in METRICS)


_PAGE = """# Metrics

Made from `megatron_klrl/metrics/names.py`. The same names stand in `metrics.jsonl` (one object a step) and in
TensorBoard.

| name | unit | meaning |
|---|---|---|
"""


def render_metrics() -> str:
    """The reference page of metrics, docs/reference/metrics.md."""
    escaped = ((metric.name, metric.unit, metric.meaning.replace("|", "\\|")) for metric in METRICS)
    return _PAGE + "".join(f"| `{name}` | {unit} | {meaning} |\n" for name, unit, meaning in escaped)
