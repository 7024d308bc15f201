"""OpenRLHF: its KL estimate, loaded from its file: the package around it imports flash-attn, which needs CUDA."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.parity import Answer
from benchmarks.workloads.kl_terms import KLTerms
from megatron_klrl.kl.config import Placement

Step = Callable[[], Answer]


def kl_term(work: KLTerms) -> Step:
    """``compute_approx_kl`` of one token: differentiated in the loss, or detached, times the log-probability."""
    compute_approx_kl = _module("models/utils.py").compute_approx_kl
    kind = str(work.config.estimator)

    def step() -> Answer:
        with torch.set_grad_enabled(work.config.placement is Placement.LOSS):
            estimate = compute_approx_kl(work.logprobs, work.ref_logprobs, kl_estimator=kind)
        term = estimate if work.config.placement is Placement.LOSS else estimate * work.logprobs
        return work.answer(work.config.beta * (term * work.mask).sum(-1).mean())

    return step


def _module(name: str) -> Any:
    package = importlib.util.find_spec("openrlhf")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("no module openrlhf", name="openrlhf")
    spec = importlib.util.spec_from_file_location("openrlhf_file", Path(package.submodule_search_locations[0]) / name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"openrlhf has no {name}", name="openrlhf")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
