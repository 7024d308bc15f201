import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_klrl.config.cluster import Cluster
from megatron_klrl.errors import UserError
from megatron_klrl.launch.batch_script import BatchJob, Kind, job_name, render_node_script, render_script
from tests.unit.launch.rendered import FOLDER, JOBS, train

TRAIN = train(container=False)


def with_cluster(**settings: object) -> str:
    """The training's script for a changed cluster."""
    cluster = Cluster.model_validate({**TRAIN.cluster.model_dump(exclude_none=True), **settings})
    return render_script(replace(TRAIN, cluster=cluster))


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, flags=re.MULTILINE)


@pytest.mark.parametrize("name", list(JOBS))
def test_rendered_examples_are_what_the_code_renders(name: str) -> None:
    """Shown in slurm/rendered; after a wanted change: python -m tests.unit.launch.rendered"""
    assert (FOLDER / name).read_text() == render_script(JOBS[name])


def test_no_rendered_example_is_left_over() -> None:
    assert {file.name for file in FOLDER.iterdir()} == set(JOBS)


@pytest.mark.parametrize("name", list(JOBS))
def test_scripts_are_valid_shell(name: str) -> None:
    file = FOLDER / name
    assert subprocess.run(["bash", "-n", str(file)], capture_output=True, check=False).stderr == b""
    if shutil.which("shellcheck"):
        # SC2317: it does not see that a trap calls a function.
        command = ["shellcheck", "--shell=bash", "--exclude=SC2317", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout == ""


def test_sbatch_options_come_before_the_first_command() -> None:
    """sbatch stops reading them at the first line that is no comment."""
    lines = render_script(TRAIN).splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


def test_what_a_cluster_leaves_open_is_not_asked_for() -> None:
    script = render_script(replace(TRAIN, cluster=Cluster(gpus_per_node=0, ranks_per_node=2, cpus_per_rank=3)))
    options = [line.split("=")[0] for line in directives(script)]
    assert not {"--partition", "--account", "--qos", "--time", "--gpus-per-node", "--mem", "--exclusive"} & set(options)
    assert "--cpus-per-task=6" in directives(script)
    assert "SOCKET_IFNAME" not in script


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"gpu_type": "h200"}, "#SBATCH --gpus-per-node=h200:8"),
        ({"options": ["--constraint=h100&nvlink"]}, "#SBATCH --constraint=h100&nvlink"),
        ({"qos": "high"}, "#SBATCH --qos=high"),
        ({"modules": ["gcc/13 x"]}, "module load 'gcc/13 x'"),
        ({"setup": ["source /opt/site.sh"]}, "source /opt/site.sh"),
        ({"environment": {"A": "1; rm -rf $HOME"}}, "export A='1; rm -rf $HOME'"),
        ({"environment": {"OMP_NUM_THREADS": "4"}}, "export OMP_NUM_THREADS=4"),
        ({"network_interface": "eth0"}, "export GLOO_SOCKET_IFNAME=eth0"),
        ({"save_s": 77}, "#SBATCH --signal=B:USR1@77"),
        ({"requeues": 3}, "requeues=3"),
    ],
)
def test_settings_reach_the_script(settings: dict[str, object], line: str) -> None:
    assert line in with_cluster(**settings).splitlines()


def test_restarts_reach_torchrun() -> None:
    assert " --max-restarts=5 " in with_cluster(restarts=5)


def test_online_jobs_may_ask_the_hub() -> None:
    assert "HF_HUB_OFFLINE=1" in with_cluster()
    assert "OFFLINE" not in with_cluster(offline=False)


def test_a_container_mounts_what_the_job_needs() -> None:
    script = render_script(train(container=True))
    mounts = "/shared/models:/shared/models:ro,/shared/data,/home/me/project:/home/me/project"
    own = "/home/me/project/runs/first:/home/me/project/runs/first"
    assert f"        --container-mounts={mounts},{own} \\" in script.splitlines()


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """The values that a user chooses are seen by bash as one word each, whatever they hold."""
    hostile = "a '$(touch pwned)' `touch pwned`; touch pwned #"
    job = replace(TRAIN, run_dir=tmp_path / hostile, arguments=("train", hostile, "{{srun}}"), python=hostile)
    script = render_script(job)
    said = re.sub(r"(?s)\n\(\n.*?\) &\n.*", "\n", script)  # up to the step; then only what it would run
    step = re.search(r"--no-python (.*?\n.*)\n\) &", script)
    assert step is not None
    program = said.replace(f"cd {TRAIN.work_dir} || exit 1", f"cd '{tmp_path}'").replace(
        "head=$(scontrol", "head=$(true"
    )
    text = f"{program}\nprintf '%s\\n' {step[1]}\n"
    done = subprocess.run(
        ["bash", "-c", text],
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (
        done.stdout.splitlines()[-6:] == [hostile, "-P", "-m", "megatron_klrl.cli", "train", hostile, "{{srun}}"][-6:]
    )
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("character", ['"', "\\", "\n", ":", ",", "\x1b"])
def test_paths_that_no_script_can_hold_are_refused(character: str) -> None:
    with pytest.raises(UserError, match=r"--run-dir: .* Fix: choose a path"):
        render_script(replace(TRAIN, run_dir=Path(f"/home/x{character}y")))


def test_percent_signs_of_a_path_are_no_pattern() -> None:
    script = render_script(replace(TRAIN, run_dir=Path("/home/100%j")))
    assert '--output="/home/100%%j/slurm/job-%j.out"' in directives(script)


def test_names_become_names_of_jobs() -> None:
    assert job_name("math_qwen2.5-7b") == "math_qwen2.5-7b"
    assert job_name("a b;$(c)\n") == "a_b___c__"
    assert len(job_name("x" * 500)) == 64


def test_nemo_runs_nodes_fail_after_a_save() -> None:
    """NeMo-Run requeues what fails."""
    script = render_node_script(TRAIN)
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).stderr == ""
    assert '"$head:$port" --rdzv-id="$SLURM_JOB_ID-$start"' in script
    assert script.index('if [ -e "$unfinished" ]') < script.index("exit 75")
    assert "#SBATCH" not in script
    assert "{{" not in script


def test_every_kind_has_a_template() -> None:
    assert {job.kind for job in JOBS.values()} == set(Kind)
    assert isinstance(TRAIN, BatchJob)
