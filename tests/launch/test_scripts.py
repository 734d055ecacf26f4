"""Properties of all scripts of launch/, and install.sh, restart.sh, gpu_node.sh, slurm.sbatch and local.sh."""

import importlib
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
PROGRAM_ARGUMENTS = ["--config=configs/demo.py", '--workdir=it\'s "a"  $HOME `run`']
TRAIN = ["-m", "stf_jax.main", *PROGRAM_ARGUMENTS]


def test_scripts_stop_at_the_first_error():
    for script in SCRIPTS:
        text = script.read_text()
        assert "\nset -euo pipefail\n" in text, script
        assert not re.search(r"\beval\b", text), script
        assert os.access(script, os.X_OK), script


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_help_prints_the_header(script, workstation):
    done = workstation.run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"launch/{script} " in done.stdout
    assert done.stderr == ""
    assert not re.search(r"^#", done.stdout, re.MULTILINE)
    assert workstation.calls() == []


# ---- install.sh ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", ["tpu", "cuda12"])
def test_install_uses_the_pinned_version_of_jax(accelerator, workstation):
    assert workstation.run("install.sh", accelerator).returncode == 0
    assert [call["argv"] for call in workstation.calls("python3.12")][-1] == ["-m", "venv", ".venv"]
    (pip,) = [call["argv"] for call in workstation.calls("python") if call["argv"][0] == "-m"]
    # Without a version: requirements.txt, in the same command, pins it.
    assert pip[-3:] == [f"jax[{accelerator}]", "gcsfs", "google-cloud-storage"]
    assert pip[pip.index("--requirement") + 1] == "requirements.txt"
    pins = (ROOT / "requirements.txt").read_text()
    assert len(re.findall(r"^jax==", pins, re.MULTILINE)) == 2
    constraints = (ROOT / pip[pip.index("--constraint") + 1]).read_text()
    assert re.search(r"^gcsfs==", constraints, re.MULTILINE)
    assert re.search(r"^google-cloud-storage==", constraints, re.MULTILINE)
    # A second time, with the existing .venv.
    assert workstation.run("install.sh", accelerator).returncode == 0
    assert len([call for call in workstation.calls("python3.12") if "venv" in call["argv"]]) == 1


def test_machine_with_an_old_python_gets_a_new_one(workstation):
    (workstation.folder / "bin" / "python3.12").unlink()
    workstation.add_fake(workstation.folder / "bin" / "python3.11", "python3.11")
    workstation.add_fake(workstation.folder / "bin" / "python3", "python3")
    workstation.plan(
        {"when": "ensurepip", "status": [1]}, {"when": "uv venv", "status": [9]}
    )  # the script may end here
    assert workstation.run("install.sh", "tpu").returncode == 9
    assert [call["argv"] for call in workstation.calls("python3")] == [
        ["-m", "pip", "install", "--quiet", "--user", "uv"],
        ["-m", "uv", "venv", "--quiet", "--seed", "--python", "3.12", ".venv"],
    ]


def test_install_refuses_unknown_accelerators(workstation):
    assert workstation.run("install.sh", "npu").returncode == 2
    assert workstation.calls() == []


# ---- restart.sh ------------------------------------------------------------------------------------------------------

COMMAND = ["tree/.venv/bin/python", *TRAIN]


@pytest.fixture
def node(workstation):
    """A workstation where sleep returns at once."""
    workstation.add_fake(workstation.folder / "bin" / "sleep", "sleep")
    return workstation.add_venv()


@pytest.mark.parametrize("status", [75, 143, 134, 137, 139, -signal.SIGTERM, -signal.SIGABRT, -9, -signal.SIGSEGV])
def test_restart_after_temporary_failures(status, node):
    node.plan({"when": "stf_jax.main", "status": [status, status, 0]})
    done = node.run("restart.sh", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert [call["argv"] for call in node.training_calls()] == [TRAIN] * 3
    assert [call["argv"] for call in node.calls("sleep")] == [["10"]] * 2
    found = re.findall(r"ended with status (\d+); restarting in 10 s, (\d) of 10 in a row", done.stderr)
    assert found == [(str(status if status > 0 else 128 - status), count) for count in "12"]


@pytest.mark.parametrize("status", [0, 1, 2, 3, 130])
def test_no_restart_after_permanent_failures(status, node):
    node.plan({"when": "stf_jax.main", "status": [status]})
    assert node.run("restart.sh", *COMMAND).returncode == status
    assert len(node.training_calls()) == 1
    assert node.calls("sleep") == []


@pytest.mark.parametrize("restarts", [0, 3])
def test_maximum_number_of_consecutive_restarts(restarts, node):
    node.plan({"when": "stf_jax.main", "status": [75]})
    done = node.run("restart.sh", *COMMAND, RESTARTS=str(restarts))
    assert done.returncode == 75
    assert len(node.training_calls()) == restarts + 1
    assert f"after {restarts} consecutive restarts (RESTARTS)" in done.stderr


def test_an_hour_resets_the_count_of_restarts(node):
    node.add_fake(node.folder / "bin" / "date", "date")
    times = ["0", "10", "20", "3620", "4000", "7599", "8000", "8010"]  # of starts and ends
    node.plan({"when": "stf_jax.main", "status": [75]}, {"when": "date +%s", "print": times})
    assert node.run("restart.sh", *COMMAND, RESTARTS="1").returncode == 75
    assert len(node.training_calls()) == 3


def test_restarts_must_be_a_number(job):
    for script in ("restart.sh", "../../slurm_script"):
        done = job.run(script, *COMMAND, RESTARTS="few")
        assert done.returncode == 2
        assert done.stderr == "error: RESTARTS=few is not a number.\n"
    assert job.calls() == []


SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("script", ["restart.sh", "gpu_node.sh", "local.sh"])
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_to_all_saves_once_and_ends(number, script, node):
    """A terminal also sends HUP and INT to the program, which must not count them as a second signal."""
    node.plan({"when": "stf_jax.main", "hang": [True], "save_on_sigterm": [True]})
    process = node.start(script, *(COMMAND if script == "restart.sh" else PROGRAM_ARGUMENTS))
    node.wait_until((node.folder / "hangs").exists)
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "restarting" not in err
    assert (node.count("saved"), len(node.training_calls())) == (1, 1)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_to_the_script_alone_is_passed_on(number, node):
    node.plan({"when": "stf_jax.main", "hang": [True], "save_on_sigterm": [True]})
    process = node.start("restart.sh", *COMMAND)
    node.wait_until((node.folder / "hangs").exists)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (node.count("saved"), len(node.training_calls())) == (1, 1)


def test_second_signal_is_passed_on(node):
    node.plan({"when": "stf_jax.main", "hang": [True], "save_on_sigterm": [True]})
    process = node.start("restart.sh", *COMMAND)
    node.wait_until((node.folder / "hangs").exists)
    process.send_signal(signal.SIGTERM)
    node.wait_until((node.folder / "saving").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (node.count("saved"), len(node.training_calls())) == (0, 1)


def test_signal_ends_the_pause(node):
    node.plan({"when": "stf_jax.main", "status": [75]}, {"when": "sleep 10", "hang": [True]})
    process = node.start("restart.sh", *COMMAND)
    node.wait_until((node.folder / "hangs").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert len(node.training_calls()) == 1


# ---- gpu_node.sh -----------------------------------------------------------------------------------------------------


def test_gpu_node_installs_once_and_trains(workstation):
    workstation.add_venv().plan(
        {"when": "jax_cuda12_plugin", "status": [1, 0]}, {"when": "stf_jax.main", "status": [3]}
    )
    flags = ["--coordinator=node0:1234", "--processes=2", "--process=1"]
    for _ in range(2):
        assert workstation.run("gpu_node.sh", *PROGRAM_ARGUMENTS, *flags).returncode == 3
    calls = [call["argv"] for call in workstation.calls("python") if call["argv"][0] == "-m"]
    assert calls[0][1] == "pip"
    assert calls[1:] == [[*TRAIN, *flags]] * 2
    env = workstation.calls("python")[-1]["env"]
    assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".92"
    assert env["JAX_PLATFORMS"] == "cuda,cpu"


def test_gpu_node_restarts(node):
    node.plan({"when": "stf_jax.main", "status": [75, 0]})
    assert node.run("gpu_node.sh", *PROGRAM_ARGUMENTS).returncode == 0
    assert [call["argv"] for call in node.training_calls()] == [TRAIN] * 2


# ---- slurm.sbatch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(workstation):
    """A workstation in a job of two tasks: SLURM runs a copy of the script, and sets the folder of submission."""
    shutil.copy(workstation.tree / "launch" / "slurm.sbatch", workstation.folder / "slurm_script")
    shutil.move(workstation.tree / "launch" / "slurm.sbatch", workstation.tree / "launch" / "moved_away")
    os.link(workstation.folder / "slurm_script", workstation.tree / "launch" / "slurm.sbatch")
    workstation.add_fake(workstation.folder / "bin" / "sleep", "sleep")
    workstation.env |= {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(workstation.tree), "SLURM_CPUS_PER_TASK": "8"}
    return workstation.add_venv()


def test_sbatch_options():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    # With these a process would see only one GPU, and use the i-th.
    assert not {"gpus-per-task", "gpu-bind", "gres"} & options.keys()
    assert options["requeue"] == ""
    assert options["open-mode"] == "append"
    assert options["signal"] == "B:USR1@120"
    # SLURM reads options only before the first command.
    assert text.rindex("\n#SBATCH") < text.index("set -euo")


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_job_ends_with_the_status_of_its_tasks(status, job):
    job.plan({"when": "stf_jax.main", "status": [status]})
    done = job.run("../../slurm_script", *PROGRAM_ARGUMENTS)
    assert done.returncode == status, done.stderr
    (srun,) = [call["argv"] for call in job.calls("srun")]
    assert srun[:3] == ["--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=8"]
    assert [call["argv"] for call in job.training_calls()] == [TRAIN] * 2
    tasks = [call["env"] for call in job.training_calls()]
    assert sorted(env["SLURM_LOCALID"] for env in tasks) == ["0", "1"]
    for env in tasks:
        assert env["JAX_PLATFORMS"] == "cuda,cpu"
        assert env["PYTHONUNBUFFERED"] == "1"
    assert job.calls("scontrol") == []
    assert job.calls("sleep") == []


REQUEUED = [["requeue", "77"]]


@pytest.mark.parametrize(("one", "other", "status"), [(2, -6, 2), (134, 2, 2), (1, -9, 1), (143, 1, 1), (75, 2, 2)])
def test_job_ends_with_the_status_of_the_cause(one, other, status, job):
    job.plan({"when": "task=0", "status": [one]}, {"when": "task=1", "status": [other]})
    assert job.run("../../slurm_script", *PROGRAM_ARGUMENTS).returncode == status
    assert job.calls("scontrol") == []


@pytest.mark.parametrize(("one", "other"), [(75, 75), (75, -6), (-9, 75), (0, -11), (134, 137)])
def test_job_is_requeued_after_temporary_failures(one, other, job):
    job.plan({"when": "task=0", "status": [one]}, {"when": "task=1", "status": [other]})
    done = job.run("../../slurm_script", *PROGRAM_ARGUMENTS, SLURM_RESTART_COUNT="99")
    assert done.returncode == 0, done.stderr
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED
    assert job.calls("sleep") == []


@pytest.mark.parametrize(("count", "restarts"), [({"SLURM_RESTART_COUNT": "100"}, {}), ({}, {"RESTARTS": "0"})])
def test_maximum_number_of_requeues(count, restarts, job):
    job.plan({"when": "stf_jax.main", "status": [75]})
    done = job.run("../../slurm_script", *PROGRAM_ARGUMENTS, **count, **restarts)
    assert done.returncode == 75
    assert "after " + count.get("SLURM_RESTART_COUNT", "0") + " requeues (RESTARTS)" in done.stderr
    assert job.calls("scontrol") == []


def test_job_is_requeued_after_a_failure_of_srun(job):
    srun = job.folder / "bin" / "srun"
    srun.write_text("#!/bin/sh\nexit 1\n")
    assert job.run("../../slurm_script", *PROGRAM_ARGUMENTS).returncode == 0
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED


def start_hanging_job(job):
    process = job.start("../../slurm_script", *PROGRAM_ARGUMENTS, SLURM_RESTART_COUNT="100")
    job.wait_until(lambda: job.count("hangs") == 2)
    return process


def test_job_at_its_time_limit_saves_and_is_requeued(job):
    """The maximum number of requeues does not apply."""
    job.plan({"when": "stf_jax.main", "hang": [True], "save_on_sigterm": [True]})
    process = start_hanging_job(job)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert job.count("saved") == 2  # before it is requeued
    assert [call["argv"] for call in job.calls("scancel")] == [["--signal=TERM", "77"]]
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED
    for call in job.training_calls():
        assert not job.is_alive(call["pid"])


def test_job_is_requeued_if_its_tasks_cannot_be_signaled(job):
    job.plan({"when": "stf_jax.main", "hang": [True]}, {"when": "scancel", "status": [1]})
    process = start_hanging_job(job)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED


def test_task_that_has_saved_does_not_end_one_that_is_saving(job):
    job.plan(
        {"when": "task=0", "status": [143]},
        {"when": "task=1", "after_end_of": ["task=0"], "delay": [0.3], "print": ["saved"], "status": [143]},
    )
    assert "saved\n" in job.run("../../slurm_script", *PROGRAM_ARGUMENTS).stdout


def test_job_whose_tasks_were_ended_waits_for_slurm(job):
    job.plan({"when": "stf_jax.main", "hang": [True], "save_on_sigterm": [True]}, {"when": "sleep 600", "hang": [True]})
    process = start_hanging_job(job)
    (job.folder / "hangs").unlink()
    for call in job.training_calls():  # as SLURM does to all steps of a preempted job
        os.kill(call["pid"], signal.SIGTERM)
    job.wait_until((job.folder / "hangs").exists)
    assert [call["argv"] for call in job.calls("sleep")] == [["600"]]
    assert job.calls("scontrol") == []
    assert job.count("saved") == 2
    process.send_signal(signal.SIGUSR1)  # its time limit comes first
    assert process.wait(timeout=30) == 0
    os.kill(job.calls("sleep")[0]["pid"], signal.SIGKILL)
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED


def test_job_that_slurm_does_not_end_is_requeued(job):
    job.plan({"when": "stf_jax.main", "status": [143]})
    assert job.run("../../slurm_script", *PROGRAM_ARGUMENTS).returncode == 0
    assert [call["argv"] for call in job.calls("sleep")] == [["600"]]
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED


@pytest.mark.parametrize("script", ["gpu_node.sh", "../../slurm_script"])
def test_machine_without_gpus_is_refused(script, job):
    job.plan({"when": "nvidia-smi", "status": [9]})
    done = job.run(script, *PROGRAM_ARGUMENTS)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nvidia-smi finds no GPU on ")
    assert job.calls("srun") == job.training_calls() == []


def test_job_without_jax_for_gpus_is_refused(job):
    job.plan({"when": "jax_cuda12_plugin", "status": [1]})
    done = job.run("../../slurm_script", *PROGRAM_ARGUMENTS)
    assert done.returncode == 2
    assert "launch/install.sh cuda12" in done.stderr
    assert job.calls("srun") == []


@pytest.mark.parametrize("script", ["gpu_node.sh", "slurm.sbatch"])
def test_the_compilers_of_plan_are_not_jax_for_gpus(script, tmp_path):
    """This environment has jax's plugin for GPUs without CUDA's libraries."""
    (check,) = re.findall(r"-c '(import .*)' 2>", (ROOT / "launch" / script).read_text())
    (tmp_path / "nvidia" / "cublas").mkdir(parents=True)
    for path, status in (("", 1), (str(tmp_path), 0)):
        done = subprocess.run(
            [sys.executable, "-c", check], env={"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
        )
        assert done.returncode == status
    importlib.import_module("jax_cuda12_plugin")


# ---- local.sh --------------------------------------------------------------------------------------------------------


def test_local_runs_one_process(workstation):
    workstation.add_venv().plan({"when": "stf_jax.main", "status": [5]})
    assert workstation.run("local.sh", *PROGRAM_ARGUMENTS, DEVICES="8").returncode == 5
    (call,) = workstation.calls()
    assert call["argv"] == TRAIN
    assert (call["env"]["JAX_PLATFORMS"], call["env"]["JAX_NUM_CPU_DEVICES"]) == ("cpu", "8")


@pytest.mark.parametrize(("script", "processes"), [("local.sh", ""), ("local.sh", "2"), ("gpu_node.sh", "")])
def test_paths_are_relative_to_the_callers_folder(script, processes, workstation):
    empty = dict.fromkeys(("DEVICES", "RESTARTS"), "")  # count as unset
    done = workstation.add_venv().run(script, *PROGRAM_ARGUMENTS, PROCESSES=processes, PYTHONPATH="/other", **empty)
    assert done.returncode == 0, done.stderr
    assert len(workstation.training_calls()) == int(processes or 1)
    for call in workstation.training_calls():
        assert call["argv"][: len(TRAIN)] == TRAIN
        assert pathlib.Path(call["cwd"]) == workstation.folder != workstation.tree
        # The program is the one next to the script, even if the caller's folder has another.
        folders = call["env"]["PYTHONPATH"].split(":")
        assert (folders[0], folders[-1], call["env"]["PYTHONSAFEPATH"]) == (str(workstation.tree), "/other", "1")


def test_processes_are_connected_through_a_free_port(workstation):
    workstation.add_venv().plan(
        {"when": "--process=0", "print": ["first"]}, {"when": "--process=1", "print": ["second"]}
    )
    done = workstation.run("local.sh", *PROGRAM_ARGUMENTS, PROCESSES="3", DEVICES="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "first\n", "")
    calls = sorted(call["argv"] for call in workstation.calls("python") if call["argv"][0] == "-m")
    coordinator = calls[0][-3]
    assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d{4,5}", coordinator)
    assert calls == [[*TRAIN, coordinator, "--processes=3", f"--process={i}"] for i in range(3)]
    assert os.listdir(workstation.temporary) == []


def start_three(workstation, *rules):
    """Starts three processes and waits until all are running."""
    workstation.add_venv().plan(*rules, {"when": "stf_jax.main", "hang": [True]})
    process = workstation.start("local.sh", *PROGRAM_ARGUMENTS, PROCESSES="3")
    workstation.wait_until(lambda: len(workstation.training_calls()) == 3)
    return process


def test_killed_process_is_restarted_with_all_others(node):
    # Not before the other is running, or that might be ended before it records its call.
    killed = {"when": "--process=1", "after_start_of": ["--process=0"], "status": [-9, 0]}
    node.plan(killed, {"when": "stf_jax.main", "hang": [True, True, False]})
    done = node.run("local.sh", *PROGRAM_ARGUMENTS, PROCESSES="2")
    assert done.returncode == 0, done.stderr
    assert "process 1 of 0 to 1 ended with status 137" in done.stderr
    assert [call["argv"][-1] for call in node.training_calls()].count("--process=0") == 2


def test_exit_status_is_the_lowest_failure(node):
    first = {"when": "--process=1", "after_start_of": ["--process=0"], "status": [2]}
    node.plan({"when": "--process=0", "after_end_of": ["--process=1"], "status": [-6]}, first)
    assert node.run("local.sh", *PROGRAM_ARGUMENTS, PROCESSES="2").returncode == 2
    assert len(node.training_calls()) == 2


def test_processes_that_stop_together_have_time_to_save(workstation):
    slow = {"after_end_of": ["--process=0"], "delay": [1], "print": ["saved"], "status": [143]}
    workstation.add_venv().plan({"when": "--process=0", "status": [143]}, {"when": "--process=1"} | slow)
    done = workstation.run("local.sh", *PROGRAM_ARGUMENTS, PROCESSES="2", RESTARTS="0")
    assert done.returncode == 143
    assert "saved\n" in done.stderr


def test_failing_process_ends_all_with_its_status(workstation):
    # Not before the others are running, or they might be ended before they record their calls.
    failing = {"when": "--process=1", "after_start_of": ["--process=0 --process=2"], "print": ["it broke"]}
    process = start_three(workstation, failing | {"status": [6]})
    _, err = process.communicate(timeout=30)
    assert process.returncode == 6
    assert "process 1 of 0 to 2 ended with status 6" in err
    assert "it broke" in err
    for call in workstation.calls("python"):
        assert not workstation.is_alive(call["pid"])
    (logs,) = workstation.temporary.iterdir()
    assert str(logs) in err
    assert sorted(os.listdir(logs)) == ["process_1.log", "process_2.log"]


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_save_and_end_all_processes(number, workstation):
    process = start_three(workstation, {"when": "stf_jax.main", "hang": [True], "save_on_sigterm": [True]})
    workstation.wait_until(lambda: workstation.count("hangs") == 3)
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (workstation.count("saved"), len(workstation.training_calls())) == (3, 3)
    for call in workstation.calls("python"):
        assert not workstation.is_alive(call["pid"])


def test_processes_must_be_a_number(workstation):
    done = workstation.add_venv().run("local.sh", *PROGRAM_ARGUMENTS, PROCESSES="two")
    assert done.returncode == 2
    assert done.stderr.startswith("error: PROCESSES=two")
    assert workstation.calls() == []
