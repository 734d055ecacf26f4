"""Train: ``python -m stf_jax.main --config=configs/demo.py --workdir=DIR``."""

import dataclasses
import sys

import jax

from stf_jax.config import resolve
from stf_jax.evals.running import shown
from stf_jax.runtime.cli import Parser, add_host_arguments, door, parse
from stf_jax.runtime.hosts import join
from stf_jax.training.loop import train

HELP = """Train a model, stage by stage, and measure it.

  python -m stf_jax.main --config=FILE[:key=value,...] --workdir=DIR [--config.KEY=VALUE ...]

  --config=FILE        a Python file with get_config(arg): configs/demo.py, configs/pretrain.py, configs/finetune.py
  --config=FILE:ARG    with arguments of that file's own, e.g. configs/demo.py:stage=pretrain,steps=60
  --config.KEY=VALUE   change any key, e.g. --config.mesh.fsdp=8 --config.optimizer.learning_rate=1e-4
  --workdir=DIR        where the run lives: config.json, metrics.jsonl, checkpoints/, tensorboard/, results.json.
                       A workdir that holds a checkpoint is continued from there.

On several hosts, start the same command on each, with one workdir that all of them see. TPU pods, SLURM and Open MPI
tell which is which; elsewhere add to each:

  --coordinator=HOST:PORT --processes=N --process=I     HOST runs process 0; I is from 0 to N-1

Every key with its meaning and unit: stf_jax/config.py. Exit status: 0 done, 2 your input, 1 our bug.
"""


def main(argv: list[str]) -> None:
    """Runs the stages of the config in order, each from the end of the one before."""
    hosts = Parser(add_help=False, allow_abbrev=False)
    add_host_arguments(hosts)
    host, argv = hosts.parse_known_args(argv)
    workdir, config = parse(argv, HELP)
    stages = resolve(config)
    join(host.coordinator, host.processes, host.process)
    for before, stage in zip([None, *stages], stages, strict=False):
        if before is not None:
            stage = dataclasses.replace(stage, init_from=str(workdir / before.name))
        results = train(stage, workdir / stage.name if len(stages) > 1 else workdir, workdir)
        if results and jax.process_index() == 0:
            print("\n".join(map(shown, results)))
            print(f"results.json and every answer (answers.jsonl) are in {workdir}")


if __name__ == "__main__":
    sys.exit(door(main))
