"""Hosts find each other, and none waits long for one that failed."""

import importlib.machinery
import json
import os
import socket
import subprocess
import sys
import types

import jax
import pytest

from stf_jax import environment
from stf_jax.config import UserError
from stf_jax.parallel import hosts

INCOMPLETE = "go together: give all three or none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("node0:1234", None, None), INCOMPLETE),
        ((None, 2, 0), INCOMPLETE),
        (("node0:1234", None, 0), INCOMPLETE),
        (("node0", 2, 0), "--coordinator=node0 should be HOST:PORT"),
        (("node0:1234", 2, 2), "--process=2 should be from 0 to 1"),
        (("node0:1234", 2, -1), "--process=-1 should be from 0 to 1"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        hosts.join(*arguments)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Simulates a machine with a TPU and its library; records the calls that initialize jax."""
    calls, state = [], types.SimpleNamespace(running=False, error=None)

    def initialize(*args, **kwargs):
        calls.append((*args, kwargs["cluster_detection_method"]))
        if state.error:
            raise state.error
        state.running = True

    distributed = types.SimpleNamespace(is_initialized=lambda: state.running, initialize=initialize)
    config = types.SimpleNamespace(jax_platforms=None, update=lambda *option: None)
    fake_jax = types.SimpleNamespace(distributed=distributed, config=config, errors=jax.errors)
    monkeypatch.setattr(hosts, "jax", fake_jax)
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(hosts, "TPUS", (str(tmp_path / "none*"), str(tmp_path / "accel*")))
    libtpu = types.ModuleType("libtpu")
    libtpu.__spec__ = importlib.machinery.ModuleSpec("libtpu", None)
    monkeypatch.setitem(sys.modules, "libtpu", libtpu)
    return types.SimpleNamespace(calls=calls, state=state, config=config)


ALONE = (None, None, None, None)


@pytest.mark.parametrize(("platforms", "calls"), [(None, [ALONE]), ("tpu,cpu", [ALONE]), ("cpu", []), ("cuda,cpu", [])])
def test_machines_of_a_tpu_pod_find_each_other(machine, platforms, calls):
    machine.config.jax_platforms = platforms
    hosts.join()
    hosts.join()  # a second call changes nothing
    assert machine.calls == calls


def test_without_a_tpu_there_is_one_process(machine, monkeypatch):
    monkeypatch.setattr(hosts, "TPUS", ())
    hosts.join()
    assert not machine.calls


def test_tpu_outside_a_pod_is_one_process(machine):
    machine.state.error = ValueError("coordinator_address should be defined.")
    hosts.join()
    assert machine.calls == [ALONE]


def test_single_process_does_not_join(machine):
    hosts.join("node0:1234", 1, 0)
    assert not machine.calls


def test_arguments_take_precedence_over_launchers(machine, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    hosts.join("node0:1234", 2, 1)
    assert machine.calls == [("node0:1234", 2, 1, "deactivate")]


@pytest.mark.parametrize("tasks", ["1", "", None])
def test_slurm_step_of_one_task_is_one_process(machine, monkeypatch, tasks):
    machine.config.jax_platforms = "cpu"
    monkeypatch.setenv("SLURM_NTASKS", "4")  # the job's, set in its script
    monkeypatch.setenv("SLURM_PROCID", "0")
    if tasks is not None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    hosts.join()
    assert not machine.calls


def test_empty_variables_of_launchers_count_as_unset(machine, monkeypatch):
    """Wrappers may set them; jax cannot parse them, and would find no other process."""
    machine.config.jax_platforms = "cpu"
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    for name in names:
        monkeypatch.setenv(name, "")
    hosts.join()
    assert not machine.calls
    environment.configure_process(compilers=True)
    assert not set(names) & set(os.environ)


def test_processes_that_jax_cannot_find_must_be_named(machine, monkeypatch):
    """For example under Open MPI 5, which does not tell where its first process runs."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    machine.state.error = ValueError("coordinator_address should be defined.")
    with pytest.raises(UserError, match=r"Process 1 of 2 cannot join the others \(coordinator_address.*--coordinator="):
        hosts.join()


# ---- Real processes --------------------------------------------------------------------------------------------------

JOIN = """
import sys
from stf_jax import cli
from stf_jax.parallel import hosts
hosts._JOIN_TIMEOUT, hosts._GRACE = int(sys.argv[1]), 1
def main(argv):
    hosts.join(*[parse(text) if text else None for parse, text in zip((str, int, int), argv)])
    work(argv)
def work(argv):
    import jax
    print(jax.process_index(), jax.process_count(), len(jax.devices()))
"""
END = "sys.exit(cli.run_command(main, sys.argv[2:]))"


def _start(*argv, work="", **environment):
    return subprocess.Popen(
        [sys.executable, "-c", JOIN + work + END, *map(str, argv)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_host_reports_that_the_others_did_not_start():
    address = f"127.0.0.1:{_free_port()}"
    process = _start(1, address, 2, 1)
    message = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert process.returncode == 75  # starting again may help
    assert message.startswith(f"error: Process 1 of 2 did not connect to the others at {address} within 1 s: start all")


SLURM = {
    "SLURM_JOB_ID": str(_free_port()),  # jax derives the port from it
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
# Here SLURM started only Open MPI's daemons.
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": f"{4096 * _free_port()}.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "0",
}


@pytest.mark.parametrize(
    ("common", "own"),
    [
        (SLURM, ("SLURM_PROCID", "SLURM_LOCALID")),
        (OPEN_MPI, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
    ],
    ids=["SLURM", "Open MPI"],
)
def test_tasks_of_a_launcher_find_each_other(common, own):
    processes = [_start(60, "", "", "", **common, **dict.fromkeys(own, str(i))) for i in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["0 2 2\n", "1 2 2\n"]


# Each counts more tokens than float32 can represent; then one fails while the other waits for it.
COUNT_AND_FAIL = """
def work(argv):
    import jax, json
    from etils import epath
    from stf_jax.config import MeshConfig, TrainConfig, UserError
    from stf_jax.runs.events import Events
    from stf_jax.parallel.mesh import make_mesh
    from stf_jax.runs.telemetry import INITIAL_CLOCK, Telemetry
    host, config = jax.process_index(), TrainConfig()
    for sizes in MeshConfig(), MeshConfig(tensor=2):
        mesh = make_mesh(sizes)
        events = Events(epath.Path("."), active=False)
        options = {"mesh": mesh, "start_time": 0.0, "active": False, "events": events}
        log = Telemetry(epath.Path("."), config, 1, 0, INITIAL_CLOCK, **options)
        tokens = 2**40 + 1 + host * mesh.shape["fsdp"] // 2
        log.advance(1, tokens, 2**31 + 1, 1, jax.numpy.zeros(()), log_due=True)
        log.log(1, {"loss": 0.0})
        print(json.dumps([log._clock, log.clock()]), flush=True)
    if host:
        raise UserError("This one fails.")
    log.clock()
"""


def test_hosts_add_their_counts_and_end_when_one_fails():
    address = f"127.0.0.1:{_free_port()}"
    processes = [_start(60, address, 2, i, work=COUNT_AND_FAIL) for i in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    for out, _ in outputs:
        clocks = [clock for line in out.splitlines() if line.startswith("[{") for clock in json.loads(line)]
        # On the second mesh both read the same rows, which count once.
        expected = [(2**41 + 3, 2**32 + 2)] * 2 + [(2**40 + 1, 2**31 + 1)] * 2  # when logged, and when saved
        assert [(clock["tokens"], clock["rows_replaced"]) for clock in clocks] == expected, outputs
    assert processes[1].returncode == 2
    assert outputs[1][1].strip().splitlines()[-1] == "error: This one fails."
    assert processes[0].returncode != 0


ENDS = """
import sys, time
import jax
from stf_jax.cli import run_command
from stf_jax.config import UserError

class Stuck:
    def __del__(self, sleep=time.sleep):
        sleep(1000)

def main(argv):
    if argv:
        raise UserError("An error.")

jax.distributed.initialize(sys.argv[1], num_processes=1, process_id=0)
stuck = Stuck()  # destroyed after everything that is done at exit, like jax's client
sys.exit(run_command(main, sys.argv[2:]))
"""


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["fail"], 2)])
def test_a_process_ends_before_python_destroys_its_objects(arguments, status):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", ENDS, address, *arguments]
    assert subprocess.run(command, timeout=60).returncode == status
