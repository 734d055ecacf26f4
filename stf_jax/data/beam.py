"""Making shards as an Apache Beam pipeline, on the runner of a cluster or of this machine."""

import contextlib
import io
import shlex
from collections.abc import Callable, Sequence

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions

from stf_jax.config import UserError


def open_pipeline(runner: str, options: str) -> apache_beam.Pipeline:
    """Returns an empty pipeline; nothing runs yet.

    Args:
      runner: its name, such as ``DirectRunner`` or ``DataflowRunner``.
      options: of the runner, as on a command line.

    Raises:
      UserError: there is no such runner, or its options are malformed.
    """
    printed = io.StringIO()
    try:
        arguments = PipelineOptions([f"--runner={runner}", *shlex.split(options)])
        with contextlib.redirect_stderr(printed):  # Beam's parser prints all of its options and exits
            arguments.get_all_options()
        return apache_beam.Pipeline(options=arguments)
    except (ValueError, ImportError, SystemExit) as error:
        reason = printed.getvalue().rpartition("error: ")[2].strip() if isinstance(error, SystemExit) else error
        raise UserError(f"--runner={runner} with --beam-options={options!r}: {reason}") from None


def run_pipeline(pipeline: apache_beam.Pipeline, make_shard: Callable[[int], None], shards: Sequence[int]) -> None:
    """Calls ``make_shard`` for each shard, on the workers of the pipeline's runner, and waits for all.

    Args:
      pipeline: an empty one.
      make_shard: what a worker does; it is pickled, so workers need this package.
      shards: their numbers.
    """
    # Without a reshuffle, a runner would make all shards on the worker that has the list.
    _ = (
        pipeline
        | "Number" >> apache_beam.Create(list(shards))
        | "Distribute" >> apache_beam.Reshuffle()
        | "Make" >> apache_beam.Map(make_shard)
    )
    pipeline.run().wait_until_finish()
