import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_klrl.config.load import Difference, diff_recipes, dump_recipe, load_recipe
from megatron_klrl.config.recipe import Recipe, Section
from megatron_klrl.errors import UserError
from tests.unit.config.folders import RECIPE, make_recipe

SHIPPED = Path(__file__).parents[3] / "examples" / "recipes" / "arithmetic_cpu.yaml"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path)


def message(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(file, overrides)
    return str(caught.value)


def test_config_imports_no_torch_and_no_engine() -> None:
    modules = [
        "config.load",
        "config.validate",
        "config.model_folder",
        "config.precision",
        "config.recipe",
        "planning.plan",
    ]
    imports = "; ".join(f"import megatron_klrl.{name}" for name in modules)
    heavy = "{'torch', 'transformers', 'vllm', 'megatron', 'numpy'}"
    code = f"import sys; {imports}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_defaults_are_filled_in(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded.parallel.ranks_per_replica == 1
    assert loaded.optimizer.adam_betas == (0.9, 0.95)
    assert loaded.loop.micro_batch_size == 16
    assert loaded.data.eval["id"].samples == 1


def test_exponent_without_dot_is_a_number(recipe: Path) -> None:
    assert load_recipe(recipe).optimizer.lr == 1e-3
    assert load_recipe(recipe, ["optimizer.lr=5e-5"]).optimizer.lr == 5e-5


def test_overrides_apply_in_order_and_make_sections(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["kl.beta=0.3", "kl.beta=0.2", "launch.ranks=4", "data.train.terms=[1, 2]"])
    assert loaded.kl.beta == 0.2
    assert loaded.launch.ranks == 4
    assert loaded.data.train.model_dump()["terms"] == (1, 2)


def test_an_override_may_hold_an_equals_sign(recipe: Path) -> None:
    assert load_recipe(recipe, ["model.path=/models/a=b"]).model.path == "/models/a=b"


@pytest.mark.parametrize("path", ["1e-4", "1e4", "yes", "null", "12", "a: b", "#x", "ä"])
def test_dump_loads_to_the_same_recipe_whatever_the_text_looks_like(tmp_path: Path, recipe: Path, path: str) -> None:
    loaded = load_recipe(recipe, [f"model.path='{path}'", "optimizer.adam_eps=1e-12"])
    again = load_recipe(make_recipe(tmp_path, dump_recipe(loaded), "again.yaml"))
    assert again == loaded
    assert again.model.path == path


def test_shipped_recipe_round_trips(tmp_path: Path) -> None:
    shipped = load_recipe(SHIPPED)
    assert load_recipe(make_recipe(tmp_path, dump_recipe(shipped))) == shipped


def test_diff_names_what_differs(recipe: Path) -> None:
    left, right = load_recipe(recipe), load_recipe(recipe, ["kl.beta=0.3", "data.eval.id.samples=2"])
    assert diff_recipes(left, left) == []
    assert diff_recipes(left, right) == [
        Difference(path="kl.beta", left=0.05, right=0.3),
        Difference(path="data.eval.id.samples", left=1, right=2),
    ]


def test_diff_lists_settings_only_one_side_has(recipe: Path) -> None:
    left = load_recipe(recipe)
    right = load_recipe(recipe, ["data.train={task: jsonl, path: a.jsonl}"])
    paths = {difference.path for difference in diff_recipes(left, right)}
    theirs = {f"data.train.{key}" for key in ("path", "system", "instruction", "reward", "on_bad_row")}
    assert paths == theirs | {"data.train.task", "data.train.kind", "data.train.terms"}


def test_recipes_are_frozen(recipe: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(recipe).loop.steps = 3  # type: ignore[misc]


def test_every_setting_says_what_it_means() -> None:
    def undocumented(model: type[Section], prefix: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            found += [] if field.description else [prefix + name]
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                found += undocumented(inner, f"{prefix}{name}.")
        return found

    assert undocumented(Recipe, "") == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("kl.bta=1", ["kl.bta: unknown key", "did you mean kl.beta?"]),
        ("optimiser={lr: 1}", ["optimiser: unknown key", "did you mean optimizer?"]),
        ("lr=1e-3", ["lr: unknown key", "did you mean optimizer.lr?"]),
        ("loop.temperature=1", ["loop.temperature: unknown key", "did you mean generation.temperature?"]),
        ("model.zzz=1", ["model.zzz: unknown key", "keys of model: path"]),
        ("data.train.kin=op", ["data.train.kin: unknown key", "did you mean data.train.kind?"]),
        ("data.eval.id.promts=3", ["data.eval.id.promts: unknown key", "did you mean data.eval.id.prompts?"]),
        ("data.train.task=foo", ["data.train.task", "'foo'", "arithmetic, jsonl, math"]),
        ("data.train={kind: op}", ["data.train.task: names no task", "arithmetic, jsonl, math"]),
        ("data.train.terms=[4, 3]", ["data.train.terms", "smaller number first"]),
        ("data.train.terms=[4]", ["data.train.terms: has too few values", "list of 2"]),
        ("data.train.terms=4", ["data.train.terms: is 4, expected a list"]),
        ("data.train.terms=[1, x]", ["data.train.terms.1: is 'x', expected a whole number"]),
        ("data.eval.a b={task: jsonl, path: x, prompts: 3}", ["data.eval.a b: is not a plain name", "rename it"]),
        ("loop.steps=1.5", ["loop.steps: is 1.5, expected a whole number"]),
        ("loop.steps=true", ["loop.steps: is true, expected a whole number"]),
        ("loop.steps='3'", ["loop.steps: is '3', expected a whole number"]),
        ("loop.steps=0", ["loop.steps: is 0, expected a number at least 1"]),
        ("loop.seed=-1", ["loop.seed: is -1, expected a number at least 0"]),
        ("optimizer.lr=fast", ["optimizer.lr: is 'fast', expected a number", "Fix: set optimizer.lr to a number"]),
        ("optimizer.lr=.inf", ["optimizer.lr: is inf, expected a finite number"]),
        ("optimizer.lr=0", ["optimizer.lr: is 0, expected a number greater than 0"]),
        ("optimizer.adam_betas=[0.9, 1.0]", ["optimizer.adam_betas.1: is 1.0, expected a number less than 1"]),
        ("generation.temperature=0", ["generation.temperature: is 0, expected a number greater than 0"]),
        ("parallel.sequence=1", ["parallel.sequence: is 1, expected true or false"]),
        ("model.path=3", ["model.path: is 3, expected text"]),
        ("model.path=", ["model.path: is empty, expected text"]),
        ("loop=", ["loop: is empty, expected a section"]),
        ("parallel=3", ["parallel: is 3, expected a section"]),
        ("algorithm.advantage=gae", ["algorithm.advantage: is 'gae', expected one of: reinforce, rloo, grpo, dr_grpo"]),
        ("kl.estimator=k9", ["kl.estimator: is 'k9', expected one of: k1, k2, k3, abs, exact"]),
        ("kl.placement=loss", ["kl: ", "means nothing", "Nearest with meaning"]),
        ("parallel.tensor.x=1", ["parallel.tensor.x", "not a section"]),
        ("model.path=[", ["model.path: the value '[' is not YAML", "quote it"]),
        ("foo", ["'foo': is not an override", "write key=value"]),
        ("=3", ["'=3': is not an override", "write key=value"]),
        ("a..b=3", ["is not an override", "write key=value"]),
    ],
)
def test_bad_settings_name_key_and_fix(recipe: Path, override: str, expected: list[str]) -> None:
    overrides = ["parallel.tensor=2", override] if override.startswith("parallel.tensor.") else [override]
    text = message(recipe, *overrides)
    for part in expected:
        assert part in text
    assert "pydantic" not in text
    assert text.count("kl:") <= 1


def test_a_required_key_says_what_it_is_for(tmp_path: Path) -> None:
    text = message(make_recipe(tmp_path, RECIPE.replace("optimizer: {lr: 1e-3}", "optimizer: {}")))
    assert text.startswith("optimizer.lr: is required (Learning rate after warm-up)")
    assert "Fix: add optimizer.lr" in text


def test_a_misspelt_required_key_is_reported_as_misspelt_and_the_rest_is_counted(tmp_path: Path) -> None:
    text = message(make_recipe(tmp_path, RECIPE.replace("steps: 2", "stepps: 2")))
    assert text == "loop.stepps: unknown key (also wrong: loop.steps). Fix: did you mean loop.steps?"


def test_missing_file_names_near_files(tmp_path: Path, recipe: Path) -> None:
    assert f"did you mean {recipe}?" in message(tmp_path / "tny.yaml")
    assert "recipes in" in message(tmp_path / "something-else-entirely")
    assert "nor its folder" in message(tmp_path / "nowhere" / "a.yaml")


def test_missing_file_in_a_folder_without_recipes(tmp_path: Path) -> None:
    assert "holds no .yaml file" in message(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {path: a\nloop: 3", "line 2"),
        ("- a\n- b", "holds a list, not sections"),
        ("just words", "holds the single value 'just words'"),
        ("", "is empty"),
        ("model: {path: a}\nmodel: {path: b}", "line 2, column 1: the key 'model' stands twice"),
        ("model: !!python/object:os.system {}", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    file = make_recipe(tmp_path, text, "bad.yaml")
    found = message(file)
    assert found.startswith(f"{file}: ")
    assert expected in found
    assert "Fix: " in found


def test_a_folder_and_a_binary_file_are_no_recipe(tmp_path: Path) -> None:
    assert "cannot be read" in message(tmp_path)
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read" in message(binary)
