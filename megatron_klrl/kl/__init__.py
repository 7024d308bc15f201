"""The mathematics of the KL term: estimators, placements, surrogate, catalogue, exact oracle, audit.

Importing this package loads no torch; the names that need it are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from megatron_klrl.kl.catalogue import CatalogueEntry, catalogue, render_catalogue
from megatron_klrl.kl.config import Correction, Credit, Estimator, KLConfig, Objective, Placement
from megatron_klrl.kl.expectation import Verdict
from megatron_klrl.kl.refusal import Refusal, refusal

if TYPE_CHECKING:
    from megatron_klrl.kl.audit import AuditReport, run_audit
    from megatron_klrl.kl.estimators import absolute, k1, k2, k3
    from megatron_klrl.kl.surrogate import kl_surrogate, loss_terms, reward_advantages, reward_coefficients

__all__ = [
    "AuditReport",
    "CatalogueEntry",
    "Correction",
    "Credit",
    "Estimator",
    "KLConfig",
    "Objective",
    "Placement",
    "Refusal",
    "Verdict",
    "absolute",
    "catalogue",
    "k1",
    "k2",
    "k3",
    "kl_surrogate",
    "loss_terms",
    "refusal",
    "render_catalogue",
    "reward_advantages",
    "reward_coefficients",
    "run_audit",
]

_HOMES_WITH_TORCH = {
    "AuditReport": "audit",
    "run_audit": "audit",
    "absolute": "estimators",
    "k1": "estimators",
    "k2": "estimators",
    "k3": "estimators",
    "kl_surrogate": "surrogate",
    "loss_terms": "surrogate",
    "reward_advantages": "surrogate",
    "reward_coefficients": "surrogate",
}


def __getattr__(name: str) -> object:
    home = _HOMES_WITH_TORCH.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
