"""How hosts find each other, and that none is left to wait for one that failed."""

import importlib.machinery
import json
import os
import socket
import subprocess
import sys
import types

import jax
import pytest

from stf_jax.config import UserError
from stf_jax.runtime import environment, hosts

TOGETHER = "go together: give all three or none"


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (("node0:1234", None, None), TOGETHER),
        ((None, 2, 0), TOGETHER),
        (("node0:1234", None, 0), TOGETHER),
        (("node0", 2, 0), "--coordinator=node0 should be HOST:PORT"),
        (("node0:1234", 2, 2), "--process=2 should be from 0 to 1"),
        (("node0:1234", 2, -1), "--process=-1 should be from 0 to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(told, says):
    with pytest.raises(UserError, match=says):
        hosts.join(*told)


@pytest.fixture
def joined(monkeypatch, tmp_path):
    """A machine with a TPU and its library, as far as can be seen; gives the calls of jax's initialisation."""
    calls, state = [], types.SimpleNamespace(running=False, error=None)

    def initialize(*args, **how):
        calls.append((*args, how["cluster_detection_method"]))
        if state.error:
            raise state.error
        state.running = True

    distributed = types.SimpleNamespace(is_initialized=lambda: state.running, initialize=initialize)
    config = types.SimpleNamespace(jax_platforms=None, update=lambda *option: None)
    stand_in = types.SimpleNamespace(distributed=distributed, config=config, errors=jax.errors)
    monkeypatch.setattr(hosts, "jax", stand_in)
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(hosts, "TPUS", (str(tmp_path / "none*"), str(tmp_path / "accel*")))
    libtpu = types.ModuleType("libtpu")
    libtpu.__spec__ = importlib.machinery.ModuleSpec("libtpu", None)
    monkeypatch.setitem(sys.modules, "libtpu", libtpu)
    return types.SimpleNamespace(calls=calls, state=state, config=config)


ALONE = (None, None, None, None)


@pytest.mark.parametrize(("platforms", "calls"), [(None, [ALONE]), ("tpu,cpu", [ALONE]), ("cpu", []), ("cuda,cpu", [])])
def test_machines_of_a_tpu_find_themselves(joined, platforms, calls):
    joined.config.jax_platforms = platforms
    hosts.join()
    hosts.join()  # which changes nothing more
    assert joined.calls == calls


def test_no_tpu_no_others(joined, monkeypatch):
    monkeypatch.setattr(hosts, "TPUS", ())
    hosts.join()
    assert not joined.calls


def test_a_tpu_that_is_part_of_no_pod_is_one_process(joined):
    joined.state.error = ValueError("coordinator_address should be defined.")
    hosts.join()
    assert joined.calls == [ALONE]


def test_one_process_joins_nobody(joined):
    hosts.join("node0:1234", 1, 0)
    assert not joined.calls


def test_what_is_said_goes_before_what_a_launcher_says(joined, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    hosts.join("node0:1234", 2, 1)
    assert joined.calls == [("node0:1234", 2, 1, "deactivate")]


@pytest.mark.parametrize("tasks", ["1", "", None])
def test_a_step_of_one_task_is_alone(joined, monkeypatch, tasks):
    joined.config.jax_platforms = "cpu"
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of the job, in its script
    monkeypatch.setenv("SLURM_PROCID", "0")
    if tasks is not None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    hosts.join()
    assert not joined.calls


def test_empty_variables_of_a_launcher_are_unset(joined, monkeypatch):
    """As a wrapper leaves them; jax, which reads them where a TPU may be, cannot, and would find nobody."""
    joined.config.jax_platforms = "cpu"
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    for name in names:
        monkeypatch.setenv(name, "")
    hosts.join()
    assert not joined.calls
    environment.configure_process(compilers=True)
    assert not set(names) & set(os.environ)


def test_others_that_jax_cannot_find_are_to_be_named(joined, monkeypatch):
    """As under Open MPI 5, which tells nobody where its first process runs."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    joined.state.error = ValueError("coordinator_address should be defined.")
    with pytest.raises(UserError, match=r"Process 1 of 2 cannot join the others \(coordinator_address.*--coordinator="):
        hosts.join()


# ---- Real processes --------------------------------------------------------------------------------------------------

JOIN = """
import sys
from stf_jax.runtime import cli, hosts
hosts._JOIN_TIMEOUT, hosts._GRACE = int(sys.argv[1]), 1
def main(argv):
    hosts.join(*[kind(text) if text else None for kind, text in zip((str, int, int), argv)])
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


def test_a_host_whose_others_do_not_come_says_so():
    address = f"127.0.0.1:{_free_port()}"
    process = _start(1, address, 2, 1)
    said = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert process.returncode == 75  # it may help to start again
    assert said.startswith(f"error: Process 1 of 2 did not connect to the others at {address} within 1 s: start all")


SLURM = {
    "SLURM_JOB_ID": str(_free_port()),  # from which jax takes the port
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
# Of the two, SLURM started only Open MPI's daemons.
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
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [out for out, _ in said] == ["0 2 2\n", "1 2 2\n"]


# Each has trained on more tokens than float32 counts; then one fails, and the other wants to hear from it.
COUNT_AND_FAIL = """
def work(argv):
    import jax, json
    from etils import epath
    from stf_jax.config import MeshConfig, TrainConfig, UserError
    from stf_jax.runtime.events import Events
    from stf_jax.runtime.mesh import make_mesh
    from stf_jax.runtime.telemetry import INITIAL_CLOCK, Telemetry
    host, config = jax.process_index(), TrainConfig()
    for sizes in MeshConfig(), MeshConfig(tensor=2):
        mesh = make_mesh(sizes)
        events = Events(epath.Path("."), active=False)
        log = Telemetry(epath.Path("."), config, 1, 0, INITIAL_CLOCK, mesh=mesh, began=0.0, active=False, events=events)
        log.advance(1, 2**40 + 1 + host * mesh.shape["fsdp"] // 2, 2**31 + 1, 1, jax.numpy.zeros(()))
        print(json.dumps(log.clock()), flush=True)
    if host:
        raise UserError("This one fails.")
    log.clock()
"""


def test_hosts_count_together_and_end_when_one_fails():
    address = f"127.0.0.1:{_free_port()}"
    processes = [_start(60, address, 2, i, work=COUNT_AND_FAIL) for i in range(2)]
    said = [process.communicate(timeout=60) for process in processes]
    for out, _ in said:
        clocks = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        # On the second mesh both have the same rows, which count once.
        expected = [(2**41 + 3, 2**32 + 2), (2**40 + 1, 2**31 + 1)]
        assert [(clock["tokens"], clock["rows_replaced"]) for clock in clocks] == expected, said
    assert processes[1].returncode == 2
    assert said[1][1].strip().splitlines()[-1] == "error: This one fails."
    assert processes[0].returncode != 0
