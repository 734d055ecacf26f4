"""Train a model: ``python -m stf_jax.main --config=configs/demo.py --workdir=DIR``."""

import sys

from etils import epath

from stf_jax.cli import Parser, add_host_arguments, parse, path, run_command
from stf_jax.config import UserError
from stf_jax.runs.status import format_status
from stf_jax.training.stages import resolve_stages, run_stages

HELP = """Train a model, stage by stage, and evaluate it.

  python -m stf_jax.main --config=FILE[:key=value,...] --workdir=DIR [--config.KEY=VALUE ...]
  python -m stf_jax.main --workdir=DIR --status

  --config=FILE        a Python file with get_config(arg), or the name of a file in configs/: demo, pretrain,
                       finetune, finetune_lora, small, paper
  --config=FILE:ARG    with arguments for that file, e.g. configs/demo.py:stage=pretrain,steps=60
  --config.KEY=VALUE   override any key, e.g. --config.mesh.fsdp=8 --config.optimizer.learning_rate=1e-4
  --workdir=DIR        folder of the run: config.json, metrics.jsonl, checkpoints/, tensorboard/, results.json.
                       A run with a checkpoint resumes from it.
  --status             only print the status of the run in that workdir, which may be running
  -v                   also show the log messages of libraries

On several hosts, start the same command on each, with a workdir that all of them can access. TPU pods, SLURM and Open
MPI identify the processes; elsewhere add:

  --coordinator=HOST:PORT --processes=N --process=I     HOST runs process 0; I is from 0 to N-1

Every key with its meaning and unit: stf_jax/config.py. Exit status: 0 done; 2 wrong input; 1 the run cannot
continue, or a bug; 75 another host failed and 143 SIGTERM: the same command resumes the run (docs/operations.md).
"""


def main(argv: list[str]) -> None:
    """Runs the stages of the config in order, each from the result of the previous one."""
    parser = Parser(add_help=False, allow_abbrev=False)
    add_host_arguments(parser)
    parser.add_argument("--status", action="store_true")
    options, argv = parser.parse_known_args(argv)
    if options.status and not {"--help", "-h"} & set(argv):
        print(format_status(_parse_workdir(argv)))
        return
    workdir, config = parse(argv, HELP)
    stages = resolve_stages(config, workdir)
    # These take seconds to import, and neither --help nor --status nor a misspelled key needs them.
    import jax

    from stf_jax.evals.runner import format_results
    from stf_jax.parallel.hosts import join
    from stf_jax.runs.writers import import_wandb

    for stage in stages:
        import_wandb(stage.wandb)  # fails before training if it is not installed
    join(options.coordinator, options.processes, options.process, silent=stages[0].faults.host_seconds)
    for folder, results in run_stages(stages, workdir):
        if results and jax.process_index() == 0:
            print("\n".join(map(format_results, results)))
            print(f"results.json and all answers (answers.jsonl) are in {folder}")


def _parse_workdir(argv: list[str]) -> epath.Path:
    """Reads --workdir from a command line that may also have options for training."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", type=path)
    workdir = parser.parse_known_args(argv)[0].workdir
    if workdir is None:
        raise UserError("--workdir is missing; see --help.")
    return workdir


if __name__ == "__main__":
    sys.exit(run_command(main))
