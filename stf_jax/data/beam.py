"""Making shards as an Apache Beam pipeline, on the runner of a cluster or of this machine."""

import shlex
from collections.abc import Callable, Sequence

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions

from stf_jax.config import UserError


def run_pipeline(make_shard: Callable[[int], None], shards: Sequence[int], runner: str, options: str) -> None:
    """Calls ``make_shard`` for each shard, on the workers of a runner, and waits for all.

    Args:
      make_shard: what a worker does; it is pickled, so workers need this package.
      shards: their numbers.
      runner: its name, such as ``DirectRunner`` or ``DataflowRunner``.
      options: of the runner, as on a command line.

    Raises:
      UserError: there is no such runner.
    """
    arguments = [f"--runner={runner}", *shlex.split(options)]
    try:
        pipeline = apache_beam.Pipeline(options=PipelineOptions(arguments))
    except (ValueError, ImportError) as error:
        raise UserError(f"--runner={runner}: {error}") from None
    # Without a reshuffle, a runner would make all shards on the worker that has the list.
    _ = (
        pipeline
        | "Number" >> apache_beam.Create(list(shards))
        | "Distribute" >> apache_beam.Reshuffle()
        | "Make" >> apache_beam.Map(make_shard)
    )
    pipeline.run().wait_until_finish()
