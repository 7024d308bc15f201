"""Whole runs from the command line on one device."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from megatron_klrl.assets import embedded_model

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "arithmetic_cpu.yaml"
ONE_RANK = ["parallel.tensor=1", "launch.ranks=1", "loop.eval_every=0", "optimum.prompts=0"]
NEEDED_GIB = 135
"""Of the device for a step of 7.6 B parameters: 18 bytes each, and activations."""


def rows(*arguments: str | Path, run: Path) -> list[dict[str, float]]:
    """Train, and the metrics of every step."""
    command = [sys.executable, "-m", "megatron_klrl.cli", "train", *map(str, arguments), "--run-dir", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=run.parent)
    log = run / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_tiny_model_learns_in_twenty_steps(tmp_path: Path, dtype: str) -> None:
    settings = [f"precision.dtype={dtype}", "loop.steps=20", "generation.kv_cache_mib=1024"]
    if dtype == "bf16":
        settings.append("mismatch.correction=token_truncate")
    found = rows(RECIPE, *ONE_RANK, *settings, run=tmp_path / "run")
    last = sum(row["reward/mean"] for row in found[-4:]) / 4
    assert last > 0.7, "0.4 at the start; 0.85 after 20 steps on CPU"
    assert found[-1]["memory/peak_gib"] > 0


def write_random_7b(folder: Path) -> Path:
    """Qwen2.5-7B's shape with random weights, written tensor by tensor in bf16, and the shipped model's tokenizer."""
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="bfloat16",
    )
    folder.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    weights = {
        name: (0.02 * torch.randn(p.shape, device="cuda")).to("cpu", torch.bfloat16)
        for name, p in model.named_parameters()
    }
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name].fill_(1.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    for file in embedded_model("arithmetic").glob("*token*"):
        shutil.copy(file, folder / file.name)
    assert AutoConfig.from_pretrained(folder).hidden_size == 3584
    return folder


@pytest.mark.timeout(900)
def test_a_model_of_7_billion_parameters_makes_a_step(tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine.pytorch", reason="torch's Adam needs 30 GB more than Transformer Engine's")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory < NEEDED_GIB:
        pytest.skip(f"needs a device of {NEEDED_GIB} GiB, this one has {memory:.0f}")
    settings = [
        f"model.path={write_random_7b(tmp_path / 'model')}",
        "precision.dtype=bf16",
        "kl.beta=0",
        "memory.recompute=full",
        "memory.offload_while_generating=true",
        "generation.sleep=true",
        "generation.kv_cache_mib=8192",
        "generation.max_model_len=512",
        "generation.verify_every=0",
        "loop.steps=1",
        "loop.prompts_per_step=4",
        "loop.group_size=4",
        "loop.micro_batch_size=4",
        "loop.split_gradient_every=0",
        "data.eval={}",
        "mismatch.correction=token_truncate",
    ]
    found = rows(RECIPE, *ONE_RANK, *settings, run=tmp_path / "run")
    assert found[-1]["grad/norm"] > 0
    assert found[-1]["memory/peak_gib"] < memory
