"""gke.sh: its calls of kubectl, and the manifest."""

import json
import re
import signal
import socket
import time

import pytest
import yaml

# Arguments with special characters of YAML, JSON, Kubernetes and shells.
PROGRAM_ARGUMENTS = [
    "--config=c.py:a=1,b=2",
    '--workdir=gs://b/it\'s "a" \\ & $(HOME) ${NAME} $$ # ü',
    "- x: y",
    "a\n\tb",
]
RUN = ["run", "--name=stf", "--image=eu.example/a/b@sha256:0&1", "--topology=v5e:4x8"]


def manifest(workstation, *options):
    """Runs training; returns the manifest that kubectl is given."""
    done = workstation.run("gke.sh", *RUN, *options, "--", *PROGRAM_ARGUMENTS)
    assert done.returncode == 0, done.stderr
    call = workstation.calls("kubectl")[-1]
    assert call["argv"] == ["apply", "--filename=-"]
    return yaml.safe_load(call["stdin"])


def test_manifest_is_a_job_set_that_resumes(workstation):
    job_set = manifest(workstation, "--restarts=7")
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job_set["metadata"] == {
        "name": "stf",
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    # Of failures, only invalid input and a run that cannot continue (status 2 and 1 of the program) end the set; the
    # default is a restart: after 75, 134, 137, 139 and 143, and when a machine is gone.
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (slices,) = job_set["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["name"], slices["replicas"]) == ("slice", 1)
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (8, 8, "Indexed", 0)
    (fails,) = job["podFailurePolicy"]["rules"]
    assert fails["action"] == "FailJob"
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert fails["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2]}
    assert pod["restartPolicy"] == "Never"  # required by podFailurePolicy
    assert pod["terminationGracePeriodSeconds"] == 300
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert container["image"] == "eu.example/a/b@sha256:0&1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}


def test_program_arguments_are_passed_on_exactly(workstation):
    (slices,) = manifest(workstation)["spec"]["replicatedJobs"]
    args = slices["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    # In args, Kubernetes reads $(NAME) as a variable and $$ as a dollar.
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", arg) for arg in args)
    assert [arg.replace("$$", "$") for arg in args] == PROGRAM_ARGUMENTS


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5e:2x2", "tpu-v5-lite-podslice", 1, 4),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5p:2x2x4", "tpu-v5p-slice", 4, 4),
        ("v6e:16x16", "tpu-v6e-slice", 64, 4),
    ],
)
def test_topology_determines_the_machines(topology, accelerator, hosts, chips, workstation):
    (slices,) = manifest(workstation, f"--topology={topology}", "--slices=2", "--spot")["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, hosts, hosts)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_machines_wait_until_all_have_a_name(workstation, monkeypatch):
    (slices,) = manifest(workstation, "--slices=2", "--topology=v5e:2x4")["spec"]["replicatedJobs"]
    pod = slices["template"]["spec"]["template"]["spec"]
    (wait,) = pod["initContainers"]
    assert wait["image"] == pod["containers"][0]["image"]
    *python, code = wait["command"]
    assert python == [".venv/bin/python", "-c"]
    names, delays = [], []

    def lookup(name):
        names.append(name)
        if name == "stf-slice-1-0.stf" and len(delays) < 2:
            raise socket.gaierror("not yet")

    monkeypatch.setattr(socket, "gethostbyname", lookup)
    monkeypatch.setattr(time, "sleep", delays.append)
    before = signal.getsignal(signal.SIGTERM)
    exec(code, {})
    # Without a handler, the first process of a container ignores SIGTERM.
    assert signal.getsignal(signal.SIGTERM) != before
    with pytest.raises(SystemExit, match="143"):
        signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert delays == [5, 5]
    # JobSet's names: set, job, job index, pod index, and the service of the set.
    assert list(dict.fromkeys(names)) == [f"stf-slice-{s}-{h}.stf" for s in range(2) for h in range(2)]


def test_manifest_filled_in_by_hand_is_the_same(workstation):
    text = (workstation.tree / "launch" / "gke_jobset.yaml").read_text()
    values = dict(NAME="stf", RESTARTS=100, SLICES=1, HOSTS=8, ACCELERATOR="tpu-v5-lite-podslice", TOPOLOGY="4x8")
    values |= dict(IMAGE="eu.example/a/b@sha256:0&1", CHIPS=4, ARGS="[]")
    by_hand = yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda match: str(values[match[1]]), text))
    rendered = manifest(workstation)
    rendered["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["args"] = []
    assert by_hand == rendered


def test_dry_run_prints_the_manifest_and_calls_nothing(workstation):
    done = workstation.run("gke.sh", *RUN, "--dry-run", "--", *PROGRAM_ARGUMENTS)
    assert workstation.calls() == []
    assert yaml.safe_load(done.stdout) == manifest(workstation)
    workstation.run("gke.sh", "delete", "--name=stf", "--dry-run")
    assert len(workstation.calls()) == 1


def test_log_status_and_delete(workstation):
    for subcommand in ("log", "status", "delete"):
        assert workstation.run("gke.sh", subcommand, "--name=stf").returncode == 0
    log, job_set, pods, delete = [" ".join(call["argv"]) for call in workstation.calls("kubectl")]
    assert log.startswith("logs --follow --tail=100 --container=train --selector=")
    assert "job-name=stf-slice-0,batch.kubernetes.io/job-completion-index=0" in log
    assert job_set == "get jobset stf"
    assert pods.startswith("get pods --selector=jobset.sigs.k8s.io/jobset-name=stf ")
    assert delete == "delete jobset stf"


def test_exit_status_of_kubectl_is_passed_on(workstation):
    workstation.plan({"when": "apply", "status": [5]}, {"when": "get jobset", "status": [6]})
    assert workstation.run("gke.sh", *RUN, "--", *PROGRAM_ARGUMENTS).returncode == 5
    assert workstation.run("gke.sh", "status", "--name=stf").returncode == 6
    assert len(workstation.calls()) == 2


REFUSED = {
    "command": (["fly"], "Unknown command fly"),
    "name": (["run", "--name=Stf_1"], "--name=Stf_1 should be"),
    "option": ([*RUN, "--zone=x"], "Unexpected argument --zone=x"),
    "no arguments": (RUN, "Give the arguments of stf_jax.main after --"),
    "image": ([*RUN, "--image=", "--", "x"], "--image is required"),
    "chip": ([*RUN, "--topology=h100:8", "--", "x"], "--topology=h100:8 is unknown"),
    "topology": ([*RUN, "--topology=v5e:32", "--", "x"], "--topology=v5e:32 should be"),
    "slices": ([*RUN, "--slices=0", "--", "x"], "--slices=0 is not"),
    "restarts": ([*RUN, "--restarts=x", "--", "x"], "--restarts=x is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_give_one_sentence(case, workstation):
    argv, message = REFUSED[case]
    done = workstation.run("gke.sh", *argv)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert workstation.calls() == []


def test_dockerfile_copies_existing_files(workstation):
    """It copies all that the program needs, to the working directory of install.sh and the program."""
    lines = (workstation.tree / "launch" / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:] for line in lines if line.startswith("COPY")]
    for *sources, _ in copied:
        for source in sources:
            assert (workstation.tree / source).exists(), source
    assert {"stf_jax", "configs", "requirements.txt", "requirements-dev.txt", "launch/install.sh"} == {
        source for *sources, _ in copied for source in sources
    }
    # Started by a shell, the program would not receive SIGTERM.
    assert json.loads(lines[-1].removeprefix("ENTRYPOINT ")) == [".venv/bin/python", "-m", "stf_jax.main"]
    order = [line.split()[0] for line in lines if line and line.split()[0] in ("WORKDIR", "RUN", "ENTRYPOINT")]
    assert order == ["WORKDIR", "RUN", "ENTRYPOINT"]
