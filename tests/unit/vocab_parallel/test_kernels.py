"""Compiled kernels equal the eager form, also where dynamo is off; without a compiler the eager form runs."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_klrl.vocab_parallel import kernels
from megatron_klrl.vocab_parallel.kernels import Kernels
from megatron_klrl.vocab_parallel.measures import measure
from megatron_klrl.vocab_parallel.shard import VocabShard
from tests.unit.vocab_parallel.oracle import MEASURES, weighted

ROOT = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    kernels.use(Kernels.AUTO)


def results(kind: Kernels, *, rows: int, columns: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """All measures; the gradient of all of them, and that of the log-probabilities alone, over the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, columns, generator=generator)).to(dtype)
    ref = (logits + torch.randn(rows, columns, generator=generator)).to(dtype)
    labels = torch.randint(0, size, (rows,), generator=generator)
    upstream = {name: torch.randn(rows, generator=generator) for name in MEASURES}
    kernels.use(kind)
    found = []
    for names, overwrite in ((MEASURES, False), (MEASURES[:1], True)):
        own = logits.clone().requires_grad_()
        shard = VocabShard.whole(size)
        values = measure(own, labels, shard=shard, temperature=0.7, ref_logits=ref, entropy=True, overwrite=overwrite)
        weighted(values, {name: upstream[name] for name in names}).backward()
        assert own.grad is not None
        found += [own.grad.float().clone(), *(getattr(values, name).detach() for name in MEASURES)]
    return found


@needs_compiler
@pytest.mark.timeout(300)
def test_compiled_equals_eager() -> None:
    """Sums in another order: 1e-5 nats. Made for one number of rows, used for another; a failure to compile warns."""
    for rows in (5, 9):
        shape: dict[str, Any] = {"rows": rows, "columns": 300, "size": 293, "dtype": torch.float32}
        eager, compiled = (results(kind, **shape) for kind in (Kernels.EAGER, Kernels.COMPILED))
        for left, right in zip(eager, compiled, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        made = kernels._InUse.compiled
        assert made is not None
        assert len(made._made) == 5, "log Z with entropy, the reference's, KL, and two gradients"


@needs_compiler
@pytest.mark.long
@pytest.mark.timeout(300)
def test_compiled_where_dynamo_is_off_and_cuda_means_cpu() -> None:
    """As in the trainer's process on CPU, where dynamo is switched off by both of its switches."""
    program = (
        "import warnings, torch\n"
        "from megatron_klrl.mcore import compat\n"
        "from tests.unit.vocab_parallel import test_kernels\n"
        "warnings.simplefilter('error', RuntimeWarning)\n"
        "import torch._dynamo.config\n"
        "torch._dynamo.config.disable = True\n"
        "assert compat.run_on_cpu()\n"
        "test_kernels.test_compiled_equals_eager()\n"
    )
    done = run(program, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_one_warning_and_the_eager_form(tmp_path: Path) -> None:
    program = (
        "import warnings, torch\n"
        "from megatron_klrl.vocab_parallel.kernels import Kernels\n"
        "from tests.unit.vocab_parallel.test_kernels import results\n"
        "shape = dict(rows=4, columns=50, size=50, dtype=torch.float32)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    compiled = results(Kernels.COMPILED, **shape)\n"
        "ours = [str(each.message) for each in caught if 'uncompiled' in str(each.message)]\n"
        "assert len(ours) == 1 and 'g++' in ours[0], ours\n"
        "eager = results(Kernels.EAGER, **shape)\n"
        "assert all(torch.equal(left, right) for left, right in zip(eager, compiled, strict=True))\n"
    )
    done = run(program, CXX=str(tmp_path / "none"), PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_small_problems_are_not_compiled() -> None:
    compiled = kernels._InUse.compiled
    assert compiled is not None
    made = len(compiled._made)
    logits = torch.randn(8, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(logits, torch.zeros(8, dtype=torch.long), shard=VocabShard.whole(100), entropy=True)
    assert len(compiled._made) == made
