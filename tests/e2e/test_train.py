"""The main job from the command line: real ranks, Megatron-Core, vLLM. One run, looked at from many sides."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from tensorboard import default, program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_klrl.metrics.names import METRICS, PANELS, known
from megatron_klrl.runtime.seeds import derive
from megatron_klrl.tasks.arithmetic import ArithmeticTask
from tests.e2e.live import LiveRun

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "arithmetic_cpu.yaml"
STEPS, HALF = 20, 10
SETTINGS = [f"loop.steps={STEPS}", f"loop.checkpoint_every={HALF}", "loop.eval_every=0", "optimum.prompts=16"]
TIMEOUT_S = 300
NOT_REPRODUCED = ("time/", "throughput/", "memory/")

pytestmark = pytest.mark.e2e


def klrl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, without the variables of a launcher."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    }
    command = [sys.executable, "-m", "megatron_klrl.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    folder: Path
    output: str

    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def reproducible(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith(NOT_REPRODUCED)} for row in metrics]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Twenty steps of the default recipe, TP 2."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = klrl("train", RECIPE, *SETTINGS, "--run-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "log.txt").read_text()[-3000:]
    return Trained(folder, done.stdout)


def test_reward_rises(trained: Trained) -> None:
    """The recipe goes from about 0.4 to 0.85 in 20 steps; a mean of 4 x 128 samples has a standard error of 0.02."""
    rows = trained.metrics()
    first, last = rows[1]["reward/mean"], sum(row["reward/mean"] for row in rows[-4:]) / 4
    assert 0.25 < first < 0.55
    assert last > 0.7
    assert rows[-1]["eval/id/accuracy"] > rows[0]["eval/id/accuracy"] + 0.2


def test_metrics_are_complete_and_make_sense(trained: Trained) -> None:
    rows = trained.metrics()
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    sometimes = {"grad/kl_norm", "grad/policy_kl_cosine"}
    expected = {metric.name for metric in METRICS if not metric.name.startswith("eval/")}
    verified = {"time/verify_s", "mismatch/verified_abs_max"}
    corrected = {"mismatch/ess", "mismatch/truncated_fraction", "mismatch/masked_fraction", "kl/ratio_ess"}
    corrected |= {"kl/ratio_log_max", "kl/ratio_truncated_fraction", "reward/length_penalty"}
    expected -= sometimes | verified | corrected | {"kl/clamp_fraction"}
    for row in rows[1:]:
        assert expected <= row.keys()
        assert all(known(name) for name in row if name != "step")
        assert row["mismatch/logprob_abs_mean"] < 1e-5, "trainer and engine hold the same weights"
        assert row["staleness/max"] == 0
        assert row["kl/beta"] == 0.1
    assert [row["step"] for row in rows if sometimes <= row.keys()] == [10, 20]
    assert [row["step"] for row in rows if verified <= row.keys()] == [1]
    assert all(row["grad/kl_norm"] > 0 and abs(row["grad/policy_kl_cosine"]) <= 1 for row in (rows[10], rows[20]))
    assert rows[1]["kl/exact"] == pytest.approx(0, abs=1e-6), "before the first update the policy is the reference"
    assert rows[-1]["kl/exact"] > 0.2
    assert {"eval/id/accuracy", "eval/long/accuracy", "eval/op/accuracy", "eval/rev/accuracy"} <= rows[0].keys()


def test_run_directory(trained: Trained) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "card.md",
        "checkpoints",
        "rollouts",
        "log.txt",
        "hf",
        "audit.json",
    ):
        assert (trained.folder / name).exists(), name
    card = (trained.folder / "card.md").read_text()
    assert "max E[R] - 0.1 KL(policy \\|\\| reference)" in card
    assert "follows the gradient" in card
    sample = json.loads((trained.folder / "rollouts" / f"step_{STEPS:06d}.jsonl").read_text().splitlines()[0])
    lengths = {len(sample[key]) for key in ("token_ids", "rollout_logprobs", "old_logprobs", "ref_logprobs")}
    assert len(lengths) == 1


@pytest.fixture(scope="module")
def page(trained: Trained) -> Callable[..., Any]:
    """What TensorBoard's own server answers about the run, by route."""
    board = program.TensorBoard(default.get_plugins())
    board.configure(argv=["tensorboard", "--logdir", str(trained.folder), "--port", "0", "--load_fast", "false"])
    address = board.launch()

    def get(route: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{address}data/plugin/{route}", data=data, headers=headers), timeout=30) as answer:
            return json.loads(answer.read())

    end = time.monotonic() + 60
    while not get("images/tags") and time.monotonic() < end:  # the picture is written last
        time.sleep(0.2)
    return get


def test_the_page_answers_its_questions(trained: Trained, page: Callable[..., Any]) -> None:
    """Is it learning, is the KL right, is the engine consistent, where does the time go: each has charts with data."""
    layout = page("custom_scalars/layout")
    charts = {
        category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
        for category in layout["category"]
    }
    assert list(charts) == list(PANELS)
    (run,) = page("scalars/tags")
    assert run == "tensorboard"
    tags = page("scalars/tags")[run]
    for question, found in charts.items():
        for title, patterns in found.items():
            if title not in ("responses that could not be verified", "effective share of the KL's importance ratios"):
                assert any(re.fullmatch(p, tag) for p in patterns for tag in tags), f"{question}: {title} is empty"
    rewards = page(f"scalars/scalars?run={run}&tag=reward%2Fmean")
    assert [(step, value) for _, step, value in rewards] == [
        (row["step"], pytest.approx(row["reward/mean"], rel=1e-6)) for row in trained.metrics() if "reward/mean" in row
    ]


def test_the_page_shows_tokens_samples_and_settings(trained: Trained, page: Callable[..., Any]) -> None:
    wanted = {"kl/per_token", "kl/log_ratio", "kl/by_position", "mismatch/log_ratio", "mismatch/ratio"}
    assert wanted <= set(page("histograms/tags")["tensorboard"])
    profile = page("histograms/histograms?run=tensorboard&tag=kl%2Fby_position")
    last = next(row for row in reversed(trained.metrics()) if "kl/exact" in row)
    assert profile[-1][1] == STEPS
    assert sum(height for *_, height in profile[-1][2]) > 0.5 * last["kl/exact"]
    assert {"card/text_summary", "samples/text_summary", "drifted_tokens/text_summary"} <= set(
        page("text/tags")["tensorboard"]
    )
    drifted = page("text/text?run=tensorboard&tag=drifted_tokens%2Ftext_summary")[-1]["text"]
    tokens = re.findall(r"<tr>\n<td><code>.*?</tr>", drifted, flags=re.DOTALL)
    assert len(set(tokens)) == len(tokens) == 12
    assert page("images/tags")["tensorboard"].keys() == {"frontier"}
    experiment = page("hparams/experiment", {"experimentName": ""})
    assert {"kl.beta", "kl.estimator", "optimizer.lr"} <= {info["name"] for info in experiment["hparamInfos"]}
    assert {"reward/mean", "kl/exact"} <= {info["name"]["tag"] for info in experiment["metricInfos"]}


def test_tensorboard_shows_what_metrics_jsonl_holds(trained: Trained) -> None:
    events = EventAccumulator(str(trained.folder / "tensorboard"))
    events.Reload()
    rows = trained.metrics()
    written = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert written == [(row["step"], pytest.approx(row["reward/mean"])) for row in rows[1:]]


def test_terminal_shows_the_table_the_optimum_and_where_to_look(trained: Trained) -> None:
    for text in (
        "KL: k1 in reward",
        "reward",
        "evaluation: id",
        "optimum, closed form",
        "reached",
        "tensorboard --logdir",
    ):
        assert text in trained.output, text
    assert "Warning" not in trained.output


def test_optimum_report_is_consistent(trained: Trained) -> None:
    report = json.loads((trained.folder / "optimum.json").read_text())
    for name in ("start", "reached", "optimal"):
        point = report[name]
        assert point["objective"] == pytest.approx(point["accuracy"] - report["beta"] * point["kl"], abs=1e-6)
    assert report["start"]["objective"] < report["reached"]["objective"] < report["optimal"]["objective"] + 0.05


def test_the_result_loads_in_transformers_and_scores_the_same(trained: Trained) -> None:
    """Greedy accuracy on the in-distribution set: our evaluation through vLLM against transformers' own generate.

    The checkpoint's evaluation is that of its export: the same weights, known as such, and the same samples.
    """
    greedy = ["data.eval.id.temperature=0", "data.eval.id.samples=1", "data.eval.id.prompts=32"]
    checkpoint, hf = trained.folder / "checkpoints" / f"step_{STEPS:06d}", trained.folder / "hf"
    reports = []
    for weights in (["--hf", hf], ["--checkpoint", checkpoint]):
        done = klrl("eval", RECIPE, *greedy, *weights, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        (written,) = weights[1].parent.glob(f"{weights[1].name}.eval-*.json")
        reports.append(json.loads(done.stdout))
        assert json.loads(written.read_text()) == reports[-1]
        assert written.name == f"{weights[1].name}.eval-{reports[-1]['recipe_sha256'][:8]}.json"
    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    task = ArithmeticTask(kind="chain", terms=(3, 4), seed=derive(0, "eval", "id"), tokenizer=tokenizer)
    solved = 0.0
    for prompt in task.prompts(0, 32):
        ids = model.generate(torch.tensor([prompt.token_ids]), max_new_tokens=32, do_sample=False)
        solved += task.is_right(ids[0, len(prompt.token_ids) :].tolist(), prompt.answer)
    sets = reports[0]["sets"]
    assert sets["id"]["accuracy"] == solved / 32
    assert (sets["id"]["out_of_distribution"], sets["long"]["out_of_distribution"]) == (False, True)
    assert list(sets["long"]["pass_at_k"]) == ["1", "2", "4"]
    assert reports[1]["weights_sha256"] == reports[0]["weights_sha256"]
    assert reports[1]["sets"] == sets


def test_the_checkpoint_exports_to_the_same_folder(trained: Trained, tmp_path: Path) -> None:
    done = klrl("export", trained.folder / "checkpoints" / f"step_{STEPS:06d}", "--to", tmp_path / "hf")
    assert done.returncode == 0, done.stdout + done.stderr
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    written = AutoModelForCausalLM.from_pretrained(trained.folder / "hf").state_dict()
    assert ours.keys() == written.keys()
    assert all(torch.equal(ours[name], written[name]) for name in ours)


def test_a_run_resumed_and_stopped_and_resumed_repeats_the_uninterrupted_one(trained: Trained, tmp_path: Path) -> None:
    """Bit for bit: from the checkpoint in the middle, the last is damaged; stopped by a signal to one rank; and on."""
    again = tmp_path / "again"
    shutil.copytree(trained.folder, again, ignore=shutil.ignore_patterns("hf"))
    broken = again / "checkpoints" / f"step_{STEPS:06d}"
    (broken / ".metadata").write_bytes(b"")
    arguments = [RECIPE, *SETTINGS, "--resume"]
    refused = klrl("train", *arguments, "--run-dir", again)
    assert refused.returncode == 2
    problem = f"{broken} is damaged: .metadata has 0 bytes"
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith(f"klrl: --resume: {problem}")

    run = LiveRun(again, *arguments, "checkpoint.fallback=previous", "checkpoint.keep=1")
    try:
        # what the run wrote beyond its checkpoint is there until it is resumed
        while not HALF + 2 <= run.last_step() < STEPS:
            assert run.process.poll() is None, run.process.communicate()
            time.sleep(0.01)
        run.rank(1).send_signal(signal.SIGUSR1)
        code, out, err = run.end()
    finally:
        run.kill()
    assert code == 0, out + err
    assert problem in out
    assert f"at step {HALF}" in out
    stopped = json.loads((again / "unfinished.json").read_text())
    assert HALF + 2 <= stopped["step"] < STEPS
    assert stopped == {"step": stopped["step"], "steps": STEPS, "signal": "SIGUSR1"}
    line = f"stopped at step {stopped['step']} of {STEPS} by SIGUSR1"
    assert f"{line}, checkpoint {again}/checkpoints/step_{stopped['step']:06d}; go on with --resume" in out
    assert line in (again / "card.md").read_text()
    assert not (again / "hf").exists()
    kept = {f"step_{HALF:06d}", f"step_{stopped['step']:06d}", f"damaged_{broken.name}"}
    assert {path.name for path in (again / "checkpoints").iterdir() if path.is_dir()} == kept  # reports lie beside

    done = klrl("train", *arguments, "--run-dir", again)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"at step {stopped['step']}" in done.stdout
    assert not (again / "unfinished.json").exists()
    assert reproducible(Trained(again, "").metrics()) == reproducible(trained.metrics())


@pytest.mark.long
def test_the_same_seed_repeats_the_run_and_another_does_not(trained: Trained, tmp_path: Path) -> None:
    short = ["loop.steps=3", "data.eval={}", "optimum.prompts=0"]
    same, other = tmp_path / "same", tmp_path / "other"
    assert klrl("train", RECIPE, *short, "--run-dir", same).returncode == 0
    assert klrl("train", RECIPE, *short, "loop.seed=1", "--run-dir", other).returncode == 0
    again, first = (reproducible(run.metrics()) for run in (Trained(same, ""), trained))
    assert again == [row for row in first if 1 <= row["step"] <= 3]
    assert reproducible(Trained(other, "").metrics()) != reproducible(Trained(same, "").metrics())


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=1"],
        ["parallel.tensor=1", "parallel.pipeline=2"],
        ["parallel.tensor=1", "launch.ranks=2"],
        ["generation.tensor=2", "parallel.sequence=true"],
    ],
)
def test_other_layouts_give_the_same_run(trained: Trained, tmp_path: Path, layout: list[str]) -> None:
    """One rank, PP 2, DP 2 and one engine over both ranks sample what TP 2 samples: only float32 rounding differs."""
    done = klrl(
        "train", RECIPE, *layout, "loop.steps=2", "data.eval={}", "optimum.prompts=0", "--run-dir", tmp_path / "run"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [row for row in Trained(tmp_path / "run", "").metrics() if row["step"] > 0]
    for row, expected in zip(found, trained.metrics()[1:3], strict=True):
        assert row["reward/mean"] == expected["reward/mean"]
        assert row["grad/norm"] == pytest.approx(expected["grad/norm"], rel=1e-3)
        assert row["kl/exact"] == pytest.approx(expected["kl/exact"], rel=1e-3, abs=1e-5)
