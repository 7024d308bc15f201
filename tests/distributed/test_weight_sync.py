"""Every transport gives every rank the same tensors, bit for bit, round after round, from any layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_klrl.errors import WorkError
from megatron_klrl.mcore.streams import SyncSettings
from megatron_klrl.weight_sync import shared_memory
from megatron_klrl.weight_sync.checksum import checksums
from megatron_klrl.weight_sync.choose import Kind, choose
from tests.support.models import FAMILIES, MIXTURE, write_model
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer

BUCKET_BYTES = 8 << 10  # several buckets for these models, and some modules larger than one
LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_interleaved": (2, {"pipeline": 2, "virtual": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2_dp2": (4, {"tensor": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per family."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, config) for name, config in {**FAMILIES, "mixture": MIXTURE}.items()}


def three_rounds(folder: Path, layout: dict, kind: Kind, to: Path) -> list[dict[str, Tensor]]:
    """The weights, then twice moved by noise that is the same in every layout."""
    sync = SyncSettings(kind=kind, bucket_bytes=BUCKET_BYTES, folder=to)
    with trainer(folder, with_reference=False, sync=sync, **layout) as engine:
        rounds = []
        for seed in range(3):
            if seed:
                engine.perturb(scale=0.1, seed=seed)
            rounds.append({name: tensor.clone() for name, tensor in engine.export_weights()})
            assert engine.weight_checksums() == checksums(rounds[-1].items()), "where they lie and as they arrive"
        engine.close()
        return rounds


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[dict[str, Tensor]]]:
    """From one rank."""
    return {
        family: run_ranks(1, three_rounds, folder, {}, Kind.IN_PROCESS, folder)[0] for family, folder in folders.items()
    }


def check(found: list[list[dict[str, Tensor]]], expected: list[dict[str, Tensor]]) -> None:
    for rank in found:
        for ours, theirs in zip(rank, expected, strict=True):
            assert list(ours) == list(theirs), "names, in the order of the model"
            for name, tensor in theirs.items():
                assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("kind", [Kind.SHARED_MEMORY, Kind.BROADCAST])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(folders: dict, expected: dict, tmp_path: Path, layout: str, kind: Kind) -> None:
    ranks, settings = LAYOUTS[layout]
    family = "qwen2_untied"  # biases, and a vocabulary that TP 2 pads
    check(run_ranks(ranks, three_rounds, folders[family], settings, kind, tmp_path), expected[family])


@pytest.mark.parametrize("family", ["qwen2_tied", "qwen3_tied", "llama31_untied"])
def test_families(folders: dict, expected: dict, tmp_path: Path, family: str) -> None:
    settings = {"tensor": 2, "pipeline": 2}
    check(run_ranks(4, three_rounds, folders[family], settings, Kind.SHARED_MEMORY, tmp_path), expected[family])


@pytest.mark.parametrize("kind", [Kind.SHARED_MEMORY, Kind.BROADCAST])
@pytest.mark.parametrize(
    "layout", [(2, {"expert": 2}), (2, {"tensor": 2, "sequence": True}), (4, {"pipeline": 2, "expert": 2})]
)
def test_experts(folders: dict, expected: dict, tmp_path: Path, layout: tuple[int, dict], kind: Kind) -> None:
    found = run_ranks(layout[0], three_rounds, folders["mixture"], layout[1], kind, tmp_path)
    check(found, expected["mixture"])


def test_disk_leaves_a_hugging_face_folder(folders: dict, expected: dict, tmp_path: Path) -> None:
    check(run_ranks(2, three_rounds, folders["qwen3_tied"], {"tensor": 2}, Kind.DISK, tmp_path), expected["qwen3_tied"])
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert (tmp_path / "model.safetensors.index.json").exists()
    last = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert last.keys() == expected["qwen3_tied"][2].keys()
    assert all(torch.equal(last[name], tensor) for name, tensor in expected["qwen3_tied"][2].items())


def test_a_tensor_stays_good_until_its_module_is_complete(folders: dict) -> None:
    """An engine may hold on to a module's first tensors until it has the last."""
    for good in run_ranks(2, tensors_at_the_end_of_their_bucket, folders["qwen3_tied"]):
        assert good


def tensors_at_the_end_of_their_bucket(folder: Path) -> bool:
    sync = SyncSettings(kind=Kind.SHARED_MEMORY, bucket_bytes=BUCKET_BYTES)
    with trainer(folder, with_reference=False, tensor=2, sync=sync) as engine:
        wanted = {name: tensor.clone() for name, tensor in engine.export_weights()}
        found = engine.export_weights()
        good = True
        for bucket in engine._streams.plan:
            kept = [next(found) for _ in bucket.tensors]
            good = good and all(torch.equal(tensor, wanted[name]) for name, tensor in kept)
        engine.close()
        return good


def no_room(folder: Path) -> str:
    shared_memory.shutil.disk_usage = lambda _: shared_memory.shutil._ntuple_diskusage(1 << 20, 1 << 20, 0)
    sync = SyncSettings(kind=Kind.SHARED_MEMORY)
    try:
        with trainer(folder, with_reference=False, tensor=2, sync=sync):
            return "started"
    except WorkError as error:
        return str(error)


def test_too_little_shared_memory_is_said_by_every_rank(folders: dict) -> None:
    for said in run_ranks(2, no_room, folders["qwen3_tied"]):
        assert "/dev/shm has 0 MiB free" in said
        assert "weight_sync.transport=broadcast" in said


def test_the_quickest_transport_that_works_is_taken() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert choose(ranks_per_model=1, one_machine=False, device=cuda) is Kind.IN_PROCESS
    assert choose(ranks_per_model=2, one_machine=True, device=cpu) is Kind.SHARED_MEMORY
    assert choose(ranks_per_model=2, one_machine=True, device=cuda) is Kind.CUDA_IPC
    assert choose(ranks_per_model=2, one_machine=False, device=cuda) is Kind.BROADCAST
