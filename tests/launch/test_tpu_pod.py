"""tpu_pod.sh and tpu_worker.sh: what they ask of gcloud and of machines, in which order, and what faults do to it."""

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
# What a shell would take apart, expand or run.
PROGRAM = ["--config=configs/demo.py:steps=2", '--workdir=gs://b/it\'s "a"  $HOME `run` & ü', "--x=a\nb"]
UP = ["up", *HERE, TYPE, "--", *PROGRAM]
ALL = ["--node=all", "--worker=all"]
WHERE = ["--zone=us-west4-a", "--quiet"]
STATUS = "tpu_worker.sh status"


def verbs(desk):
    """The calls of gcloud, each as a word or two."""
    return [verb(call["argv"]) for call in desk.calls("gcloud")]


def verb(argv):
    assert argv[:2] == ["compute", "tpus"]
    command = next((arg for arg in argv if arg.startswith("--command=")), "")
    kind = {"install.sh": " install", "worker.sh run": " run", "worker.sh status": " status", "worker.sh log": " log"}
    return argv[3] + next((name for part, name in kind.items() if part in command), "")


INSTALLED = ["scp", "ssh install"]
MADE = ["create", "describe", *INSTALLED, "ssh run"]
LOOKED = ["describe", "ssh status"]


def test_up_creates_installs_runs_watches_and_deletes(desk):
    desk.plan({"when": "describe", "say": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]})
    done = desk.run("tpu_pod.sh", *UP, "--spaces and 'quotes'", MACHINE=str(desk.machine))
    assert done.returncode == 0, done.stderr
    assert verbs(desk)[:3] == ["create", "describe", "describe"]
    # The machine may need a look or two until the run has ended.
    looks = verbs(desk)[7:-1]
    assert verbs(desk)[3:7] == ["describe", *INSTALLED, "ssh run"]
    assert looks == LOOKED * (len(looks) // 2)
    assert verbs(desk)[-1] == "delete"

    tpus = ["compute", "tpus", "queued-resources"]
    calls = [call["argv"] for call in desk.calls("gcloud")]
    kind = ["--accelerator-type=v5litepod-32", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=stf"]
    assert calls[0] == [*tpus, "create", "stf", *WHERE, *kind]
    assert calls[1] == [*tpus, "describe", "stf", *WHERE, "--format=value(state.state)"]
    assert calls[4][3:] == ["scp", calls[4][4], "stf:stf-jax.tgz", *ALL, *WHERE]
    assert calls[6][3:-1] == ["ssh", "stf", *ALL, *WHERE]
    assert calls[-1] == [*tpus, "delete", "stf", *WHERE, "--force"]

    # What the machine's Python was asked, after the command went through its shell.
    *_, installed, trained = [call for call in desk.calls("python") if call["argv"][0] == "-m"]
    assert installed["argv"][:3] == ["-m", "pip", "install"]
    assert installed["argv"][-3:] == ["jax[tpu]", "gcsfs", "google-cloud-storage"]
    assert trained["argv"] == ["-m", "stf_jax.main", *PROGRAM, "--spaces and 'quotes'"]
    assert trained["env"]["PYTHONUNBUFFERED"] == "1"
    assert os.listdir(desk.temporary) == []


def test_an_installation_replaces_the_tree_but_not_its_environment(desk):
    old = desk.machine / "stf-jax"
    (old / ".venv" / "bin").mkdir(parents=True)
    desk.stand_in(old / ".venv" / "bin" / "python", "python")
    (old / "stf_jax").mkdir()
    (old / "stf_jax" / "no_longer.py").touch()
    (old / ".hidden").touch()
    (desk.tree / "stf_jax" / "edited.py").write_text("new\n")
    (desk.tree / "stf_jax" / "__pycache__").mkdir()
    (desk.tree / "runs").mkdir()
    done = desk.run("tpu_pod.sh", "install", *HERE, MACHINE=str(desk.machine))
    assert done.returncode == 0, done.stderr
    # .venv is kept: nothing made a new one
    assert not desk.calls("python3.12")
    here = {"stf_jax", "configs", "launch", "requirements.txt", "requirements-dev.txt"}
    assert {path.name for path in old.iterdir()} == here | {".venv"}
    assert {path.name for path in (old / "stf_jax").iterdir()} == {"__init__.py", "edited.py"}


def test_what_is_packed_is_what_training_needs(desk):
    """Of the real tree: the pack holds the program, and nothing that would take hours to send."""
    pack = [line for line in desk.run("tpu_pod.sh", "install", *HERE, "--dry-run").stdout.splitlines() if "tar" in line]
    command = shlex.split(pack[0])
    file = desk.temporary / "pack.tgz"
    assert command[:2] == ["tar", "-czf"]
    subprocess.run(["tar", "-czf", file, "--exclude=__pycache__", "-C", ROOT, *command[6:]], check=True)
    with tarfile.open(file) as packed:
        names = packed.getnames()
    assert {"stf_jax/main.py", "configs/pretrain.py", "launch/install.sh", "requirements.txt"} <= set(names)
    assert file.stat().st_size < 20e6


def test_a_dry_run_prints_every_command_and_runs_none(desk):
    dry = desk.run("tpu_pod.sh", *UP[:1], "--dry-run", "--spot", *UP[1:])
    assert dry.returncode == 0, dry.stderr
    assert desk.calls() == []
    assert os.listdir(desk.temporary) == []
    # Read by a shell, what it printed does what the real run does.
    desk.plan({"when": "describe", "say": ["ACTIVE"]}, {"when": STATUS, "say": ["stf-jax: ended 0"]})
    printed = dry.stdout.replace("/tmp/stf-jax/", f"{desk.temporary}/")
    subprocess.run(["bash", "-ec", printed], env=desk.env, cwd=desk.tree, check=True, capture_output=True)
    by_hand = [call["argv"] for call in desk.calls()]
    (desk.folder / "calls.jsonl").unlink()
    assert desk.run("tpu_pod.sh", *UP[:1], "--spot", *UP[1:]).returncode == 0
    real = [call["argv"] for call in desk.calls()]
    assert verbs(desk) == [*MADE, *LOOKED, "delete"]
    assert "--spot" in real[0]
    for one, other in zip(by_hand, real, strict=True):
        assert [a for a in one if "stf-jax.tgz" not in a] == [a for a in other if "stf-jax.tgz" not in a]


@pytest.mark.parametrize("failing", range(8))
def test_a_step_that_fails_ends_all_with_its_status_and_name(failing, desk):
    order = [*MADE, *LOOKED, "delete"]
    step = ["create", "create", "install", "install", "run", "watch", "watch", "delete"][failing]
    rules = [{"when": "describe", "say": ["ACTIVE"]}, {"when": STATUS, "say": ["stf-jax: ended 0"]}]
    nth = order[:failing].count(order[failing])  # of its kind
    which = {"ssh install": "install.sh", "ssh run": "worker.sh run", "ssh status": STATUS}
    fault = {"when": which.get(order[failing], f" {order[failing]} "), "status": [0] * nth + [7]}
    for rule in rules:
        if rule["when"] in fault["when"]:
            fault = rule | fault
    desk.plan(fault, *rules)
    done = desk.run("tpu_pod.sh", *UP)
    if step == "watch":  # a look that fails is repeated, ten times
        assert done.returncode == 1
        assert verbs(desk)[5:] == (["describe"] * 10 if order[failing] == "describe" else LOOKED * 10)
    else:
        assert done.returncode == 7
        assert verbs(desk) == order[: failing + 1]
    assert f"tpu_pod.sh: {step} ended with status {done.returncode}." in done.stderr
    # and says how to stop paying, in words that a shell reads
    hint = shlex.split(done.stderr.splitlines()[-1])
    assert hint[1:] == ["delete", "--name=stf", "--zone=us-west4-a"]
    assert os.listdir(desk.temporary) == []


TAKEN = ["describe", "delete", *MADE]
WATCHED = {
    # name: (states of the TPU, of the run, other rules, calls after MADE, exit status)
    "taken away": (
        ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"],
        ["running", "ended 0"],
        [],
        [*LOOKED, "describe", "describe", "delete", "create", "describe", *MADE[1:], *LOOKED, "delete"],
        0,
    ),
    "taken away in the middle of an installation": (
        ["ACTIVE", "PREEMPTED", "ACTIVE", "PREEMPTED", "PREEMPTED", "ACTIVE"],
        ["ended 0"],
        [{"when": " scp ", "status": [0, 255, 0]}],
        ["describe", "delete", "create", "describe", "scp", "describe", *TAKEN, *LOOKED, "delete"],
        0,
    ),
    "refused by the queue, then given": (
        ["ACTIVE", "SUSPENDED", "FAILED", "FAILED", "FAILED", "ACTIVE"],
        ["ended 0"],
        [],
        ["describe", "delete", "create", "describe", "describe", *TAKEN, *LOOKED, "delete"],
        0,
    ),
    "machines fail before the state tells why": (
        ["ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE"],
        ["running\nstf-jax: ended 134", "ended 0"],
        [],
        [*LOOKED, *TAKEN, *LOOKED, "delete"],
        0,
    ),
    "a machine restarted": (
        ["ACTIVE"],
        ["running\nstf-jax: gone", "running", "ended 0\nstf-jax: running", "ended 0\nstf-jax: ended 0"],
        [],
        [*LOOKED, "ssh run", *LOOKED * 3, "delete"],
        0,
    ),
    "the run fails": (["ACTIVE"], ["ended 0\nstf-jax: ended 1"], [], [*LOOKED * 2, "ssh log"], 1),
    "the run fails, and others with it": (
        ["ACTIVE"],
        ["ended 134\nstf-jax: ended 75\nstf-jax: ended 1"],
        [],
        [*LOOKED * 2, "ssh log"],
        1,
    ),
    "the input cannot be used": (["ACTIVE"], ["ended 2"], [], [*LOOKED, "ssh log"], 2),
    "the input cannot be used by one": (["ACTIVE"], ["ended 143\nstf-jax: ended 2"], [], [*LOOKED, "ssh log"], 2),
    "starting again fails at first": (
        ["ACTIVE"],
        ["ended 75"] * 4 + ["ended 0"],
        [{"when": "worker.sh run", "status": [0, 255, 0]}],
        [*[*LOOKED * 2, "ssh run"] * 2, *LOOKED, "delete"],
        0,
    ),
    "taken away while it is started again": (
        ["ACTIVE", "ACTIVE", "ACTIVE", "PREEMPTED", "ACTIVE"],
        ["ended 134", "ended 134", "ended 0"],
        [{"when": "worker.sh run", "status": [0, 255, 0]}],
        [*LOOKED * 2, "ssh run", *TAKEN, *LOOKED, "delete"],
        0,
    ),
    "out of sight for a while": (
        ["ACTIVE"],
        ["running", "", "nobody knows", "ended 0"],
        [],
        [*LOOKED * 4, "delete"],
        0,
    ),
}


@pytest.mark.parametrize("case", WATCHED)
def test_watching(case, desk):
    states, runs, rules, calls, status = WATCHED[case]
    desk.plan(*rules, {"when": "describe", "say": states}, {"when": STATUS, "say": [f"stf-jax: {run}" for run in runs]})
    done = desk.run("tpu_pod.sh", *UP)
    assert done.returncode == status, done.stderr
    assert verbs(desk) == MADE + calls
    if status:
        assert f"the run ended with status {status}." in done.stderr
    # What is asked for again is the same.
    made = [call["argv"] for call in desk.calls("gcloud") if "create" in call["argv"] or "worker.sh run" in str(call)]
    for call in made[2:]:
        assert call in made[:2]


@pytest.mark.parametrize("status", [75, 134, 137, 139, 143])
def test_a_run_that_another_start_may_save_is_started_again(status, desk):
    runs = ["running", f"running\nstf-jax: ended {status}", f"ended 143\nstf-jax: ended {status}", "ended 0"]
    desk.plan({"when": "describe", "say": ["ACTIVE"]}, {"when": STATUS, "say": [f"stf-jax: {run}" for run in runs]})
    done = desk.run("tpu_pod.sh", *UP)
    assert done.returncode == 0, done.stderr
    assert verbs(desk) == [*MADE, *LOOKED * 3, "ssh run", *LOOKED, "delete"]
    assert "The run is started again, 1 of 10 in a row." in done.stderr


@pytest.mark.parametrize(("run", "looks", "status"), [("ended 75", 2, 75), ("gone", 1, 1)])
def test_so_often_in_a_row(run, looks, status, desk):
    desk.plan({"when": "describe", "say": ["ACTIVE"]}, {"when": STATUS, "say": [f"stf-jax: {run}"]})
    done = desk.run("tpu_pod.sh", "watch", *HERE, TYPE, "--restarts=2", "--", *PROGRAM)
    assert done.returncode == status
    assert verbs(desk) == [*[*LOOKED * looks, "ssh run"] * 2, *LOOKED * looks, "ssh log"]
    assert "was started again 2 times in a row" in done.stderr


def test_who_has_run_for_an_hour_starts_a_new_row(desk):
    desk.stand_in(desk.folder / "bin" / "date", "date")
    # When the watch begins; then when each run was seen to have ended, and when the next was started.
    times = ["0", "10", "20", "3620", "4000", "7599", "8000", "8010"]
    desk.plan(
        {"when": "date +%s", "say": times},
        {"when": "describe", "say": ["ACTIVE"]},
        {"when": STATUS, "say": ["stf-jax: gone"]},
    )
    done = desk.run("tpu_pod.sh", "watch", *HERE, TYPE, "--restarts=1", "--", *PROGRAM)
    assert done.returncode == 1
    assert verbs(desk) == [*LOOKED, "ssh run", *LOOKED, "ssh run", *LOOKED, "ssh log"]


def test_a_run_is_started_again_on_a_machine(desk):
    desk.plan({"when": "describe", "say": ["ACTIVE"]}, {"when": "-m stf_jax.main", "status": [-9, 143, 0]})
    done = desk.run("tpu_pod.sh", *UP, MACHINE=str(desk.machine))
    assert done.returncode == 0, done.stderr
    assert [call["argv"] for call in desk.trained()[1:]] == [["-m", "stf_jax.main", *PROGRAM]] * 3
    assert "ended 137" in done.stderr
    assert "ended 143" in done.stderr


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("at", ["create", "scp", "status"])
def test_an_interrupt_cleans_up(at, delete, desk):
    """As a terminal sends it: to the script and what it has started."""
    hang = {"create": " create ", "scp": " scp ", "status": STATUS}[at]
    desk.plan({"when": hang, "hang": [True]}, {"when": "describe", "say": ["ACTIVE"]})
    process = desk.start("tpu_pod.sh", UP[0], *["--delete-on-exit"] * delete, *UP[1:])
    desk.until((desk.folder / "hangs").exists)
    assert len(os.listdir(desk.temporary)) == 1
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, (out, err)
    assert os.listdir(desk.temporary) == []
    if delete:
        assert verbs(desk)[-1] == "delete"
        assert verbs(desk).count("delete") == 1
    else:
        assert "delete" not in verbs(desk)
        hint = shlex.split(err.splitlines()[-1])
        desk.plan()
        subprocess.run(["bash", *hint], env=desk.env, cwd=desk.folder, check=True, capture_output=True)
        assert verbs(desk)[-1] == "delete"


def test_termination_between_two_looks_is_not_waited_for(desk):
    desk.plan({"when": "describe", "say": ["ACTIVE"]}, {"when": STATUS, "say": ["stf-jax: running"]})
    process = desk.start("tpu_pod.sh", "watch", *HERE, "--poll=50", TYPE, "--", *PROGRAM)
    desk.until(lambda: verbs(desk) == LOOKED)
    desk.until(lambda: subprocess.run(["pgrep", "-P", str(process.pid), "sleep"], capture_output=True).returncode == 0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "watch ended with status 143" in err
    os.killpg(process.pid, signal.SIGKILL)  # the sleep


def test_made_directly_it_is_a_tpu_vm(desk):
    desk.plan(
        {"when": "describe", "say": ["CREATING", "READY", "PREEMPTED", "READY"]},
        {"when": STATUS, "say": ["stf-jax: ended 0"]},
    )
    done = desk.run("tpu_pod.sh", "up", *HERE, "--type=v5p-32", "--direct", "--spot", "--project=p", "--", *PROGRAM)
    assert done.returncode == 0, done.stderr
    assert verbs(desk) == [*MADE[:1], "describe", *MADE[1:], *TAKEN, *LOOKED, "delete"]
    calls = [call["argv"][2:] for call in desk.calls("gcloud")]
    where = ["--zone=us-west4-a", "--project=p", "--quiet"]
    kind = ["--accelerator-type=v5p-32", "--version=v2-alpha-tpuv5", "--spot"]
    assert calls[0] == ["tpu-vm", "create", "stf", *where, *kind]
    assert calls[1] == ["tpu-vm", "describe", "stf", *where, "--format=value(state)"]
    assert calls[5][:-1] == ["tpu-vm", "ssh", "stf", "--worker=all", *where]
    assert calls[-1] == ["tpu-vm", "delete", "stf", *where]


def test_several_slices_are_one_queued_resource(desk):
    desk.plan({"when": "describe", "say": ["ACTIVE"]})
    assert desk.run("tpu_pod.sh", "create", *HERE, "--type=v6e-64", "--node-count=2").returncode == 0
    kind = ["--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=stf"]
    assert desk.calls()[0]["argv"][2:] == ["queued-resources", "create", "stf", *WHERE, *kind]


def test_log_and_status(desk):
    desk.plan({"when": "describe", "say": ["PROVISIONING", "ACTIVE"]}, {"when": STATUS, "say": ["stf-jax: running"]})
    dry = [desk.run("tpu_pod.sh", verb, *HERE, "--dry-run").stdout for verb in ("status", "log", "delete")]
    assert [line.split()[0] for line in "".join(dry).splitlines()] == ["gcloud"] * 4
    assert desk.calls() == []
    assert desk.run("tpu_pod.sh", "status", *HERE).stdout == "stf: PROVISIONING\n"
    assert desk.run("tpu_pod.sh", "status", *HERE).stdout == "stf: ACTIVE\nstf-jax: running\n"
    assert desk.run("tpu_pod.sh", "log", *HERE).returncode == 0
    assert desk.calls()[-1]["argv"][3:-1] == ["ssh", "stf", "--node=0", "--worker=0", *WHERE]
    assert verbs(desk) == ["describe", *LOOKED, "ssh log"]


REFUSED = {
    "verb": (["fly"], "Unknown verb fly"),
    "name": (["log", "--zone=z"], "--name and --zone are needed"),
    "option": (["log", *HERE, "--workdir=x"], "Unexpected argument --workdir=x"),
    "type": (["create", *HERE], "--type is needed for create"),
    "unknown type": (["create", *HERE, "--type=v9-8"], "give --runtime=VERSION"),
    "nothing to run": (["run", *HERE], "Behind -- goes what"),
    "slices": (["create", *HERE, TYPE, "--node-count=two"], "--node-count=two"),
    "restarts": (["watch", *HERE, TYPE, "--restarts=few", "--", "x"], "--restarts=few is not"),
    "several slices directly": (["create", *HERE, TYPE, "--node-count=2", "--direct"], "--direct makes one slice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_ends_in_one_sentence(case, desk):
    argv, says = REFUSED[case]
    done = desk.run("tpu_pod.sh", *argv)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert desk.calls() == []


def test_a_run_on_a_machine_is_told_from_its_states(desk):
    desk.with_venv()
    hang = [True, True, False, True]
    desk.plan({"when": "stf_jax.main", "hang": hang, "say": ["one", "two", "three", "four"], "status": [3]})

    def ask(*argv):
        done = desk.run("tpu_worker.sh", *argv)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def started(number):
        desk.until(lambda: len(desk.calls("python")) == number and (desk.folder / "hangs").exists())
        (desk.folder / "hangs").unlink()
        return desk.calls("python")[-1]["pid"]

    assert ask("status") == "stf-jax: not started\n"
    ask("run", *PROGRAM)  # returns, while it runs
    first = started(1)
    assert ask("status") == "stf-jax: running\n"
    begin = time.monotonic()
    ask("run", *PROGRAM)  # ends the first
    assert not desk.alive(first)
    assert time.monotonic() - begin < 20  # which was asked to end, and not killed after so long
    second = started(2)
    assert ask("status") == "stf-jax: running\n"
    os.killpg(os.getpgid(second), signal.SIGKILL)  # as a restart of the machine does
    desk.until(lambda: ask("status") == "stf-jax: gone\n")
    ask("run", *PROGRAM)
    desk.until(lambda: ask("status") == "stf-jax: ended 3\n")
    assert ask("log") == "one\ntwo\nthree\n"
    ask("run", *PROGRAM)
    fourth = started(4)
    assert ask("status") == "stf-jax: running\n"
    os.killpg(os.getpgid(fourth), signal.SIGKILL)
    assert [call["argv"] for call in desk.calls("python")] == [["-m", "stf_jax.main", *PROGRAM]] * 4


@pytest.mark.parametrize("obeys", [True, False])
def test_a_run_that_is_ended_has_time_to_save(obeys, desk):
    desk.with_venv()
    desk.plan({"when": "stf_jax.main", "hang": [True, False], "saves": [obeys], "deaf": [not obeys]})
    # Waits for two minutes, but here for one second.
    flock = desk.folder / "bin" / "flock"
    flock.write_text('#!/bin/sh\n[ "$2" != 120 ] || { shift 2; set -- --timeout 1 "$@"; }\nexec /usr/bin/flock "$@"\n')
    flock.chmod(0o755)
    desk.run("tpu_worker.sh", "run", *PROGRAM)
    desk.until((desk.folder / "hangs").exists)
    (first,) = desk.calls("python")
    begin = time.monotonic()
    assert desk.run("tpu_worker.sh", "run", *PROGRAM).returncode == 0
    assert time.monotonic() - begin < 20
    assert not desk.alive(first["pid"])
    assert desk.count("saved") == obeys
    desk.until(lambda: desk.run("tpu_worker.sh", "status").stdout == "stf-jax: ended 0\n")
    assert len(desk.calls("python")) == 2
