"""A fake program: records its call, then does what the test planned.

    fake_program.py PROGRAM ARGUMENT ...

$FAKE_PROGRAMS is a folder. Each call adds a line to calls.jsonl there. plan.json there may hold a list of rules; the
first whose "when" occurs in the words of the call applies. Each list in a rule has one value per call; the last value
is used for all further calls.

    {"when": "describe", "print": ["ACTIVE", …], "status": [0, …], "hang": [false, …], "save_on_sigterm": [false, …]}

A negative status is a signal that kills the program. "hang" sleeps for a minute; with "save_on_sigterm", SIGTERM then
writes a line to $FAKE_PROGRAMS/saved after half a second and exits with 143, and a second SIGTERM kills the program;
with "ignore_sigterm", SIGTERM does nothing. A call can wait until others have started ("after_start_of": a word of
each, separated by spaces), until another has ended ("after_end_of": a word of it), and for some seconds ("delay").
Calls of srun's tasks end with their index, as task=0.

Without a rule, scp and ssh of gcloud treat the folder $MACHINE as a machine of the TPU, srun starts its tasks and, like
SLURM's, kills them at SIGTERM, scancel signals all their processes, and python3.12 creates a .venv with fake programs.
"""

import json
import os
import pathlib
import signal
import sys
import time

FOLDER = pathlib.Path(os.environ["FAKE_PROGRAMS"])
VARIABLES = ("SLURM_", "XLA_", "JAX_", "PYTHON")


def main(program, argv):
    words = " ".join([program, *argv, f"task={os.environ.get('SLURM_PROCID')}"])
    plan = json.loads((FOLDER / "plan.json").read_text()) if (FOLDER / "plan.json").exists() else []
    # The words of srun include those of its tasks, so rules apply only to these.
    rule = next((rule for rule in plan if rule["when"] in words and program != "srun"), None)
    calls = FOLDER / "calls.jsonl"
    before = calls.read_text().splitlines() if calls.exists() else []
    call = {
        "program": program,
        "argv": argv,
        "words": words,
        "stdin": sys.stdin.read() if "--filename=-" in argv else "",
        "env": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "pid": os.getpid(),
        "cwd": os.getcwd(),
    }
    with calls.open("a") as file:
        file.write(json.dumps(call) + "\n")
    if rule is None:
        return default(program, argv)
    previous = 0  # calls that this rule applied to
    for old in map(json.loads, before):
        previous += old["program"] == program and rule["when"] in old["words"]

    def planned(key, default_value):
        values = rule.get(key, [default_value])
        return values[min(previous, len(values) - 1)]

    while not all(word in calls.read_text() for word in planned("after_start_of", "").split()):
        time.sleep(0.01)
    if planned("after_end_of", ""):
        wait_for_end(planned("after_end_of", ""))
    time.sleep(planned("delay", 0))
    if planned("print", ""):
        print(planned("print", ""), flush=True)
    if planned("hang", False):
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not if it is ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if planned("save_on_sigterm", False):
            signal.signal(signal.SIGTERM, save)
        if planned("ignore_sigterm", False):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with (FOLDER / "hangs").open("a") as file:
            file.write("hangs\n")
        time.sleep(60)
    if planned("status", 0) < 0:
        os.kill(os.getpid(), -planned("status", 0))
    return planned("status", 0)


def wait_for_end(word):
    while True:
        calls = map(json.loads, (FOLDER / "calls.jsonl").read_text().splitlines())
        pid = next((call["pid"] for call in calls if word in call["words"]), None)
        try:
            if pid and pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.01)


def save(number, _):
    signal.signal(number, signal.SIG_DFL)
    (FOLDER / "saving").touch()
    time.sleep(0.5)
    with (FOLDER / "saved").open("a") as file:
        file.write("saved\n")
    sys.exit(128 + number)


def default(program, argv):
    import shutil  # slow to import, and rarely needed
    import subprocess

    if program == "gcloud" and "MACHINE" in os.environ:
        home = pathlib.Path(os.environ["MACHINE"])
        if "scp" in argv:
            source, target = argv[argv.index("scp") + 1 :][:2]
            shutil.copy(source, home / target.partition(":")[2])
        if "ssh" in argv:
            (command,) = (arg.partition("=")[2] for arg in argv if arg.startswith("--command="))
            return subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {"HOME": str(home)}).returncode
    if program == "srun":
        task = argv[[not arg.startswith("-") for arg in argv].index(True) :]
        environments = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
        tasks = [
            subprocess.Popen(task, env=os.environ | task_env, start_new_session=True).pid for task_env in environments
        ]
        (FOLDER / "step.json").write_text(json.dumps(tasks))
        signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task, signal.SIGKILL) for task in tasks])
        codes = {}
        while len(codes) < len(tasks):
            task, status = os.wait()
            codes[task] = os.waitstatus_to_exitcode(status)
            if codes[task] and "--kill-on-bad-exit=0" not in argv:  # clusters may configure 1 as default
                for other in set(tasks) - set(codes):
                    os.killpg(other, signal.SIGTERM)
        signals = [-code for code in codes.values() if code < 0]
        return 128 + max(signals) if signals else max(codes.values())
    if program == "scancel":
        for task in json.loads((FOLDER / "step.json").read_text()):
            os.killpg(task, getattr(signal, "SIG" + argv[0].partition("=")[2]))
    if program == "python3.12" and argv[:2] == ["-m", "venv"]:
        binaries = pathlib.Path(argv[2]) / "bin"
        binaries.mkdir(parents=True)
        shutil.copy(FOLDER / "bin" / "python", binaries)
    if program == "python" and argv[0] == "-c" and "cuda" not in argv[1]:  # it has jax for GPUs, this machine has not
        return subprocess.run([sys.executable, *argv]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
