"""Every KL configuration of the catalogue, forward and backward on log-probabilities, and peers where they have one."""

from benchmarks.harness.spec import Benchmark, Case, Contestant, Goal, Tolerance
from megatron_klrl.kl.catalogue import CatalogueEntry, catalogue
from megatron_klrl.kl.config import Correction, Credit, Estimator, Placement

OURS = Contestant(name="kl_surrogate", factory="benchmarks.peers.ours_kl:kl_term", ours=True, group="KL term")
VERL = Contestant(
    name="verl kl_penalty", factory="benchmarks.peers.verl:kl_term", group="KL term", requires=("verl",),
    note="one token's KL; clamps where ours checks that nothing is NaN or overflows",
)  # fmt: skip
OPENRLHF = Contestant(
    name="OpenRLHF compute_approx_kl", factory="benchmarks.peers.openrlhf:kl_term", group="KL term",
    requires=("openrlhf", "deepspeed"), note="has no abs; clamps where ours checks that nothing is NaN or overflows",
)  # fmt: skip
# Sums of up to 1,024 products of ratios in float32.
TOLERANCE = Tolerance(loss=1e-4, values=1e-4, gradient=1e-4)


def kl_matrix() -> Benchmark:
    """What a configuration costs, and that none costs a pass over the vocabulary."""
    return Benchmark(
        name="kl_matrix",
        summary="every KL configuration, forward and backward on [64, 1024] log-probabilities on CPU",
        cases=tuple(_case(entry, 64, 1024) for entry in catalogue()),
        quick_cases=tuple(_case(entry, 4, 32) for entry in catalogue() if _in_quick(entry)),
        goals=(
            Goal(text="the slowest at most 1.3 times the fastest", ours=OURS.name, measure="spread", at_most=1.3),
            *(
                Goal(
                    text=f"never slower than {peer.name}",
                    ours=OURS.name, measure="times_faster", against=peer.name, at_least=1.0,
                )
                for peer in (VERL, OPENRLHF)
            ),
        ),
        calls=20,
        shared_processes=True,
        layout="matrix",
    )  # fmt: skip


def _in_quick(entry: CatalogueEntry) -> bool:
    """One row of every kind of correction, and all with peers."""
    return entry.config.estimator is Estimator.K3 or len(_contestants(entry)) > 1


def _contestants(entry: CatalogueEntry) -> tuple[Contestant, ...]:
    """Peers compute the KL of a token, differentiated or in its reward; credit and corrections are ours alone."""
    config = entry.config
    own_token = config.credit is Credit.TOKEN and config.correction is Correction.NONE
    if not own_token or config.placement is Placement.BOTH or config.estimator is Estimator.EXACT:
        return (OURS,)
    return (OURS, VERL) if config.estimator is Estimator.ABS else (OURS, VERL, OPENRLHF)


def _case(entry: CatalogueEntry, batch: int, tokens: int) -> Case:
    return Case(
        name=entry.name,
        workload="benchmarks.workloads.kl_terms:KLTerms",
        parameters={"batch": batch, "tokens": tokens, "configuration": entry.name},
        tolerance=TOLERANCE,
        contestants=_contestants(entry),
    )
