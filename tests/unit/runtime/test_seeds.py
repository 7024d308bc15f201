"""Seeds are distinct, in range, and a function of their names alone."""

from megatron_klrl.runtime.seeds import derive


def test_seeds_are_reproducible_distinct_and_in_range() -> None:
    found = {
        derive(0, "rollout", step, prompt, sample) for step in range(10) for prompt in range(10) for sample in range(8)
    }
    assert len(found) == 800
    assert all(0 <= seed < 2**63 for seed in found)
    assert derive(0, "rollout", 1, 2, 3) == derive(0, "rollout", 1, 2, 3)
    assert derive(1, "rollout", 1, 2, 3) != derive(0, "rollout", 1, 2, 3)
    assert derive(0, "a", 12, 3) != derive(0, "a", 1, 23), "names must not run together"
