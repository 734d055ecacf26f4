"""A user's machine of stand-ins, and a copy of the project that is quick to pack."""

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


class Desk:
    """Runs scripts of launch/ where nothing real can be reached, and tells what they called."""

    def __init__(self, folder: pathlib.Path):
        # As a terminal starts them: below nohup the one is ignored, below a shell's & the other, and libraries that
        # other tests load may have left a signal ignored or blocked, which whatever is started inherits.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
        self.folder = folder
        self.tree = folder / "tree"
        self.temporary = folder / "tmp"
        self.machine = folder / "machine"
        for made in (self.tree, self.temporary, self.machine, folder / "bin"):
            made.mkdir()
        shutil.copytree(ROOT / "launch", self.tree / "launch")
        for name in ("requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, self.tree)
        for name in ("stf_jax", "configs"):
            (self.tree / name).mkdir()
            (self.tree / name / "__init__.py").touch()
        for program in PROGRAMS:
            self.stand_in(folder / "bin" / program, program)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PYTHON"))}
        self.env = inherited | {
            "PATH": f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "STAND_IN": str(folder),
            "TMPDIR": str(self.temporary),
            "HOME": str(folder),
        }

    def stand_in(self, path: pathlib.Path, program: str):
        """Makes a program of that name."""
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {HERE}/stand_in.py {program} "$@"\n')
        path.chmod(0o755)

    def with_venv(self):
        """The tree's .venv, of stand-ins."""
        (self.tree / ".venv" / "bin").mkdir(parents=True)
        self.stand_in(self.tree / ".venv" / "bin" / "python", "python")
        return self

    def plan(self, *rules: dict):
        """What stand-ins do; see stand_in.py."""
        (self.folder / "plan.json").write_text(json.dumps(rules))

    def start(self, script: str, *argv: str, **env: str) -> subprocess.Popen:
        """A script of launch/, in a process group of its own as a terminal's command is."""
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
        """The same to its end."""
        process = self.start(script, *argv, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, program: str | None = None) -> list[dict]:
        """The calls so far, of one program or of all."""
        file = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if program in (None, call["program"])]

    def count(self, what: str) -> int:
        """How many programs have come so far that they ``hangs``, or ``saved`` as SIGTERM asks."""
        file = self.folder / what
        return len(file.read_text().splitlines()) if file.exists() else 0

    def trained(self) -> list[dict]:
        """The calls of the program, and of pip."""
        return [call for call in self.calls("python") if call["argv"][0] == "-m"]

    def alive(self, pid: int) -> bool:
        """Whether a process runs; one that has ended may still be listed until somebody asks for its status."""
        stat = pathlib.Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    def until(self, true, seconds=20):
        """Waits until ``true()`` is; fails after so long."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds} s; calls: {self.calls()}"
            time.sleep(0.02)


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)
