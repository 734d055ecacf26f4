"""Stands in for a program of a user's machine: writes down how it was called, then does what the test planned.

    stand_in.py PROGRAM ARGUMENT ...

$STAND_IN is a folder. A call is a line of its calls.jsonl. plan.json there may hold a list of rules; of those whose
"when" occurs in the call's words, the first counts. A list in a rule is for one call after the other, the last of them
for all that follow.

    {"when": "describe", "say": ["ACTIVE", …], "status": [0, …], "hang": [false, …]}

Without a rule, scp and ssh of gcloud act on the folder $MACHINE as on a machine of the TPU, srun starts its tasks, and
python3.12 makes a .venv of stand-ins.
"""

import json
import os
import pathlib
import signal
import sys
import time

FOLDER = pathlib.Path(os.environ["STAND_IN"])
VARIABLES = ("SLURM_", "XLA_", "JAX_", "PYTHONUNBUFFERED")


def main(program, argv):
    words = " ".join([program, *argv])
    plan = json.loads((FOLDER / "plan.json").read_text()) if (FOLDER / "plan.json").exists() else []
    # srun's words are its tasks'.
    rule = next((rule for rule in plan if rule["when"] in words and program != "srun"), None)
    calls = FOLDER / "calls.jsonl"
    before = calls.read_text().splitlines() if calls.exists() else []
    call = {
        "program": program,
        "argv": argv,
        "stdin": sys.stdin.read() if "--filename=-" in argv else "",
        "env": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "pid": os.getpid(),
    }
    with calls.open("a") as file:
        file.write(json.dumps(call) + "\n")
    if rule is None:
        return default(program, argv)
    nth = 0
    for old in map(json.loads, before):
        nth += old["program"] == program and rule["when"] in " ".join([program, *old["argv"]])

    def planned(what, otherwise):
        values = rule.get(what, [otherwise])
        return values[min(nth, len(values) - 1)]

    if planned("say", ""):
        print(planned("say", ""), flush=True)
    if planned("hang", False):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        (FOLDER / "hangs").touch()
        time.sleep(60)
    return planned("status", 0)


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
        tasks = [
            subprocess.Popen(task, env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)
        ]
        signal.signal(signal.SIGTERM, lambda number, _: [task.send_signal(number) for task in tasks])
        codes = [task.wait() for task in tasks]
        return next((code if code > 0 else 128 - code for code in codes if code), 0)  # a signal is -1 to -64
    if program == "python3.12" and argv[:2] == ["-m", "venv"]:
        binaries = pathlib.Path(argv[2]) / "bin"
        binaries.mkdir(parents=True)
        shutil.copy(FOLDER / "bin" / "python", binaries)
    if program == "python" and argv[0] == "-c":
        return subprocess.run([sys.executable, *argv]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
