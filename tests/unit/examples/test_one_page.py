"""The page is short, it learns, and its gradient is the one that the trainer's own code gives."""

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_klrl.batch import RolloutBatch, TokenScores
from megatron_klrl.config.load import load_recipe
from megatron_klrl.kl import KLConfig
from megatron_klrl.loop.update import assemble, policy_loss
from megatron_klrl.tasks.arithmetic import ArithmeticTask

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "examples" / "one_page.py"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def models(page: ModuleType) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script does: more spin against each other on a model this small
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield page.load_models()
    torch.set_num_threads(threads)


def arithmetic(models: Any) -> ArithmeticTask:
    return ArithmeticTask(kind="chain", terms=(3, 4), seed=0, tokenizer=models.tokenizer)


def test_it_fits_on_a_page() -> None:
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 250


def test_first_steps(page: ModuleType, models: Any) -> None:
    """The reward rises from 0.4 within six updates of 128 samples: 0.1 is more than two standard errors."""
    points = list(page.train(models, arithmetic(models), page.find_kl("reward/k1/to_go/none", beta=0.1), steps=6))
    assert points[0].kl == 0.0  # policy and reference are the same numbers through the same kernels
    assert all(math.isfinite(value) for point in points for value in (point.accuracy, point.kl, point.objective))
    assert points[-1].kl > 0.0
    assert points[-1].accuracy > points[0].accuracy + 0.1


def test_sampled_and_scored_logprobs_are_the_same(page: ModuleType, models: Any) -> None:
    """With a key-value cache and without: float32 sums in another order, 1e-4 at log-probabilities of up to 15."""
    samples = page.sample(models, arithmetic(models), arithmetic(models).prompts(0, 4))
    scored = page.score(models, samples).logprobs.detach()
    assert samples.mask.any(-1).all()
    torch.testing.assert_close(scored[samples.mask], samples.rollout_logprobs[samples.mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "reward/k1/to_go/none",
        "reward/k1/sequence/sequence",
        "loss/k3/token/none",
        "loss/k2/sequence/none",
        "loss/k3/to_go/prefix",
        "both/exact/to_go/none",
    ],
)
def test_the_gradient_is_the_trainers(page: ModuleType, models: Any, name: str) -> None:
    """loop/update.py and losses/policy_loss.py on the same samples; float32 sums in another order, so 1e-5."""
    kl = page.find_kl(name, beta=0.1)
    samples = page.sample(models, arithmetic(models), arithmetic(models).prompts(0, 4))
    with torch.no_grad():
        for parameter in models.policy.parameters():  # away from the reference, where the KL has a gradient
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))

    ours = gradient(models.policy, page.loss_of(page.score(models, samples), samples, kl))
    trainers = gradient(models.policy, trainer_loss(page.score(models, samples), samples, kl, page.GROUP_SIZE))
    without = gradient(models.policy, page.loss_of(page.score(models, samples), samples, KLConfig(beta=0.0)))

    assert (ours - trainers).norm() <= 1e-5 * trainers.norm()
    assert (ours - without).norm() > 1e-3 * trainers.norm()  # the KL is in it


def trainer_loss(scores: Any, samples: Any, kl: KLConfig, group_size: int) -> torch.Tensor:
    """What the trainer minimises, from the same scores."""
    axes = [f"kl.{axis}={getattr(kl, axis)}" for axis in ("beta", "estimator", "placement", "credit", "correction")]
    recipe = load_recipe(
        REPOSITORY / "examples/recipes/arithmetic_cpu.yaml",
        [*axes, "kl.allow_biased=true", f"loop.group_size={group_size}"],
    )
    rows = samples.mask.shape[0]
    batch = RolloutBatch(
        tokens=samples.tokens[:, -samples.mask.shape[1] - 1 :],
        response_mask=samples.mask,
        rollout_logprobs=samples.rollout_logprobs,
        rewards=samples.rewards,
        truncated=torch.zeros(rows, dtype=torch.bool),
        weight_version=torch.zeros(rows, dtype=torch.long),
    )
    known = TokenScores(
        old_logprobs=scores.logprobs.detach(),
        entropy=torch.zeros_like(scores.logprobs),
        ref_logprobs=scores.ref_logprobs,
        full_kl=scores.full_kl.detach(),
    )
    update = assemble(batch, known, recipe)
    value, _ = policy_loss(recipe, update)(scores.logprobs, update, full_kl=scores.full_kl)
    return value


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kl", "reward/k9/to_go/none"], "--kl: no configuration 'reward/k9/to_go/none' in the catalogue. Fix:"),
        (["--beta", "-1"], "--beta: -1.0 is not a positive number of nats. Fix:"),
    ],
)
def test_a_wrong_argument_ends_with_one_sentence(
    page: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert page.main(arguments) == 2
    assert capsys.readouterr().err.startswith(said)
