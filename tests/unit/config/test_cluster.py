from pathlib import Path

import pytest

from megatron_klrl.config.cluster import Cluster, load_cluster
from megatron_klrl.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[3] / "slurm" / "clusters").glob("*.yaml"))
SMALLEST = "gpus_per_node: 8\ncpus_per_rank: 12\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_load(file: Path) -> None:
    assert load_cluster(file).ranks_of_node > 0


def test_gpus_are_ranks_unless_said_otherwise(tmp_path: Path) -> None:
    assert load_cluster(write(tmp_path, SMALLEST)).ranks_of_node == 8
    assert load_cluster(write(tmp_path, SMALLEST + "ranks_per_node: 4\n")).ranks_of_node == 4


def test_the_command_line_comes_after_the_file(tmp_path: Path) -> None:
    cluster = load_cluster(write(tmp_path, SMALLEST + "nodes: 3\n"), {"nodes": 5})
    assert cluster.nodes == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("patrition: gpu", r"patrition: unknown key\. Fix: did you mean partition\?"),
        ("zzz: 1", r"zzz: unknown key\. Fix: keys of it: partition, account"),
        ("container: {imgae: x}", r"container\.imgae: unknown key\. Fix: did you mean container\.image\?"),
        ("gpus_per_node: many", r"gpus_per_node: is 'many', expected a whole number"),
        ("nodes: 0", r"nodes: is 0, expected a number at least 1"),
        ("partition: 'a b'", r"partition: is 'a b', expected a name"),
        ('account: "x\\n#SBATCH --uid=root"', r"account: is .*, expected a name"),
        ("time: 4:00:00", r"time: is 14400, expected text, in quotes"),
        ("time: 4 hours", r"time: is '4 hours', expected a time such as"),
        ("options: ['--wrap=a b']", r"options\.0: is '--wrap=a b', expected one sbatch option"),
        ("options: [-N2]", r"options\.0: is '-N2', expected one sbatch option"),
        ('setup: ["a\\nb"]', r"setup\.0: is 'a\\nb', expected one line of text"),
        ("environment: {A-B: x}", r"environment\.A-B: is 'A-B', expected a name of a variable"),
        ("memory: lots", r"memory: is 'lots', expected memory such as 200G"),
        ("network_interface: 'a b'", r"network_interface: is 'a b', expected a network interface"),
        ("container: {image: x, mounts: ['a,b']}", r"container\.mounts\.0: is 'a,b', expected a mount"),
        ("venv: .venv\ncontainer: {image: x}", r"venv: excludes container\. Fix: keep one"),
        ("ranks_per_node: 9", r"ranks_per_node: 9 ranks share 8 GPUs\. Fix: set it to 8 or less"),
        ("save_s: 70000", r"save_s: is 70000, expected a number at most 65535"),
    ],
)
def test_what_does_not_belong_is_named(tmp_path: Path, text: str, expected: str) -> None:
    lines = [line for line in SMALLEST.splitlines() if line.split(":")[0] != text.split(":")[0]]
    with pytest.raises(UserError, match=expected) as caught:
        load_cluster(write(tmp_path, "\n".join([*lines, text])))
    assert str(tmp_path / "cluster.yaml") in str(caught.value)


def test_cpu_nodes_need_a_number_of_ranks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ranks_per_node: is needed where gpus_per_node is 0"):
        load_cluster(write(tmp_path, "gpus_per_node: 0\ncpus_per_rank: 1\n"))


def test_missing_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cpus_per_rank: is required\. Fix: add cpus_per_rank"):
        load_cluster(write(tmp_path, "gpus_per_node: 8\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "holds no cluster settings"), ("- a\n", "holds no cluster settings"), ("a: [", "is not YAML")],
)
def test_files_that_are_no_cluster_files(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_cluster(write(tmp_path, text))


def test_a_missing_file_points_at_the_examples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such cluster file\. Fix: .*slurm/clusters"):
        load_cluster(tmp_path / "none.yaml")


def test_every_key_is_explained_in_the_guide() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "guide" / "slurm.md").read_text(encoding="utf-8")
    rows = dict(line.strip("| ").split(" | ", 1) for line in guide.splitlines() if line.startswith("| `"))
    fields = {f"`{name}`": field.description for name, field in Cluster.model_fields.items()}
    assert {name: rows.get(name, "").split(" | ")[-1].rstrip(" |") for name in fields} == {
        name: " ".join(str(text).split()) for name, text in fields.items()
    }
