"""An evaluation on two hosts, each with its share of the images, writes the same files as on one host."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from tiny import Setup, large_params

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.config import to_json

# As on a pod, every host runs the same command; here both hosts are on one machine.
_HOST = """
import sys, tiny
from stf_jax import evaluate
from stf_jax.evals import benchmark
opened, read = [], benchmark.read_image
benchmark.read_image = lambda folder, name: opened.append(name) or read(folder, name)
evaluate.main(sys.argv[1:])
print("opened", len(opened))
"""


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "gqa"
    (folder / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(10):
        PIL.Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "images" / f"{i}.jpg")
        text = f"Is it {i}?\nAnswer the question using a single word or phrase."
        rows.append({"question_id": str(i), "image": f"{i}.jpg", "text": text, "category": "default"})
    (folder / "llava_gqa_testdev_balanced.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder.parent


def test_two_hosts_write_the_same_files_as_one(data, tmp_path):
    run = tmp_path / "run"
    setup = Setup.of()
    values = large_params(setup.plan.shapes)
    state = setup.state()
    trees = ({path: jnp.asarray(values[path]) for path in tree} for tree in (state.trainable, state.frozen))
    state = dataclasses.replace(state, **dict(zip(("trainable", "frozen"), trees, strict=True)))
    checkpoints = Checkpoints(run, setup.config.checkpoint)
    checkpoints.save(1, state, {}, {})
    checkpoints.close()
    (run / "config.json").write_text(json.dumps(to_json(setup.config)))

    def command(out):
        return [f"--checkpoint={run}", "--benchmark=gqa", f"--data={data}", f"--out={out}", "--batch=4"]

    one = [sys.executable, "-c", "import sys, tiny; from stf_jax import evaluate; evaluate.main(sys.argv[1:])"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run([*one, *command(tmp_path / "one"), "--mesh=2,1,1"], env=environment, check=True, timeout=300)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    which = [coordinator, "--processes=2", "--mesh=2,1,2"]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", _HOST, *command(tmp_path / "two"), *which, f"--process={i}"],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    first, second = (int(text.split("opened ")[1]) for text in outputs)
    first -= 10  # host 0 checked all images before the first question
    assert max(first, second) < 10  # neither host opened all of them
    assert first + second >= 10
    answers = [(tmp_path / name / "answers.jsonl").read_text() for name in ("one", "two")]
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 10
    assert len({json.loads(line)["text"] for line in answers[0].splitlines()}) > 3
