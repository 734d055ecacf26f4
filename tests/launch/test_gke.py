"""gke.sh and its manifest: what reaches kubectl, and that the manifest says what is meant."""

import json
import re
import signal
import socket
import time

import pytest
import yaml

# What YAML, JSON, Kubernetes or a shell would read as something else.
PROGRAM = ["--config=c.py:a=1,b=2", '--workdir=gs://b/it\'s "a" \\ & $(HOME) ${NAME} $$ # ü', "- x: y", "a\n\tb"]
RUN = ["run", "--name=stf", "--image=eu.example/a/b@sha256:0&1", "--topology=v5e:4x8"]


def manifest(desk, *options):
    """What kubectl is given."""
    done = desk.run("gke.sh", *RUN, *options, "--", *PROGRAM)
    assert done.returncode == 0, done.stderr
    call = desk.calls("kubectl")[-1]
    assert call["argv"] == ["apply", "--filename=-"]
    return yaml.safe_load(call["stdin"])


def test_the_manifest_is_a_job_set_that_resumes(desk):
    job_set = manifest(desk, "--restarts=7")
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job_set["metadata"] == {
        "name": "stf",
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    # Of failures, only input that cannot be used and a run that cannot go on (2 and 1 of the program) end the set; the
    # default is a restart: after 75, 134, 137, 139 and 143, and where a machine is gone.
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
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy asks for
    assert pod["terminationGracePeriodSeconds"] == 300
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert container["image"] == "eu.example/a/b@sha256:0&1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}


def test_the_program_is_given_what_was_asked(desk):
    (slices,) = manifest(desk)["spec"]["replicatedJobs"]
    args = slices["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    # As Kubernetes reads args: $(NAME) is a variable, $$ a dollar.
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", arg) for arg in args)
    assert [arg.replace("$$", "$") for arg in args] == PROGRAM


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
def test_a_topology_says_which_machines(topology, accelerator, hosts, chips, desk):
    (slices,) = manifest(desk, f"--topology={topology}", "--slices=2", "--spot")["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, hosts, hosts)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_machines_wait_until_all_have_a_name(desk, monkeypatch):
    (slices,) = manifest(desk, "--slices=2", "--topology=v5e:2x4")["spec"]["replicatedJobs"]
    pod = slices["template"]["spec"]["template"]["spec"]
    (wait,) = pod["initContainers"]
    assert wait["image"] == pod["containers"][0]["image"]
    *python, code = wait["command"]
    assert python == [".venv/bin/python", "-c"]
    asked, slept = [], []

    def lookup(name):
        asked.append(name)
        if name == "stf-slice-1-0.stf" and len(slept) < 2:
            raise socket.gaierror("not yet")

    monkeypatch.setattr(socket, "gethostbyname", lookup)
    monkeypatch.setattr(time, "sleep", slept.append)
    before = signal.getsignal(signal.SIGTERM)
    exec(code, {})
    # As a container's first process it would not be ended by it, if not told how.
    assert signal.getsignal(signal.SIGTERM) != before
    with pytest.raises(SystemExit, match="143"):
        signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert slept == [5, 5]
    # JobSet's names: set, job, its index, the pod's index, and the set's service.
    assert list(dict.fromkeys(asked)) == [f"stf-slice-{s}-{h}.stf" for s in range(2) for h in range(2)]


def test_filled_in_by_hand_it_is_the_same(desk):
    text = (desk.tree / "launch" / "gke_jobset.yaml").read_text()
    values = dict(NAME="stf", RESTARTS=100, SLICES=1, HOSTS=8, ACCELERATOR="tpu-v5-lite-podslice", TOPOLOGY="4x8")
    values |= dict(IMAGE="eu.example/a/b@sha256:0&1", CHIPS=4, ARGS="[]")
    by_hand = yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda place: str(values[place[1]]), text))
    rendered = manifest(desk)
    rendered["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["args"] = []
    assert by_hand == rendered


def test_a_dry_run_prints_what_would_be_applied_and_calls_nothing(desk):
    done = desk.run("gke.sh", *RUN, "--dry-run", "--", *PROGRAM)
    assert desk.calls() == []
    assert yaml.safe_load(done.stdout) == manifest(desk)
    desk.run("gke.sh", "delete", "--name=stf", "--dry-run")
    assert len(desk.calls()) == 1


def test_log_status_and_delete(desk):
    for verb in ("log", "status", "delete"):
        assert desk.run("gke.sh", verb, "--name=stf").returncode == 0
    log, job_set, pods, delete = [" ".join(call["argv"]) for call in desk.calls("kubectl")]
    assert log.startswith("logs --follow --tail=100 --container=train --selector=")
    assert "job-name=stf-slice-0,batch.kubernetes.io/job-completion-index=0" in log
    assert job_set == "get jobset stf"
    assert pods.startswith("get pods --selector=jobset.sigs.k8s.io/jobset-name=stf ")
    assert delete == "delete jobset stf"


def test_kubectls_failure_is_the_exit_status(desk):
    desk.plan({"when": "apply", "status": [5]}, {"when": "get jobset", "status": [6]})
    assert desk.run("gke.sh", *RUN, "--", *PROGRAM).returncode == 5
    assert desk.run("gke.sh", "status", "--name=stf").returncode == 6
    assert len(desk.calls()) == 2


REFUSED = {
    "verb": (["fly"], "Unknown verb fly"),
    "name": (["run", "--name=Stf_1"], "--name=Stf_1 should be"),
    "option": ([*RUN, "--zone=x"], "Unexpected argument --zone=x"),
    "nothing to run": (RUN, "Behind -- goes what"),
    "image": ([*RUN, "--image=", "--", "x"], "--image is needed"),
    "chip": ([*RUN, "--topology=h100:8", "--", "x"], "--topology=h100:8 is not known"),
    "topology": ([*RUN, "--topology=v5e:32", "--", "x"], "--topology=v5e:32 should be"),
    "slices": ([*RUN, "--slices=0", "--", "x"], "--slices=0 is not"),
    "restarts": ([*RUN, "--restarts=x", "--", "x"], "--restarts=x is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_ends_in_one_sentence(case, desk):
    argv, says = REFUSED[case]
    done = desk.run("gke.sh", *argv)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert desk.calls() == []


def test_the_image_is_made_of_files_that_are_there(desk):
    """And of all that the program needs, in the folder from which install.sh and it start."""
    lines = (desk.tree / "launch" / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:] for line in lines if line.startswith("COPY")]
    for *sources, _ in copied:
        for source in sources:
            assert (desk.tree / source).exists(), source
    assert {"stf_jax", "configs", "requirements.txt", "requirements-dev.txt", "launch/install.sh"} == {
        source for *sources, _ in copied for source in sources
    }
    # Started by a shell, it would not hear SIGTERM.
    assert json.loads(lines[-1].removeprefix("ENTRYPOINT ")) == [".venv/bin/python", "-m", "stf_jax.main"]
    order = [line.split()[0] for line in lines if line and line.split()[0] in ("WORKDIR", "RUN", "ENTRYPOINT")]
    assert order == ["WORKDIR", "RUN", "ENTRYPOINT"]
