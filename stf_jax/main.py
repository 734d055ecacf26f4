"""Train: ``python -m stf_jax.main --config=configs/demo.py --workdir=DIR``."""

import sys

from stf_jax.config import UserError
from stf_jax.runtime.cli import Parser, add_host_arguments, door, parse, path
from stf_jax.runtime.status import status
from stf_jax.training.stages import checked_stages, run_stages

HELP = """Train a model, stage by stage, and measure it.

  python -m stf_jax.main --config=FILE[:key=value,...] --workdir=DIR [--config.KEY=VALUE ...]
  python -m stf_jax.main --workdir=DIR --status

  --config=FILE        a Python file with get_config(arg), or the name of one in configs/: demo, pretrain, finetune
  --config=FILE:ARG    with arguments of that file's own, e.g. configs/demo.py:stage=pretrain,steps=60
  --config.KEY=VALUE   change any key, e.g. --config.mesh.fsdp=8 --config.optimizer.learning_rate=1e-4
  --workdir=DIR        where the run lives: config.json, metrics.jsonl, checkpoints/, tensorboard/, results.json.
                       A workdir that holds a checkpoint is continued from there.
  --status             only tell where the run in that workdir stands, which may be at work meanwhile
  -v                   show what libraries log, too

On several hosts, start the same command on each, with one workdir that all of them see. TPU pods, SLURM and Open MPI
tell which is which; elsewhere add to each:

  --coordinator=HOST:PORT --processes=N --process=I     HOST runs process 0; I is from 0 to N-1

Every key with its meaning and unit: stf_jax/config.py. Exit status: 0 done; 2 your input; 1 the run cannot go on, or
our bug; 75 another machine failed, and 143 SIGTERM was obeyed: start again to go on (docs/operations.md).
"""


def main(argv: list[str]) -> None:
    """Runs the stages of the config in order, each from the end of the one before."""
    hosts = Parser(add_help=False, allow_abbrev=False)
    add_host_arguments(hosts)
    hosts.add_argument("--status", action="store_true")
    host, argv = hosts.parse_known_args(argv)
    if host.status and not {"--help", "-h"} & set(argv):
        print(status(_workdir(argv)))
        return
    workdir, config = parse(argv, HELP)
    stages = checked_stages(config, workdir)
    # These take seconds to import, and neither --help nor --status nor a misspelt key needs them.
    import jax

    from stf_jax.evals.running import shown
    from stf_jax.runtime.hosts import join
    from stf_jax.runtime.writers import import_wandb

    for stage in stages:
        import_wandb(stage.wandb)  # says in time if it is not here
    join(host.coordinator, host.processes, host.process, silent=stages[0].faults.host_seconds)
    for results in run_stages(stages, workdir):
        if results and jax.process_index() == 0:
            print("\n".join(map(shown, results)))
            print(f"results.json and every answer (answers.jsonl) are in {workdir}")


def _workdir(argv):
    """That of a command line that may say how to train as well."""
    options = Parser(add_help=False, allow_abbrev=False)
    options.add_argument("--workdir", type=path)
    workdir = options.parse_known_args(argv)[0].workdir
    if workdir is None:
        raise UserError("--workdir is missing; see --help.")
    return workdir


if __name__ == "__main__":
    sys.exit(door(main))
