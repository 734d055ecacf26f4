"""Stands in for a program of a user's machine: writes down how it was called, then does what the test planned.

    stand_in.py PROGRAM ARGUMENT ...

$STAND_IN is a folder. A call is a line of its calls.jsonl. plan.json there may hold a list of rules; of those whose
"when" occurs in the call's words, the first counts. A list in a rule is for one call after the other, the last of them
for all that follow.

    {"when": "describe", "say": ["ACTIVE", …], "status": [0, …], "hang": [false, …], "saves": [false, …]}

A status below 0 is a signal that it dies of. What hangs does so for a minute; if it "saves", SIGTERM makes it write a
line into $STAND_IN/saved, in half a second, and end with 143, and a second SIGTERM ends it at once; if it is "deaf",
SIGTERM does nothing. A call may wait until another has begun ("beside": a word of it) or ended ("after"), and be "slow"
by some seconds. A task of srun has its place at the end of its words, as task=0.

Without a rule, scp and ssh of gcloud act on the folder $MACHINE as on a machine of the TPU, srun starts its tasks and,
like SLURM's, kills them at SIGTERM, scancel signals all their processes, and python3.12 makes a .venv of stand-ins.
"""

import json
import os
import pathlib
import signal
import sys
import time

FOLDER = pathlib.Path(os.environ["STAND_IN"])
VARIABLES = ("SLURM_", "XLA_", "JAX_", "PYTHON")


def main(program, argv):
    words = " ".join([program, *argv, f"task={os.environ.get('SLURM_PROCID')}"])
    plan = json.loads((FOLDER / "plan.json").read_text()) if (FOLDER / "plan.json").exists() else []
    # srun's words are its tasks'.
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
    nth = 0
    for old in map(json.loads, before):
        nth += old["program"] == program and rule["when"] in old["words"]

    def planned(what, otherwise):
        values = rule.get(what, [otherwise])
        return values[min(nth, len(values) - 1)]

    while planned("beside", "") and planned("beside", "") not in calls.read_text():
        time.sleep(0.01)
    if planned("after", ""):
        wait_for_end(planned("after", ""))
    time.sleep(planned("slow", 0))
    if planned("say", ""):
        print(planned("say", ""), flush=True)
    if planned("hang", False):
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # one that is not ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if planned("saves", False):
            signal.signal(signal.SIGTERM, save)
        if planned("deaf", False):
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
    import shutil  # here, for they take longer to import than most calls last
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
        places = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
        tasks = [subprocess.Popen(task, env=os.environ | place, start_new_session=True).pid for place in places]
        (FOLDER / "step.json").write_text(json.dumps(tasks))
        signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task, signal.SIGKILL) for task in tasks])
        codes = {}
        while len(codes) < len(tasks):
            task, status = os.wait()
            codes[task] = os.waitstatus_to_exitcode(status)
            if codes[task] and "--kill-on-bad-exit=0" not in argv:  # clusters may have 1 for all
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
    if program == "python" and argv[0] == "-c":
        return subprocess.run([sys.executable, *argv]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
