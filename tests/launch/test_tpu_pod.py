"""tpu_pod.sh and tpu_worker.sh: their calls of gcloud and machines, in order, without and with faults."""

import os
import pathlib
import shlex
import signal
import subprocess
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HERE = ["--name=stf", "--zone=us-west4-a", "--poll=0.01"]
TYPE = "--type=v5litepod-32"
# Arguments that a shell would split, expand or run.
PROGRAM_ARGUMENTS = ["--config=configs/demo.py:steps=2", '--workdir=gs://b/it\'s "a"  $HOME `run` & ü', "--x=a\nb"]
UP = ["up", *HERE, TYPE, "--", *PROGRAM_ARGUMENTS]
ALL = ["--node=all", "--worker=all"]
WHERE = ["--zone=us-west4-a", "--quiet"]
STATUS = "tpu_worker.sh status"


def actions(workstation):
    """Summarizes the calls of gcloud, each in one or two words."""
    return [summarize(call["argv"]) for call in workstation.calls("gcloud")]


def summarize(argv):
    assert argv[:2] == ["compute", "tpus"]
    command = next((arg for arg in argv if arg.startswith("--command=")), "")
    names = {"install.sh": " install", "worker.sh run": " run", "worker.sh status": " status", "worker.sh log": " log"}
    return argv[3] + next((name for part, name in names.items() if part in command), "")


INSTALL = ["scp", "ssh install"]
START = ["create", "describe", *INSTALL, "ssh run"]
CHECK = ["describe", "ssh status"]


def test_up_creates_installs_runs_watches_and_deletes(workstation):
    workstation.plan({"when": "describe", "print": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]})
    done = workstation.run("tpu_pod.sh", *UP, "--spaces and 'quotes'", MACHINE=str(workstation.machine))
    assert done.returncode == 0, done.stderr
    assert actions(workstation)[:3] == ["create", "describe", "describe"]
    # It may take several checks until the run has ended.
    checks = actions(workstation)[7:-1]
    assert actions(workstation)[3:7] == ["describe", *INSTALL, "ssh run"]
    assert checks == CHECK * (len(checks) // 2)
    assert actions(workstation)[-1] == "delete"

    tpus = ["compute", "tpus", "queued-resources"]
    calls = [call["argv"] for call in workstation.calls("gcloud")]
    options = ["--accelerator-type=v5litepod-32", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=stf"]
    assert calls[0] == [*tpus, "create", "stf", *WHERE, *options]
    assert calls[1] == [*tpus, "describe", "stf", *WHERE, "--format=value(state.state)"]
    assert calls[4][3:] == ["scp", calls[4][4], "stf:stf-jax.tgz", *ALL, *WHERE]
    assert calls[6][3:-1] == ["ssh", "stf", *ALL, *WHERE]
    assert calls[-1] == [*tpus, "delete", "stf", *WHERE, "--force"]

    # The calls of the machine's Python, after its shell has parsed the command.
    *_, installed, trained = [call for call in workstation.calls("python") if call["argv"][0] == "-m"]
    assert installed["argv"][:3] == ["-m", "pip", "install"]
    assert installed["argv"][-3:] == ["jax[tpu]", "gcsfs", "google-cloud-storage"]
    assert trained["argv"] == ["-m", "stf_jax.main", *PROGRAM_ARGUMENTS, "--spaces and 'quotes'"]
    assert trained["env"]["PYTHONUNBUFFERED"] == "1"
    assert os.listdir(workstation.temporary) == []


def test_install_replaces_the_tree_but_keeps_the_venv(workstation):
    old = workstation.machine / "stf-jax"
    (old / ".venv" / "bin").mkdir(parents=True)
    workstation.add_fake(old / ".venv" / "bin" / "python", "python")
    (old / "stf_jax").mkdir()
    (old / "stf_jax" / "no_longer.py").touch()
    (old / ".hidden").touch()
    (workstation.tree / "stf_jax" / "edited.py").write_text("new\n")
    (workstation.tree / "stf_jax" / "__pycache__").mkdir()
    (workstation.tree / "runs").mkdir()
    done = workstation.run("tpu_pod.sh", "install", *HERE, MACHINE=str(workstation.machine))
    assert done.returncode == 0, done.stderr
    # .venv is kept: no new one was created
    assert not workstation.calls("python3.12")
    expected = {"stf_jax", "configs", "launch", "requirements.txt", "requirements-dev.txt"}
    assert {path.name for path in old.iterdir()} == expected | {".venv"}
    assert {path.name for path in (old / "stf_jax").iterdir()} == {"__init__.py", "edited.py"}


def test_archive_has_what_training_needs(workstation):
    """With the real tree: the archive has the program, and nothing large."""
    tar = [
        line
        for line in workstation.run("tpu_pod.sh", "install", *HERE, "--dry-run").stdout.splitlines()
        if "tar" in line
    ]
    command = shlex.split(tar[0])
    file = workstation.temporary / "archive.tgz"
    assert command[:2] == ["tar", "-czf"]
    subprocess.run(["tar", "-czf", file, "--exclude=__pycache__", "-C", ROOT, *command[6:]], check=True)
    with tarfile.open(file) as archive:
        names = archive.getnames()
    assert {"stf_jax/main.py", "configs/pretrain.py", "launch/install.sh", "requirements.txt"} <= set(names)
    assert file.stat().st_size < 20e6


def test_dry_run_prints_all_commands_and_runs_none(workstation):
    dry = workstation.run("tpu_pod.sh", *UP[:1], "--dry-run", "--spot", *UP[1:])
    assert dry.returncode == 0, dry.stderr
    assert workstation.calls() == []
    assert os.listdir(workstation.temporary) == []
    # Run by a shell, the printed commands do what the real run does.
    workstation.plan({"when": "describe", "print": ["ACTIVE"]}, {"when": STATUS, "print": ["stf-jax: ended 0"]})
    printed = dry.stdout.replace("/tmp/stf-jax/", f"{workstation.temporary}/")
    subprocess.run(["bash", "-ec", printed], env=workstation.env, cwd=workstation.tree, check=True, capture_output=True)
    by_hand = [call["argv"] for call in workstation.calls()]
    (workstation.folder / "calls.jsonl").unlink()
    assert workstation.run("tpu_pod.sh", *UP[:1], "--spot", *UP[1:]).returncode == 0
    real = [call["argv"] for call in workstation.calls()]
    assert actions(workstation) == [*START, *CHECK, "delete"]
    assert "--spot" in real[0]
    for one, other in zip(by_hand, real, strict=True):
        assert [a for a in one if "stf-jax.tgz" not in a] == [a for a in other if "stf-jax.tgz" not in a]


@pytest.mark.parametrize("failing", range(8))
def test_failing_step_ends_the_command_with_its_status_and_name(failing, workstation):
    order = [*START, *CHECK, "delete"]
    step = ["create", "create", "install", "install", "run", "watch", "watch", "delete"][failing]
    rules = [{"when": "describe", "print": ["ACTIVE"]}, {"when": STATUS, "print": ["stf-jax: ended 0"]}]
    previous = order[:failing].count(order[failing])  # earlier calls of the same action
    words = {"ssh install": "install.sh", "ssh run": "worker.sh run", "ssh status": STATUS}
    fault = {"when": words.get(order[failing], f" {order[failing]} "), "status": [0] * previous + [7]}
    for rule in rules:
        if rule["when"] in fault["when"]:
            fault = rule | fault
    workstation.plan(fault, *rules)
    done = workstation.run("tpu_pod.sh", *UP)
    if step == "watch":  # a failing check is repeated ten times
        assert done.returncode == 1
        assert actions(workstation)[5:] == (["describe"] * 10 if order[failing] == "describe" else CHECK * 10)
    else:
        assert done.returncode == 7
        assert actions(workstation) == order[: failing + 1]
    assert f"tpu_pod.sh: {step} ended with status {done.returncode}." in done.stderr
    # It prints the command that deletes the TPU, quoted for a shell.
    hint = shlex.split(done.stderr.splitlines()[-1])
    assert hint[1:] == ["delete", "--name=stf", "--zone=us-west4-a"]
    assert os.listdir(workstation.temporary) == []


RECREATE = ["describe", "delete", *START]
SCENARIOS = {
    # name: (states of the TPU, states of the run, other rules, actions after START, exit status)
    "preempted": (
        ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"],
        ["running", "ended 0"],
        [],
        [*CHECK, "describe", "describe", "delete", "create", "describe", *START[1:], *CHECK, "delete"],
        0,
    ),
    "preempted during installation": (
        ["ACTIVE", "PREEMPTED", "ACTIVE", "PREEMPTED", "PREEMPTED", "ACTIVE"],
        ["ended 0"],
        [{"when": " scp ", "status": [0, 255, 0]}],
        ["describe", "delete", "create", "describe", "scp", "describe", *RECREATE, *CHECK, "delete"],
        0,
    ),
    "rejected by the queue, then granted": (
        ["ACTIVE", "SUSPENDED", "FAILED", "FAILED", "FAILED", "ACTIVE"],
        ["ended 0"],
        [],
        ["describe", "delete", "create", "describe", "describe", *RECREATE, *CHECK, "delete"],
        0,
    ),
    "machines fail before the state shows the preemption": (
        ["ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE"],
        ["running\nstf-jax: ended 134", "ended 0"],
        [],
        [*CHECK, *RECREATE, *CHECK, "delete"],
        0,
    ),
    "a machine rebooted": (
        ["ACTIVE"],
        ["running\nstf-jax: gone", "running", "ended 0\nstf-jax: running", "ended 0\nstf-jax: ended 0"],
        [],
        [*CHECK, "ssh run", *CHECK * 3, "delete"],
        0,
    ),
    "the run fails": (["ACTIVE"], ["ended 0\nstf-jax: ended 1"], [], [*CHECK * 2, "ssh log"], 1),
    "the run fails, and other machines with it": (
        ["ACTIVE"],
        ["ended 134\nstf-jax: ended 75\nstf-jax: ended 1"],
        [],
        [*CHECK * 2, "ssh log"],
        1,
    ),
    "invalid input": (["ACTIVE"], ["ended 2"], [], [*CHECK, "ssh log"], 2),
    "invalid input on one machine": (["ACTIVE"], ["ended 143\nstf-jax: ended 2"], [], [*CHECK, "ssh log"], 2),
    "the first restart fails": (
        ["ACTIVE"],
        ["ended 75"] * 4 + ["ended 0"],
        [{"when": "worker.sh run", "status": [0, 255, 0]}],
        [*[*CHECK * 2, "ssh run"] * 2, *CHECK, "delete"],
        0,
    ),
    "preempted during a restart": (
        ["ACTIVE", "ACTIVE", "ACTIVE", "PREEMPTED", "ACTIVE"],
        ["ended 134", "ended 134", "ended 0"],
        [{"when": "worker.sh run", "status": [0, 255, 0]}],
        [*CHECK * 2, "ssh run", *RECREATE, *CHECK, "delete"],
        0,
    ),
    "unreachable for a while": (
        ["ACTIVE"],
        ["running", "", "unknown", "ended 0"],
        [],
        [*CHECK * 4, "delete"],
        0,
    ),
}


@pytest.mark.parametrize("case", SCENARIOS)
def test_watching(case, workstation):
    states, runs, rules, calls, status = SCENARIOS[case]
    workstation.plan(
        *rules, {"when": "describe", "print": states}, {"when": STATUS, "print": [f"stf-jax: {run}" for run in runs]}
    )
    done = workstation.run("tpu_pod.sh", *UP)
    assert done.returncode == status, done.stderr
    assert actions(workstation) == START + calls
    if status:
        assert f"the run ended with status {status}." in done.stderr
    # The same TPU and run are requested again.
    starts = [
        call["argv"] for call in workstation.calls("gcloud") if "create" in call["argv"] or "worker.sh run" in str(call)
    ]
    for call in starts[2:]:
        assert call in starts[:2]


@pytest.mark.parametrize("status", [75, 134, 137, 139, 143])
def test_run_is_restarted_after_temporary_failures(status, workstation):
    runs = ["running", f"running\nstf-jax: ended {status}", f"ended 143\nstf-jax: ended {status}", "ended 0"]
    workstation.plan(
        {"when": "describe", "print": ["ACTIVE"]}, {"when": STATUS, "print": [f"stf-jax: {run}" for run in runs]}
    )
    done = workstation.run("tpu_pod.sh", *UP)
    assert done.returncode == 0, done.stderr
    assert actions(workstation) == [*START, *CHECK * 3, "ssh run", *CHECK, "delete"]
    assert "Restarting the run, 1 of 10 in a row." in done.stderr


@pytest.mark.parametrize(("run", "checks", "status"), [("ended 75", 2, 75), ("gone", 1, 1)])
def test_maximum_number_of_consecutive_restarts(run, checks, status, workstation):
    workstation.plan({"when": "describe", "print": ["ACTIVE"]}, {"when": STATUS, "print": [f"stf-jax: {run}"]})
    done = workstation.run("tpu_pod.sh", "watch", *HERE, TYPE, "--restarts=2", "--", *PROGRAM_ARGUMENTS)
    assert done.returncode == status
    assert actions(workstation) == [*[*CHECK * checks, "ssh run"] * 2, *CHECK * checks, "ssh log"]
    assert "after 2 consecutive restarts (--restarts)" in done.stderr


def test_an_hour_resets_the_count_of_restarts(workstation):
    workstation.add_fake(workstation.folder / "bin" / "date", "date")
    # When watching begins; then for each run, when its end was noticed and when the next was started.
    times = ["0", "10", "20", "3620", "4000", "7599", "8000", "8010"]
    workstation.plan(
        {"when": "date +%s", "print": times},
        {"when": "describe", "print": ["ACTIVE"]},
        {"when": STATUS, "print": ["stf-jax: gone"]},
    )
    done = workstation.run("tpu_pod.sh", "watch", *HERE, TYPE, "--restarts=1", "--", *PROGRAM_ARGUMENTS)
    assert done.returncode == 1
    assert actions(workstation) == [*CHECK, "ssh run", *CHECK, "ssh run", *CHECK, "ssh log"]


def test_run_is_restarted_on_a_machine(workstation):
    workstation.plan({"when": "describe", "print": ["ACTIVE"]}, {"when": "-m stf_jax.main", "status": [-9, 143, 0]})
    done = workstation.run("tpu_pod.sh", *UP, MACHINE=str(workstation.machine))
    assert done.returncode == 0, done.stderr
    assert [call["argv"] for call in workstation.training_calls()[1:]] == [
        ["-m", "stf_jax.main", *PROGRAM_ARGUMENTS]
    ] * 3
    assert "ended 137" in done.stderr
    assert "ended 143" in done.stderr


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("phase", ["create", "scp", "status"])
def test_interrupt_cleans_up(phase, delete, workstation):
    """A terminal interrupts the script and its child processes."""
    hang = {"create": " create ", "scp": " scp ", "status": STATUS}[phase]
    workstation.plan({"when": hang, "hang": [True]}, {"when": "describe", "print": ["ACTIVE"]})
    process = workstation.start("tpu_pod.sh", UP[0], *["--delete-on-exit"] * delete, *UP[1:])
    workstation.wait_until((workstation.folder / "hangs").exists)
    assert len(os.listdir(workstation.temporary)) == 1
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, (out, err)
    assert os.listdir(workstation.temporary) == []
    if delete:
        assert actions(workstation)[-1] == "delete"
        assert actions(workstation).count("delete") == 1
    else:
        assert "delete" not in actions(workstation)
        hint = shlex.split(err.splitlines()[-1])
        workstation.plan()
        subprocess.run(["bash", *hint], env=workstation.env, cwd=workstation.folder, check=True, capture_output=True)
        assert actions(workstation)[-1] == "delete"


def test_sigterm_interrupts_the_pause_between_checks(workstation):
    workstation.plan({"when": "describe", "print": ["ACTIVE"]}, {"when": STATUS, "print": ["stf-jax: running"]})
    process = workstation.start("tpu_pod.sh", "watch", *HERE, "--poll=50", TYPE, "--", *PROGRAM_ARGUMENTS)
    workstation.wait_until(lambda: actions(workstation) == CHECK)
    workstation.wait_until(
        lambda: subprocess.run(["pgrep", "-P", str(process.pid), "sleep"], capture_output=True).returncode == 0
    )
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "watch ended with status 143" in err
    os.killpg(process.pid, signal.SIGKILL)  # the sleep


def test_direct_creates_a_tpu_vm(workstation):
    workstation.plan(
        {"when": "describe", "print": ["CREATING", "READY", "PREEMPTED", "READY"]},
        {"when": STATUS, "print": ["stf-jax: ended 0"]},
    )
    done = workstation.run(
        "tpu_pod.sh", "up", *HERE, "--type=v5p-32", "--direct", "--spot", "--project=p", "--", *PROGRAM_ARGUMENTS
    )
    assert done.returncode == 0, done.stderr
    assert actions(workstation) == [*START[:1], "describe", *START[1:], *RECREATE, *CHECK, "delete"]
    calls = [call["argv"][2:] for call in workstation.calls("gcloud")]
    where = ["--zone=us-west4-a", "--project=p", "--quiet"]
    options = ["--accelerator-type=v5p-32", "--version=v2-alpha-tpuv5", "--spot"]
    assert calls[0] == ["tpu-vm", "create", "stf", *where, *options]
    assert calls[1] == ["tpu-vm", "describe", "stf", *where, "--format=value(state)"]
    assert calls[5][:-1] == ["tpu-vm", "ssh", "stf", "--worker=all", *where]
    assert calls[-1] == ["tpu-vm", "delete", "stf", *where]


def test_several_slices_are_one_queued_resource(workstation):
    workstation.plan({"when": "describe", "print": ["ACTIVE"]})
    assert workstation.run("tpu_pod.sh", "create", *HERE, "--type=v6e-64", "--node-count=2").returncode == 0
    options = ["--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=stf"]
    assert workstation.calls()[0]["argv"][2:] == ["queued-resources", "create", "stf", *WHERE, *options]


def test_log_and_status(workstation):
    workstation.plan(
        {"when": "describe", "print": ["PROVISIONING", "ACTIVE"]}, {"when": STATUS, "print": ["stf-jax: running"]}
    )
    dry = [
        workstation.run("tpu_pod.sh", subcommand, *HERE, "--dry-run").stdout
        for subcommand in ("status", "log", "delete")
    ]
    assert [line.split()[0] for line in "".join(dry).splitlines()] == ["gcloud"] * 4
    assert workstation.calls() == []
    assert workstation.run("tpu_pod.sh", "status", *HERE).stdout == "stf: PROVISIONING\n"
    assert workstation.run("tpu_pod.sh", "status", *HERE).stdout == "stf: ACTIVE\nstf-jax: running\n"
    assert workstation.run("tpu_pod.sh", "log", *HERE).returncode == 0
    assert workstation.calls()[-1]["argv"][3:-1] == ["ssh", "stf", "--node=0", "--worker=0", *WHERE]
    assert actions(workstation) == ["describe", *CHECK, "ssh log"]


REFUSED = {
    "command": (["fly"], "Unknown command fly"),
    "name": (["log", "--zone=z"], "--name and --zone are required"),
    "option": (["log", *HERE, "--workdir=x"], "Unexpected argument --workdir=x"),
    "type": (["create", *HERE], "--type is required for create"),
    "unknown type": (["create", *HERE, "--type=v9-8"], "give --runtime=VERSION"),
    "no arguments": (["run", *HERE], "Give the arguments of stf_jax.main after --"),
    "slices": (["create", *HERE, TYPE, "--node-count=two"], "--node-count=two"),
    "restarts": (["watch", *HERE, TYPE, "--restarts=few", "--", "x"], "--restarts=few is not"),
    "several slices directly": (["create", *HERE, TYPE, "--node-count=2", "--direct"], "--direct creates one slice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_give_one_sentence(case, workstation):
    argv, message = REFUSED[case]
    done = workstation.run("tpu_pod.sh", *argv)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert workstation.calls() == []


def test_states_of_a_run_on_a_machine(workstation):
    workstation.add_venv()
    hang = [True, True, False, True]
    workstation.plan({"when": "stf_jax.main", "hang": hang, "print": ["one", "two", "three", "four"], "status": [3]})

    def run_worker(*argv):
        done = workstation.run("tpu_worker.sh", *argv)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for_start(number):
        workstation.wait_until(
            lambda: len(workstation.calls("python")) == number and (workstation.folder / "hangs").exists()
        )
        (workstation.folder / "hangs").unlink()
        return workstation.calls("python")[-1]["pid"]

    assert run_worker("status") == "stf-jax: not started\n"
    run_worker("run", *PROGRAM_ARGUMENTS)  # returns while the run continues
    first = wait_for_start(1)
    assert run_worker("status") == "stf-jax: running\n"
    begin = time.monotonic()
    run_worker("run", *PROGRAM_ARGUMENTS)  # ends the first
    assert not workstation.is_alive(first)
    assert time.monotonic() - begin < 20  # it ended by itself, rather than being killed after a timeout
    second = wait_for_start(2)
    assert run_worker("status") == "stf-jax: running\n"
    os.killpg(os.getpgid(second), signal.SIGKILL)  # as a reboot of the machine does
    workstation.wait_until(lambda: run_worker("status") == "stf-jax: gone\n")
    run_worker("run", *PROGRAM_ARGUMENTS)
    workstation.wait_until(lambda: run_worker("status") == "stf-jax: ended 3\n")
    assert run_worker("log") == "one\ntwo\nthree\n"
    run_worker("run", *PROGRAM_ARGUMENTS)
    fourth = wait_for_start(4)
    assert run_worker("status") == "stf-jax: running\n"
    os.killpg(os.getpgid(fourth), signal.SIGKILL)
    assert [call["argv"] for call in workstation.calls("python")] == [["-m", "stf_jax.main", *PROGRAM_ARGUMENTS]] * 4


@pytest.mark.parametrize("saves", [True, False])
def test_run_that_is_ended_has_time_to_save(saves, workstation):
    workstation.add_venv()
    workstation.plan(
        {"when": "stf_jax.main", "hang": [True, False], "save_on_sigterm": [saves], "ignore_sigterm": [not saves]}
    )
    # The script waits for two minutes, in this test for one second.
    flock = workstation.folder / "bin" / "flock"
    flock.write_text('#!/bin/sh\n[ "$2" != 120 ] || { shift 2; set -- --timeout 1 "$@"; }\nexec /usr/bin/flock "$@"\n')
    flock.chmod(0o755)
    workstation.run("tpu_worker.sh", "run", *PROGRAM_ARGUMENTS)
    workstation.wait_until((workstation.folder / "hangs").exists)
    (first,) = workstation.calls("python")
    begin = time.monotonic()
    assert workstation.run("tpu_worker.sh", "run", *PROGRAM_ARGUMENTS).returncode == 0
    assert time.monotonic() - begin < 20
    assert not workstation.is_alive(first["pid"])
    assert workstation.count("saved") == saves
    workstation.wait_until(lambda: workstation.run("tpu_worker.sh", "status").stdout == "stf-jax: ended 0\n")
    assert len(workstation.calls("python")) == 2
