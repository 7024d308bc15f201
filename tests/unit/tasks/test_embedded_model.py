"""The shipped folder: what transformers and vLLM read from it, how it was made, how well it does."""

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Qwen3ForCausalLM

from megatron_klrl.assets import embedded_model
from megatron_klrl.errors import UserError
from megatron_klrl.tasks.arithmetic import ArithmeticKind, ArithmeticTask, Problem

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The script that made the model, imported from its file: `examples` is not a package."""
    spec = importlib.util.spec_from_file_location("make_tiny_model", REPOSITORY / "examples" / "make_tiny_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _torch_left_as_found() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_folder, local_files_only=True).eval()


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"model\.path: no model 'algebra' is embedded.*embedded:arithmetic"):
        embedded_model("algebra")
    with pytest.raises(UserError):
        embedded_model("../tasks")


def test_the_folder_holds_what_engines_read_and_nothing_of_where_it_was_made(model_folder: Path) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files = {file.name: file for file in model_folder.iterdir()}
    assert set(files) == names | {"chat_template.jinja"}
    assert sum(file.stat().st_size for file in files.values()) < 4 * 2**20
    for name in set(files) - {"model.safetensors"}:
        text = files[name].read_text(encoding="utf-8")
        assert "/tmp" not in text
        assert "/home" not in text
        assert "name_or_path" not in text


def test_configuration(model_folder: Path, tokenizer) -> None:
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True)
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (32, 256, True)
    generation = GenerationConfig.from_pretrained(model_folder, local_files_only=True)
    assert config.eos_token_id == generation.eos_token_id == tokenizer.eos_token_id == tokenizer.encode("<eos>")[0]
    # vLLM takes its default sampling parameters from this file: nothing may be cut off the distribution.
    stored = json.loads((model_folder / "generation_config.json").read_text())
    assert not set(stored) & {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    assert stored["do_sample"] is True


def test_weights_are_float32_and_load_without_a_missing_or_left_over_tensor(model_folder: Path, model) -> None:
    stored = load_file(model_folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    # The head is tied to the embedding and therefore not stored.
    assert set(model.state_dict()) - set(stored) == {"lm_head.weight"}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    assert sum(tensor.numel() for tensor in stored.values()) == 215_872


def test_the_script_still_makes_this_tokenizer_and_configuration(recipe, model_folder: Path, tmp_path: Path) -> None:
    tokenizer = recipe.build_tokenizer()
    recipe.draw_batch(random.Random(0), tokenizer)
    recipe.save(recipe.build_model(tokenizer, seed=0), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (model_folder / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        made, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path, model_folder))
        # Which library version wrote the file changes with the environment and says nothing of the model.
        assert {**made, "transformers_version": ""} == {**shipped, "transformers_version": ""}


def test_a_saved_model_comes_back_with_the_same_logits(recipe, tokenizer, tmp_path: Path) -> None:
    made = recipe.build_model(tokenizer, seed=3).eval()
    recipe.save(made, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    token_ids = torch.tensor([tokenizer.encode("<|im_start|>calc5+4-1<|im_end|>")])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=token_ids).logits, made(input_ids=token_ids).logits)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_every_id_round_trips(tokenizer) -> None:
    assert len(tokenizer) == 32
    text = tokenizer.decode(list(range(32)))
    assert tokenizer.encode(text) == list(range(32))
    # Streaming: what the tokens say one by one is what they say together.
    assert "".join(tokenizer.decode([token]) for token in range(32)) == text


def test_text_round_trips_and_foreign_characters_are_unknown(tokenizer) -> None:
    text = "<|im_start|>calc5+4-1^2v3<|im_end|>5+4=9\\boxed{9}<eos>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "calc5+4-1^2v35+4=9\\boxed{9}"
    assert tokenizer.encode("5 x") == [tokenizer.encode("5")[0], tokenizer.unk_token_id, tokenizer.unk_token_id]


def test_demonstrations_without_noise_are_right(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "SLIP_PROBABILITY", 0.0)
    monkeypatch.setattr(recipe, "DIRECT_ANSWER_PROBABILITY", 0.0)
    rng = random.Random(0)
    problem = Problem(kind=ArithmeticKind.CHAIN, digits=(5, 4, 1, 1, 8), operators="+-+-")
    assert recipe.demonstrate(rng, problem) == "5+4=9-1=8+1=9-8=1\\boxed{1}"
    for _ in range(100):
        drawn = recipe.draw_training_problem(rng)
        assert recipe.demonstrate(rng, drawn).endswith(f"\\boxed{{{drawn.answer}}}")


def test_half_of_the_demonstrated_chains_are_direct(recipe) -> None:
    rng = random.Random(0)
    problem = Problem(kind=ArithmeticKind.CHAIN, digits=(5, 4, 1, 1), operators="+-+")
    direct = [text for text in (recipe.demonstrate(rng, problem) for _ in range(1000)) if text.startswith("\\boxed{")]
    # 500 expected, standard deviation 16: five of them.
    assert 420 < len(direct) < 580
    # A direct answer is a blind guess: about 50 of the 500, standard deviation 7.
    assert 15 < sum(text == "\\boxed{9}" for text in direct) < 85


def test_the_supervised_loss_covers_the_response_only(recipe, tokenizer) -> None:
    token_ids, targets = recipe.draw_batch(random.Random(0), tokenizer)
    assert token_ids.shape == targets.shape
    for row, target in zip(token_ids, targets, strict=True):
        text = tokenizer.decode(row[row != tokenizer.pad_token_id])
        response = tokenizer.decode(target[target != -100])
        assert text.partition("<|im_end|>")[2] == response
        assert response.endswith("<eos>")


# Set, T=1 accuracy in the report of the script (1024 problems).
REPORTED = [("id", 0.398), ("long", 0.337), ("op", 0.452), ("rev", 0.679)]


@pytest.mark.parametrize(("name", "reported"), REPORTED)
def test_sampled_accuracy_is_the_reported_one(recipe, model, tokenizer, name: str, reported: float) -> None:
    """256 samples have a standard deviation of 0.03 and the 1024 reported ones of 0.015: three and a half of both."""
    torch.manual_seed(0)
    kind, terms = recipe.EVALUATION_SETS[name]
    task = ArithmeticTask(kind=kind, terms=terms, seed=5, tokenizer=tokenizer)
    assert recipe.accuracy(model, tokenizer, task, problems=256, sample=True) == pytest.approx(reported, abs=0.12)


def test_training_learns(recipe, tokenizer) -> None:
    """Thirty steps of the real thing: from ln(32) nats a token to what knowing the format is worth."""
    torch.set_num_threads(1)
    model = recipe.build_model(tokenizer, seed=0)
    token_ids, targets = recipe.draw_batch(random.Random("held out"), tokenizer)

    def loss() -> float:
        with torch.no_grad():
            logits = model(input_ids=token_ids).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).item()

    before = loss()
    recipe.pretrain(model, tokenizer, steps=30, seed=0)
    assert before > 3.3
    assert loss() < 2.2
