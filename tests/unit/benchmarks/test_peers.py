"""Our own contestants, and those peers that the trainer's environment holds, are in parity at tiny sizes."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.ranks import join_ranks
from benchmarks.harness.session import not_in_parity
from benchmarks.harness.spec import Case, Contestant
from benchmarks.harness.worker import Worker
from benchmarks.suites import gpu_step, head, kl_matrix, logits, reshard, step
from megatron_klrl.mcore import groups
from megatron_klrl.vocab_parallel import kernels
from tests.support.ranks import run_ranks

FROM_LOGITS = {"batch": 2, "tokens": 6, "vocab": 130}
REPLAYED = {"sequences": 4, "tokens": 8, "layers": 2, "width": 64, "vocab": 50}
FROM_HIDDEN = {"batch": 2, "tokens": 6, "width": 8, "vocab": 130, "dtype": "float32"}


def problem(contestant: Contestant, case: Case, parameters: dict[str, Any]) -> str:
    """What keeps a contestant from a figure, as a session would find it."""
    worker = Worker(0)
    worker.prepare(workload=case.workload, parameters=parameters)
    missing = worker.enter(factory=contestant.factory, options=dict(contestant.options))
    found = worker.parity(path=None)
    return missing.get("message", "") or not_in_parity(found, case.tolerance, contestant)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "contestant",
    [logits.MEASURE, logits.OVERWRITE, logits.PLAIN, logits.PLAIN_OVERWRITE, logits.NAIVE, logits.MCORE],
    ids=lambda contestant: contestant.name,
)
def test_from_logits(contestant: Contestant, dtype: str) -> None:
    case = next(case for case in logits.loss_logits().cases if dtype in case.name)
    assert problem(contestant, case, {**FROM_LOGITS, "dtype": dtype}) == ""


def _check_two_ranks(folder: str) -> None:
    rank = int(os.environ["RANK"])
    with join_ranks(rank=rank, ranks=2, meeting=f"{folder}/meeting", device="cpu"):
        for case in logits.tp_loss().cases:
            for contestant in (logits.OVERWRITE, logits.MEASURE, logits.MCORE):
                parameters = {**FROM_LOGITS, "dtype": case.parameters["dtype"]}
                assert problem(contestant, case, parameters) == "", (contestant.name, case.name, rank)


@pytest.mark.slow
def test_from_logits_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, _check_two_ranks, str(tmp_path))


@pytest.mark.usefixtures("alone")
def test_from_logits_forward_only() -> None:
    case = logits.loss_logits().cases[0]
    assert problem(logits.MEASURE, case, {**FROM_LOGITS, "dtype": "float32", "train": False}) == ""


@pytest.mark.usefixtures("alone")
def test_the_eager_form_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[kernels.Kernels] = []
    monkeypatch.setattr(kernels, "use", chosen.append)
    case = logits.loss_logits_eager().cases[0]
    for contestant in case.contestants:
        if contestant.ours:
            assert problem(contestant, case, {**FROM_LOGITS, "dtype": "float32"}) == ""
    assert chosen == [kernels.Kernels.EAGER] * 4


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("contestant", [*head.modes(5), head.NAIVE], ids=lambda contestant: contestant.name)
def test_from_hidden(contestant: Contestant) -> None:
    assert problem(contestant, head.head_hidden().cases[0], FROM_HIDDEN) == ""


@pytest.mark.parametrize("case", kl_matrix.kl_matrix().quick_cases, ids=lambda case: case.name)
def test_kl_terms(case: Case) -> None:
    assert problem(kl_matrix.OURS, case, dict(case.parameters)) == ""


def _check_scores(folder: str, name: str) -> None:
    with join_ranks(rank=0, ranks=1, meeting=f"{folder}/meeting", device="cpu"):
        (case,) = gpu_step.g_mismatch().quick_cases
        (contestant,) = (each for each in case.contestants if each.name == name)
        assert problem(contestant, replace(case, tolerance=step.TOLERANCE), REPLAYED) == ""
        groups.destroy()


def _check_steps(folder: str) -> None:
    with join_ranks(rank=0, ranks=1, meeting=f"{folder}/meeting", device="cpu"):
        case = step.step_replay().quick_cases[0]
        for contestant in (step.PADDED, step.PACKED):
            assert problem(contestant, case, REPLAYED) == "", contestant.name
            groups.destroy()
        # a contestant of the GPU's benchmarks, on CPU in float32: microbatches
        assert problem(gpu_step.LOCAL, case, {**REPLAYED, "micro_batch_size": 2}) == ""
        groups.destroy()


@pytest.mark.slow
def test_a_replayed_step(tmp_path: Path) -> None:
    run_ranks(1, _check_steps, str(tmp_path))


def _check_phases(folder: str) -> None:
    with join_ranks(rank=0, ranks=1, meeting=f"{folder}/meeting", device="cpu"):
        case = step.step_full().quick_cases[0]
        for contestant in case.contestants:
            assert problem(contestant, case, dict(case.parameters)) == "", contestant.name
            groups.destroy()


@pytest.mark.slow
def test_the_phases_of_a_step(tmp_path: Path) -> None:
    run_ranks(1, _check_phases, str(tmp_path))


@pytest.mark.parametrize("name", ["trainer, bf16", pytest.param("engine, bf16", marks=pytest.mark.long)])
def test_scores_of_trainer_and_engine(tmp_path: Path, name: str) -> None:
    """As in g_mismatch, in float32 on CPU."""
    run_ranks(1, _check_scores, str(tmp_path), name)


@pytest.mark.usefixtures("alone")
def test_a_megatron_answer_without_restored_logits_would_be_noticed() -> None:
    """It writes over its inputs: the second answer is right only if they are made whole before."""
    worker = Worker(0)
    worker.prepare(workload=logits.WORKLOAD, parameters={**FROM_LOGITS, "dtype": "float32"})
    worker.enter(factory=logits.MCORE.factory, options=dict(logits.MCORE.options))
    first, second = (worker.parity(path=None) for _ in range(2))
    assert first == second
    assert worker.step is not None
    broken = worker.step().loss
    assert worker.workload is not None
    truth = worker.workload.truth().loss
    assert broken is not None
    assert truth is not None
    assert abs(float(broken) - float(truth)) > 1e-3


def _check_refits(folder: str, ranks: int) -> None:
    rank = int(os.environ["RANK"])
    (case,) = (reshard.reshard() if ranks > 1 else reshard.reshard_match()).quick_cases
    with join_ranks(rank=rank, ranks=ranks, meeting=f"{folder}/meeting", device="cpu"):
        for contestant in case.contestants:
            assert problem(contestant, case, dict(case.parameters)) == "", (contestant.name, rank)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_refits_are_exact(tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, _check_refits, str(tmp_path), ranks)
