import pytest

from megatron_klrl.errors import UserError
from megatron_klrl.planning.hardware import PRESETS, choose


def test_assumptions_replace_numbers() -> None:
    found = choose("h100", ["product_share=0.5", "network_gb_s=25"])
    assert (found.product_share, found.network_gb_s) == (0.5, 25)
    assert found.bf16_tflops == PRESETS["h100"].bf16_tflops
    assert all(one.source for one in PRESETS.values())


@pytest.mark.parametrize(
    ("name", "assumptions", "problem"),
    [
        ("h300", [], "--gpu: there is no GPU 'h300'. Fix: take one of: a100, h100"),
        ("h100", ["speed=2"], "--assume: 'speed=2' replaces nothing. Fix: write one of these"),
        ("h100", ["name=x"], "replaces nothing"),
        ("h100", ["product_share=fast"], "'fast' is not a positive number"),
        ("h100", ["product_share=-1"], "'-1' is not a positive number"),
        ("h100", ["product_share=nan"], "'nan' is not a positive number"),
    ],
)
def test_what_cannot_be_assumed(name: str, assumptions: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        choose(name, assumptions)
