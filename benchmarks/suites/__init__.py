"""The benchmarks by name. A module is imported when its benchmark is asked for: the command line answers at once."""

from importlib import import_module

from benchmarks.harness.spec import Benchmark

_HOMES = {
    "loss_logits": "benchmarks.suites.logits:loss_logits",
    "loss_logits_eager": "benchmarks.suites.logits:loss_logits_eager",
    "tp_loss": "benchmarks.suites.logits:tp_loss",
    "head_hidden": "benchmarks.suites.head:head_hidden",
    "kl_matrix": "benchmarks.suites.kl_matrix:kl_matrix",
    "reshard": "benchmarks.suites.reshard:reshard",
    "reshard_match": "benchmarks.suites.reshard:reshard_match",
    "step_replay": "benchmarks.suites.step:step_replay",
    "step_full": "benchmarks.suites.step:step_full",
    "g_logp_entropy": "benchmarks.suites.gpu:g_logp_entropy",
    "g_loss_fwd_bwd": "benchmarks.suites.gpu:g_loss_fwd_bwd",
    "g_head": "benchmarks.suites.gpu:g_head",
    "g_refit_local": "benchmarks.suites.reshard:g_refit_local",
    "g_step": "benchmarks.suites.gpu_step:g_step",
    "g_train_mfu": "benchmarks.suites.gpu_step:g_train_mfu",
    "g_fp8": "benchmarks.suites.gpu_step:g_fp8",
    "g_mismatch": "benchmarks.suites.gpu_step:g_mismatch",
}
CPU_NAMES = (
    "loss_logits",
    "loss_logits_eager",
    "head_hidden",
    "tp_loss",
    "kl_matrix",
    "reshard",
    "reshard_match",
    "step_replay",
    "step_full",
)
GPU_NAMES = (
    "g_logp_entropy",
    "g_loss_fwd_bwd",
    "g_head",
    "g_refit_local",
    "g_step",
    "g_train_mfu",
    "g_fp8",
    "g_mismatch",
)


def benchmark(name: str) -> Benchmark:
    """The benchmark of this name.

    Raises:
        KeyError: there is none.
    """
    module, _, function = _HOMES[name].partition(":")
    return getattr(import_module(module), function)()
