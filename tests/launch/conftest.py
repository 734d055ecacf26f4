"""A simulated workstation with fake programs, and a small copy of the project."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = ("gcloud", "kubectl", "srun", "scancel", "scontrol", "nvidia-smi", "python", "python3.12")


class Workstation:
    """Runs scripts of launch/ with fake programs only, and records their calls."""

    def __init__(self, folder: pathlib.Path):
        # Scripts start with the signal handlers that a terminal gives. nohup ignores HUP, a shell's & ignores INT, and
        # libraries of other tests may have blocked signals; child processes would inherit all of these.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
        self.folder = folder
        self.tree = folder / "tree"
        self.temporary = folder / "tmp"
        self.machine = folder / "machine"
        for path in (self.tree, self.temporary, self.machine, folder / "bin"):
            path.mkdir()
        shutil.copytree(ROOT / "launch", self.tree / "launch")
        for name in ("requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, self.tree)
        for name in ("stf_jax", "configs"):
            (self.tree / name).mkdir()
            (self.tree / name / "__init__.py").touch()
        for program in PROGRAMS:
            self.add_fake(folder / "bin" / program, program)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PYTHON"))}
        self.env = inherited | {
            "PATH": f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "FAKE_PROGRAMS": str(folder),
            "TMPDIR": str(self.temporary),
            "HOME": str(folder),
        }

    def add_fake(self, path: pathlib.Path, program: str):
        """Creates a fake program at this path."""
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {HERE}/fake_program.py {program} "$@"\n')
        path.chmod(0o755)

    def add_venv(self):
        """Adds a .venv with a fake Python to the tree."""
        (self.tree / ".venv" / "bin").mkdir(parents=True)
        self.add_fake(self.tree / ".venv" / "bin" / "python", "python")
        return self

    def plan(self, *rules: dict):
        """Sets what fake programs do; see fake_program.py."""
        (self.folder / "plan.json").write_text(json.dumps(rules))

    def start(self, script: str, *argv: str, **env: str) -> subprocess.Popen:
        """Starts a script of launch/ in a new process group, as a terminal does."""
        return subprocess.Popen(
            ["bash", str(self.tree / "launch" / script), *argv],
            cwd=self.folder,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self, script: str, *argv: str, **env: str) -> subprocess.CompletedProcess:
        """Runs a script of launch/ to its end."""
        process = self.start(script, *argv, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, program: str | None = None) -> list[dict]:
        """Reads the calls so far, of one program or of all."""
        file = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if program in (None, call["program"])]

    def count(self, state: str) -> int:
        """Counts programs that reached a state: ``hangs``, or ``saved`` after SIGTERM."""
        file = self.folder / state
        return len(file.read_text().splitlines()) if file.exists() else 0

    def training_calls(self) -> list[dict]:
        """Reads the calls of ``python -m``: of the program and of pip."""
        return [call for call in self.calls("python") if call["argv"][0] == "-m"]

    def is_alive(self, pid: int) -> bool:
        """Whether a process is running; a zombie is not."""
        stat = pathlib.Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    def wait_until(self, condition, seconds=20):
        """Waits until the condition holds; fails after a timeout."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"timed out after {seconds} s; calls: {self.calls()}"
            time.sleep(0.02)


@pytest.fixture
def workstation(tmp_path):
    return Workstation(tmp_path)
