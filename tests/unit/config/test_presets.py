"""Presets: what they fill in, what wins over them, and that their page and their claims are the code's."""

from pathlib import Path

import pytest

from megatron_klrl.config.algorithm import AlgorithmSection, Surrogate
from megatron_klrl.config.bounds import CLIPS, clip_bounds
from megatron_klrl.config.load import dump_recipe, load_recipe
from megatron_klrl.config.presets import PRESETS, Preset, find_preset, render_presets
from megatron_klrl.config.recipe import Recipe
from megatron_klrl.config.validate import validate
from megatron_klrl.errors import UserError
from megatron_klrl.kl import KLConfig, catalogue
from megatron_klrl.planning.layout import of_recipe
from megatron_klrl.planning.model import read_model
from megatron_klrl.planning.plan import plan, request
from tests.unit.config.folders import RECIPE, make_recipe

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "examples" / "recipes" / "arithmetic_cpu.yaml"

# The forms and numbers as published or shipped, typed here once more.
FORMS = {
    "grpo-deepseekmath": ("loss/k3/token/none", 0.04, "grpo", "sequence_mean"),
    "dr-grpo": (None, 0.0, "dr_grpo", "constant_norm"),
    "deepseek-v3.2": ("loss/k3/token/token", None, "dr_grpo", "sequence_mean"),
    "dapo": (None, 0.0, "grpo", "token_mean"),
    "gspo": (None, 0.0, "grpo", "sequence_mean"),
    "cispo": (None, 0.0, "grpo", "token_mean"),
    "reinforce-pp": ("reward/k1/to_go/none", None, "reinforce_pp", "token_mean"),
    "verl-default": (None, 0.0, "grpo", "token_mean"),
    "verl-kl-loss": ("loss/k3/token/none", 0.001, "grpo", "token_mean"),
    "trl-grpo": ("loss/k3/token/token", 0.0, "grpo", "token_mean"),
    "trl-rloo": ("reward/k1/sequence/none", 0.05, "rloo", "sequence_sum"),
    "nemo-rl-default": ("loss/k3/token/token", 0.01, "grpo", "token_mean"),
    "slime-unbiased-kl": ("loss/k3/token/token", None, "grpo", "sequence_mean"),
    "openrlhf-default": ("reward/k1/to_go/none", 0.01, "rloo", "sequence_sum"),
    "openrlhf-kl-loss-k3": ("loss/k3/token/none", 0.001, "grpo", "token_mean"),
    "openrlhf-kl-loss-k2": ("loss/k2/token/none", 1e-5, "dr_grpo", "token_mean"),
    "skyrl-default": ("loss/k3/token/none", 0.001, "grpo", "token_mean"),
    "areal-default": ("reward/k1/to_go/none", 0.1, "rloo", "sequence_sum"),
    "megatron-rl-default": ("loss/k3/token/none", 0.001, "grpo", "token_mean"),
    "paper-none": (None, 0.0, "rloo", "sequence_sum"),
    "paper-k1-reward": ("reward/k1/sequence/none", 0.1, "rloo", "sequence_sum"),
    "paper-k1-loss": ("loss/k1/token/none", 0.1, "rloo", "sequence_sum"),
    "paper-k3-reward": ("reward/k3/sequence/none", 0.1, "rloo", "sequence_sum"),
    "paper-k3-loss": ("loss/k3/token/none", 0.1, "rloo", "sequence_sum"),
    "paper-k1-both": ("both/k1/sequence/none", 0.1, "rloo", "sequence_sum"),
    "paper-k3-both": ("both/k3/sequence/none", 0.1, "rloo", "sequence_sum"),
}
# What they clip the ratio of policies to; those that are not here do not clip, or one ratio per sequence alone.
CLIPPED = {
    "grpo-deepseekmath": (0.2, 0.2, None),
    "dr-grpo": (0.2, 0.2, None),
    "deepseek-v3.2": (0.2, 0.2, None),
    "dapo": (0.2, 0.28, None),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
    "reinforce-pp": (0.2, 0.2, None),
    "verl-default": (0.2, 0.2, 3.0),
    "verl-kl-loss": (0.2, 0.2, 3.0),
    "trl-grpo": (0.2, 0.2, None),
    "nemo-rl-default": (0.2, 0.2, None),
    "slime-unbiased-kl": (0.2, 0.2, None),
    "openrlhf-default": (0.2, 0.2, None),
    "openrlhf-kl-loss-k3": (0.2, 0.27, None),
    "openrlhf-kl-loss-k2": (0.2, 0.2, None),
    "skyrl-default": (0.2, 0.2, None),
    "areal-default": (0.2, 0.2, None),
    "megatron-rl-default": (0.01, 0.01, None),
}
REFUSED = {
    "grpo-deepseekmath",
    "verl-kl-loss",
    "openrlhf-kl-loss-k3",
    "skyrl-default",
    "megatron-rl-default",
    "paper-k1-loss",
    "paper-k3-reward",
    "paper-k3-loss",
}
every_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)


def on_shipped(*overrides: str) -> Recipe:
    return load_recipe(SHIPPED, overrides)


def test_names_are_unique_and_known() -> None:
    assert [preset.name for preset in PRESETS] == list(dict.fromkeys(preset.name for preset in PRESETS))
    assert {preset.name for preset in PRESETS} == set(FORMS)


@every_preset
def test_every_preset_takes_effect_on_the_shipped_recipe_and_is_valid(preset: Preset) -> None:
    recipe = on_shipped(f"preset={preset.name}", "kl.allow_biased=true")
    form, beta, advantage, aggregation = FORMS[preset.name]
    validate(recipe, 2)
    assert recipe.preset == preset.name
    assert form in (None, recipe.kl.name)
    assert recipe.kl.beta == (0.1 if beta is None else beta), "what a preset leaves open stays the recipe's"
    assert (recipe.algorithm.advantage, recipe.algorithm.aggregation) == (advantage, aggregation)
    clip = CLIPPED.get(preset.name)
    clipped = preset.name if preset.name in ("gspo", "cispo") else "ppo_clip"
    assert recipe.algorithm.surrogate == ("reinforce" if clip is None else clipped)
    assert tuple(clip_bounds(recipe.algorithm).values()) == (clip or ())


@every_preset
def test_biased_presets_are_refused_until_the_user_accepts_the_bias(preset: Preset) -> None:
    recipe = on_shipped(f"preset={preset.name}")
    assert recipe.kl.allow_biased is False
    if preset.name not in REFUSED:
        validate(recipe, 2)
        return
    with pytest.raises(UserError, match=r"^kl: .*nearest that does.*kl\.allow_biased=true") as caught:
        validate(recipe, 2)
    assert caught.value.field == "kl"


@every_preset
def test_verdicts_are_the_catalogues(preset: Preset) -> None:
    if preset.kl.get("beta") == 0:
        assert preset.verdicts() == {"sequence": "off", "token": "off"}
        return
    (entry,) = [entry for entry in catalogue() if entry.config.axes == KLConfig.model_validate(preset.kl).axes]
    assert preset.verdicts() == {"sequence": str(entry.verdict_sequence), "token": str(entry.verdict_token)}


@every_preset
def test_a_preset_without_kl_has_no_reference(preset: Preset) -> None:
    recipe = on_shipped(f"preset={preset.name}", "kl.allow_biased=true")
    assert (recipe.kl.beta == 0) == (FORMS[preset.name][1] == 0)
    wanted = request(recipe, read_model(recipe.model.path), hardware=None)
    parts = plan(wanted, of_recipe(recipe, gpus=recipe.parallel.ranks_per_replica)).memory[0].parts
    assert ("reference" in parts) == recipe.has_reference


@every_preset
def test_every_setting_is_explained_by_a_name_of_the_library(preset: Preset) -> None:
    ours = {f"{section}.{key}" for section, keys in preset.sections().items() for key in keys}
    known = {f"kl.{key}" for key in KLConfig.model_fields}
    known |= {f"algorithm.{key}" for key in AlgorithmSection.model_fields}
    explained = {key for keys in preset.translation().values() for key in keys}
    assert explained <= known
    assert ours - explained <= {"kl.objective"}, "libraries name no objective"
    assert {"kl.beta"} | ours >= explained, "what stands beside a library's name is set, or a beta left to the recipe"


@every_preset
def test_another_surrogate_beside_a_preset_has_its_own_bounds(preset: Preset) -> None:
    """A preset names a bound only where it differs from its surrogate's own, so that none is inherited unseen."""
    bounds = {key: value for key, value in preset.algorithm.items() if "clip_" in key or key == "dual_clip"}
    assert all(value != CLIPS[Surrogate.PPO_CLIP][key] for key, value in bounds.items())
    if not bounds:
        recipe = on_shipped(f"preset={preset.name}", "algorithm.surrogate=gspo", "kl.allow_biased=true")
        validate(recipe, 2)
        assert clip_bounds(recipe.algorithm) == {"clip_low": 3e-4, "clip_high": 4e-4}


def test_translation_carries_our_values() -> None:
    words = find_preset("verl-kl-loss").translation()
    assert words["actor_rollout_ref.actor.kl_loss_coef=0.001"] == {"kl.beta": 0.001}
    assert words["actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type=low_var_kl"] == {
        "kl.placement": "loss",
        "kl.estimator": "k3",
        "kl.credit": "token",
        "kl.correction": "none",
    }
    assert find_preset("slime-unbiased-kl").translation()["--kl-loss-coef"] == {"kl.beta": None}


def test_keys_of_the_file_win_over_its_preset(tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe(tmp_path, RECIPE + "preset: trl-rloo\nkl: {beta: 0.3}\n"))
    assert recipe.kl.beta == 0.3
    assert recipe.kl.name == "reward/k1/sequence/none"


def test_keys_of_the_command_line_win_over_either_preset_in_any_order(tmp_path: Path) -> None:
    in_file = make_recipe(tmp_path, RECIPE + "preset: trl-rloo\n")
    assert load_recipe(in_file, ["kl.beta=0.3"]).kl.beta == 0.3
    for overrides in (["kl.beta=0.3", "preset=areal-default"], [" preset = areal-default", "kl.beta=0.3"]):
        recipe = load_recipe(in_file, overrides)
        assert (recipe.preset, recipe.kl.beta, recipe.kl.credit) == ("areal-default", 0.3, "to_go")


def test_a_preset_of_the_command_line_replaces_what_the_file_says() -> None:
    recipe = on_shipped("preset=verl-kl-loss")
    assert (recipe.kl.name, recipe.kl.beta) == ("loss/k3/token/none", 0.001)
    assert recipe.algorithm.aggregation == "token_mean"
    assert recipe.loop == on_shipped().loop


@every_preset
def test_the_resolved_recipe_reloads_to_itself_and_keeps_the_name(tmp_path: Path, preset: Preset) -> None:
    recipe = on_shipped(f"preset={preset.name}", "kl.beta=0.2")
    again = load_recipe(make_recipe(tmp_path, dump_recipe(recipe)))
    assert again == recipe
    assert again.preset == preset.name


def test_without_a_preset_nothing_changes(tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe(tmp_path, RECIPE + "preset: null\n"))
    assert recipe == load_recipe(make_recipe(tmp_path))
    assert recipe.preset is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("preset=trl-roo", "preset: there is no preset 'trl-roo'. Fix: did you mean trl-rloo"),
        ("preset=3", "preset: there is no preset 3. Fix: use one of grpo-deepseekmath, "),
        ("preset=[a]", "preset: there is no preset ['a']"),
    ],
)
def test_an_unknown_preset_names_the_nearest(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        on_shipped(override)
    assert str(caught.value).startswith(expected)


def test_a_section_that_is_none_is_still_an_error(tmp_path: Path) -> None:
    file = make_recipe(tmp_path, RECIPE + "preset: trl-rloo\nkl: 3\n")
    with pytest.raises(UserError, match="kl: is 3, expected a section"):
        load_recipe(file)


def test_a_number_that_means_more_here_is_said_until_it_is_converted() -> None:
    def warned(*overrides: str) -> bool:
        warnings = validate(on_shipped(*overrides, "kl.allow_biased=true"), 2)
        return any(text.startswith("kl.beta: ") and "divide kl.beta by" in text for text in warnings)

    assert warned("preset=verl-kl-loss")
    assert not warned("preset=verl-kl-loss", "kl.beta=0.00003")
    assert not warned("preset=verl-kl-loss", "algorithm.aggregation=sequence_sum")
    assert not warned("preset=trl-rloo")
    assert not warned("preset=trl-grpo"), "no KL, no number to convert"
    assert not warned()


def test_the_page_is_made_from_the_code() -> None:
    assert (ROOT / "docs" / "kl" / "presets.md").read_text(encoding="utf-8") == render_presets()


@every_preset
def test_the_page_says_where_it_is_not_the_same(preset: Preset) -> None:
    page = render_presets()
    (chapter,) = [text for text in page.split("\n## ") if text.startswith(f"`{preset.name}`\n")]
    for sentence in (*preset.differences, preset.conversion):
        assert sentence in chapter
