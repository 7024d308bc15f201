from pathlib import Path

import pytest

from megatron_klrl.kl import KLConfig, Objective, Verdict, catalogue, render_catalogue
from megatron_klrl.kl.shipped import SHIPPED

_PAGE = Path(__file__).parents[3] / "docs" / "kl" / "catalogue.md"

# Typed from the published analysis, row by row; the catalogue derives the same by algebra and the audit measures it.
_SEQUENCE_VERDICTS = {
    "reward/k1/sequence/none": Verdict.UNBIASED_ON_POLICY,
    "reward/k1/to_go/none": Verdict.UNBIASED_ON_POLICY,
    "reward/k1/token/none": Verdict.BIASED,
    "loss/k1/token/none": Verdict.ZERO,
    "reward/k2/to_go/none": Verdict.BIASED,
    "loss/k2/token/none": Verdict.BIASED,
    "loss/k2/sequence/none": Verdict.UNBIASED_ON_POLICY,
    "reward/k3/to_go/none": Verdict.BIASED,
    "loss/k3/token/none": Verdict.BIASED,
    "both/k1/to_go/none": Verdict.UNBIASED_ON_POLICY,
    "both/k3/sequence/none": Verdict.UNBIASED_ON_POLICY,
    "both/k2/to_go/none": Verdict.BIASED,
    "loss/k3/token/token": Verdict.BIASED,
    "loss/k1/to_go/prefix": Verdict.UNBIASED,
    "loss/k3/to_go/prefix": Verdict.UNBIASED,
    "reward/exact/to_go/none": Verdict.BIASED,
    "loss/exact/token/none": Verdict.BIASED,
    "both/exact/sequence/none": Verdict.UNBIASED_ON_POLICY,
    "both/exact/to_go/none": Verdict.UNBIASED_ON_POLICY,
    "reward/k1/sequence/sequence": Verdict.UNBIASED,
    "reward/k1/to_go/prefix": Verdict.UNBIASED,
    "reward/k1/to_go/token": Verdict.UNBIASED_ON_POLICY,
    "both/k3/sequence/sequence": Verdict.UNBIASED,
    "both/exact/to_go/prefix": Verdict.UNBIASED,
    "loss/abs/token/none": Verdict.BIASED,
}
_TOKEN_VERDICTS = {
    "reward/k1/token/none": Verdict.UNBIASED_ON_POLICY,
    "reward/k1/to_go/none": Verdict.BIASED,
    "loss/k2/token/none": Verdict.UNBIASED_ON_POLICY,
    "loss/k2/token/token": Verdict.UNBIASED,
    "loss/k3/token/token": Verdict.UNBIASED,
    "loss/k1/token/token": Verdict.UNBIASED,
    "loss/k3/token/none": Verdict.BIASED,
    "loss/k1/token/none": Verdict.ZERO,
    "loss/exact/token/none": Verdict.UNBIASED,
    "reward/k1/token/prefix": Verdict.UNBIASED,
}
_ENTRIES = {entry.name: entry for entry in catalogue()}


@pytest.mark.parametrize("name", _SEQUENCE_VERDICTS)
def test_sequence_verdict_is_the_published_one(name):
    assert _ENTRIES[name].verdict(Objective.SEQUENCE) is _SEQUENCE_VERDICTS[name]


@pytest.mark.parametrize("name", _TOKEN_VERDICTS)
def test_token_verdict_is_the_published_one(name):
    assert _ENTRIES[name].verdict(Objective.TOKEN) is _TOKEN_VERDICTS[name]


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("reward/k1/to_go/prefix", "sum_t sg(sum_{u>=t} c_u k1_u) logpi_t"),
        ("reward/k1/sequence/sequence", "sum_t sg(w sum_u k1_u) logpi_t"),
        ("loss/k3/token/token", "sum_t rho_t k3_t"),
        ("loss/k2/token/token", "sum_t sg(rho_t) k2_t"),
        ("loss/k2/sequence/none", "(sum_t k1_t)^2 / 2"),
        ("both/exact/to_go/prefix", "sum_t sg(sum_{u>t} c_{u-1} KL_u) logpi_t + sum_t sg(c_{t-1}) KL_t"),
    ],
)
def test_formula_shows_ratios_and_stop_gradients(name, formula):
    assert _ENTRIES[name].formula == formula


def test_expected_gradient_of_k3_in_the_reward_is_reverse_minus_forward():
    text = _ENTRIES["reward/k3/to_go/none"].expected_gradient(on_policy=True).text()

    assert text == "grad KL(pi||ref) - grad KL_tok(ref||pi; pi)"


def test_every_shipped_row_exists_and_every_entry_has_a_source():
    assert set(SHIPPED) <= set(_ENTRIES)
    assert all(entry.source for entry in catalogue())
    libraries = {shipped.library for entry in catalogue() for shipped in entry.shipped}
    assert {"verl", "TRL", "NeMo-RL", "slime", "OpenRLHF", "AReaL", "SkyRL", "Megatron-RL"} <= libraries


def test_entries_carry_a_configuration_that_validates():
    assert all(KLConfig(**entry.config.model_dump()) == entry.config for entry in catalogue())


def test_page_on_disk_is_what_the_code_renders():
    assert _PAGE.read_text() == render_catalogue(), "write docs/kl/catalogue.md anew from render_catalogue()"
