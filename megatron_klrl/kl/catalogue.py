"""Every KL configuration that means something: formula, expected gradient, verdict, source, who ships it. No torch.

Formulas and expectations are derived from the axes; only sources and libraries are written down. The audit computes
each expected gradient by enumeration with the production code, and a test holds the two together.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from megatron_klrl.kl.axes import Axes, Correction, Credit, Estimator, Objective, Placement, meaningful_axes
from megatron_klrl.kl.config import KLConfig
from megatron_klrl.kl.expectation import ExpectedGradient, Verdict, expected_gradient, verdict
from megatron_klrl.kl.shipped import SHIPPED, Shipped

_SYMBOLS = {
    Estimator.K1: "k1",
    Estimator.K2: "k2",
    Estimator.K3: "k3",
    Estimator.ABS: "abs",
    Estimator.EXACT: "KL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One configuration.

    Attributes:
        config: the configuration with beta 1, under the sequence objective.
        formula: the surrogate that is minimised, per unit of beta, with its stop-gradients ``sg``.
        expected_on_policy: expectation of its gradient on samples of the policy.
        expected_off_policy: the same on samples of another policy ``mu``.
        verdict_sequence: how it relates to the sequence-level KL.
        verdict_token: how it relates to the token-level KL (prefixes of the samples, or of the policy, held fixed).
        source: where the formula or its analysis is published.
        shipped: trainers that ship it, with the flag.
    """

    config: KLConfig
    formula: str
    expected_on_policy: ExpectedGradient
    expected_off_policy: ExpectedGradient
    verdict_sequence: Verdict
    verdict_token: Verdict
    source: str
    shipped: tuple[Shipped, ...]

    @property
    def name(self) -> str:
        """``placement/estimator/credit/correction``."""
        return self.config.name

    def verdict(self, objective: Objective) -> Verdict:
        """How the configuration relates to ``objective``."""
        return self.verdict_sequence if objective is Objective.SEQUENCE else self.verdict_token

    def expected_gradient(self, *, on_policy: bool) -> ExpectedGradient:
        """Expectation of the gradient under this sampling."""
        return self.expected_on_policy if on_policy else self.expected_off_policy


@cache
def catalogue() -> tuple[CatalogueEntry, ...]:
    """One entry per valid configuration."""
    return tuple(_entry(axes) for axes in meaningful_axes())


def _entry(axes: Axes) -> CatalogueEntry:
    return CatalogueEntry(
        config=KLConfig(
            beta=1.0,
            estimator=axes.estimator,
            placement=axes.placement,
            credit=axes.credit,
            correction=axes.correction,
        ),
        formula=formula(axes),
        expected_on_policy=expected_gradient(axes, on_policy=True),
        expected_off_policy=expected_gradient(axes, on_policy=False),
        verdict_sequence=verdict(axes, Objective.SEQUENCE),
        verdict_token=verdict(axes, Objective.TOKEN),
        source=_source(axes),
        shipped=SHIPPED.get(axes.name, ()),
    )


def formula(axes: Axes) -> str:
    """The minimised surrogate of one sequence, per unit of beta, in the symbols that the catalogue page defines."""
    halves = []
    if axes.placement is not Placement.LOSS:
        halves.append(_reward_formula(axes))
    if axes.placement is not Placement.REWARD:
        halves.append(_loss_formula(axes))
    return " + ".join(halves)


def _reward_formula(axes: Axes) -> str:
    index = "t" if axes.credit is Credit.TOKEN else "u"
    term = f"{_SYMBOLS[axes.estimator]}_{index}"
    if axes.correction is Correction.PREFIX:
        term = f"{_prefix_ratio(axes.estimator, index)} {term}"
    later = "u>t" if axes.estimator is Estimator.EXACT else "u>=t"
    credited = {
        Credit.SEQUENCE: f"sum_u {term}",
        Credit.TO_GO: f"sum_{{{later}}} {term}",
        Credit.TOKEN: term,
    }[axes.credit]
    ratio = {Correction.TOKEN: "rho_t ", Correction.SEQUENCE: "w "}.get(axes.correction, "")
    return f"sum_t sg({ratio}{credited}) logpi_t"


def _loss_formula(axes: Axes) -> str:
    if axes.placement is Placement.LOSS and axes.credit is Credit.SEQUENCE:
        ratio = "sg(w) " if axes.correction is Correction.SEQUENCE else ""
        return f"{ratio}(sum_t k1_t)^2 / 2"
    ratio = {
        Correction.NONE: "",
        Correction.TOKEN: "rho_t",
        Correction.PREFIX: _prefix_ratio(axes.estimator, "t"),
        Correction.SEQUENCE: "w",
    }[axes.correction]
    if ratio and not ratio_is_differentiable(axes):
        ratio = f"sg({ratio})"
    return f"sum_t {ratio} {_SYMBOLS[axes.estimator]}_t".replace("  ", " ")


def ratio_is_differentiable(axes: Axes) -> bool:
    """Whether the loss side differentiates its importance ratio, which brings the score-function half along.

    With ``both`` the reward side is that half already. k2 with a differentiated token ratio would follow the gradient
    of E[k2], which is no KL; detached, it follows the token-level KL.
    """
    if axes.placement is not Placement.LOSS:
        return False
    if axes.correction is Correction.PREFIX:
        return True
    return axes.correction is Correction.TOKEN and axes.estimator is not Estimator.K2


def _prefix_ratio(estimator: Estimator, index: str) -> str:
    return f"c_{{{index}-1}}" if estimator is Estimator.EXACT else f"c_{index}"


_SOURCES = {
    Estimator.K1: "Tang & Munos 2025, arXiv 2506.09477; A Comedy of Estimators, arXiv 2512.21852",
    Estimator.K2: "Schulman 2020 (k2); Liu et al. 2025, arXiv 2510.01555",
    Estimator.K3: "Schulman 2020 (k3); A Comedy of Estimators, arXiv 2512.21852",
    Estimator.ABS: "verl (kl_penalty=abs); no published analysis",
    Estimator.EXACT: "Amini, Vieira, Cotterell 2025, arXiv 2504.10637",
}


def _source(axes: Axes) -> str:
    """The estimator's source, and the ratio's where there is one."""
    sources = [_SOURCES[axes.estimator]]
    if axes.name == "loss/k3/token/none":
        sources.append("Shao et al. 2024 (GRPO), arXiv 2402.03300")
    if axes.name == "loss/k2/sequence/none":
        sources = ["Tang & Munos 2025, arXiv 2506.09477"]
    if axes.correction is Correction.TOKEN:
        sources.append("DeepSeek-AI 2025, arXiv 2512.02556; Zhang et al. 2025, arXiv 2505.17508")
    if axes.correction is Correction.PREFIX:
        sources.append("CTPO 2026, arXiv 2605.07331")
        if axes.placement is Placement.LOSS:
            sources.append("Foerster et al. 2018 (DiCE), arXiv 1802.05098")
    if axes.correction is Correction.SEQUENCE:
        sources.append("importance sampling of the whole sequence")
    return "; ".join(sources)


_PREAMBLE = """# Catalogue of KL configurations

Made by `megatron_klrl.kl.render_catalogue()`; do not edit. Every claim below is computed by `klrl audit`.

Symbols: `pi` the policy, `ref` the reference, `mu` the policy that sampled, `sg` stop-gradient, `logpi_t` the
log-probability of the token at `t`. `k1_t = logpi_t - logref_t`, `k2_t = k1_t^2 / 2`, `k3_t = exp(-k1_t) - 1 + k1_t`,
`abs_t = |k1_t|`, `KL_t` the KL over the full vocabulary at `t`. `rho_t = pi/mu` at `t`, `c_t` the product of `rho_u`
for `u <= t`, `w` the product over the whole sequence. The formula is minimised, per unit of beta, and summed over the
tokens of a sequence. On-policy without rollout log-probabilities, ratios have value 1 and keep their gradient.

Expected gradients: `grad KL(pi||ref)` is the sequence-level reverse KL; `grad KL_tok(p||q; s)` is the sum over
positions of the per-position KL(p||q) with prefixes visited by `s` held fixed.

Verdicts: `unbiased` on- and off-policy (given rollout log-probabilities), `unbiased_on_policy`, `biased`, `zero` (the
expected gradient on-policy is zero: no regularisation, only noise).
"""


def render_catalogue() -> str:
    """The catalogue as the Markdown of docs/kl/catalogue.md."""
    entries = catalogue()
    parts = [_PREAMBLE, _summary(entries)]
    for placement in Placement:
        chosen = [entry for entry in entries if entry.config.placement is placement]
        parts.append(f"\n## Placement `{placement}`\n\n{_table(chosen)}")
    parts.append(f"\n## Who ships it\n\n{_shipped_table(entries)}")
    parts.append(f"\n## Sources\n\n{_source_table(entries)}")
    return "".join(parts)


def _summary(entries: Iterable[CatalogueEntry]) -> str:
    rows = [
        f"| {objective} | {value} | {sum(1 for entry in entries if entry.verdict(objective) is value)} |\n"
        for objective in Objective
        for value in Verdict
    ]
    return "\n| objective | verdict | configurations |\n|---|---|---|\n" + "".join(rows)


def _table(entries: Iterable[CatalogueEntry]) -> str:
    head = (
        "| estimator/credit/correction | formula | expected gradient on-policy | off-policy | sequence | token |\n"
        "|---|---|---|---|---|---|\n"
    )
    rows = []
    for entry in entries:
        name = entry.name.split("/", 1)[1]
        cells = [
            f"`{name}`",
            f"`{_escaped(entry.formula)}`",
            _escaped(entry.expected_on_policy.text()),
            _escaped(entry.expected_off_policy.text()),
            str(entry.verdict_sequence),
            str(entry.verdict_token),
        ]
        rows.append("| " + " | ".join(cells) + " |\n")
    return head + "".join(rows)


def _shipped_table(entries: Iterable[CatalogueEntry]) -> str:
    rows = [
        f"| `{entry.name}` | {shipped.library} | `{shipped.flag}` | {shipped.note} |\n"
        for entry in entries
        for shipped in entry.shipped
    ]
    return "| configuration | library | flag | around the formula |\n|---|---|---|---|\n" + "".join(rows)


def _source_table(entries: Iterable[CatalogueEntry]) -> str:
    by_source: dict[str, list[str]] = {}
    for entry in entries:
        by_source.setdefault(entry.source, []).append(f"`{entry.name}`")
    return "".join(f"- {source}: {', '.join(names)}\n" for source, names in by_source.items())


def _escaped(text: str) -> str:
    """A bar would end a table cell."""
    return text.replace("|", "\\|")
