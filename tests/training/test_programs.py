"""The train step is compiled for every shape of a batch before the first step."""

import pathlib

import jax
import pytest
from etils import epath
from tiny import Setup

from stf_jax.cli import run_command
from stf_jax.data.sampling import BatchShape
from stf_jax.main import main
from stf_jax.runs.telemetry import Telemetry
from stf_jax.training import loop
from stf_jax.training.programs import StepPrograms, keep_programs

TINY = pathlib.Path(__file__).parents[1] / "tiny.py"


def test_every_shape_is_compiled_before_the_first_step(tmp_path, monkeypatch):
    happened = []

    class Programs(StepPrograms):
        def _compile(self, shape):
            happened.append(shape)
            return super()._compile(shape)

    class RecordingTelemetry(Telemetry):
        def advance(self, *args, **kwargs):
            happened.append("step")
            super().advance(*args, **kwargs)

    monkeypatch.setattr(loop, "StepPrograms", Programs)
    monkeypatch.setattr(loop, "Telemetry", RecordingTelemetry)
    options = ["--config.data.buckets=3", "--config.global_batch_size=1", "--config.mesh.data=1"]
    options += [f"--config.data.tokens_per_batch={8 * 192}"]
    assert run_command(main, [f"--config={TINY}:steps=12", f"--workdir={tmp_path}", *options]) == 0
    shapes = happened[: happened.index("step")]
    assert len(set(shapes)) == len(shapes) > 1
    assert all(shape.rows == 8 * 192 // shape.length for shape in shapes)
    assert len({shape.rows for shape in shapes}) > 1
    assert happened[len(shapes) :] == ["step"] * 12


def test_each_compiled_program_is_a_sign_of_life(monkeypatch):
    """Several may take longer together than a run may seem to hang."""
    setup, calls = Setup.of(), []
    monkeypatch.setattr(StepPrograms, "_compile", lambda *_: None)
    programs = StepPrograms(
        setup.config, setup.plan, setup.tx, setup.layout, [BatchShape(8, length, 1) for length in (64, 128, 192)]
    )
    programs.wait(lambda: calls.append("compiled"))
    programs.close()
    assert calls == ["compiled"] * 3


def test_error_of_a_compilation_is_raised_before_the_first_step():
    setup = Setup.of()

    class Programs(StepPrograms):
        def _compile(self, shape):
            if shape.length == 192:
                raise MemoryError("This shape does not fit.")
            return super()._compile(shape)

    programs = Programs(setup.config, setup.plan, setup.tx, setup.layout, [BatchShape(8, 64, 1), BatchShape(8, 192, 1)])
    with pytest.raises(MemoryError, match="does not fit"):
        programs.wait(lambda: None)
    programs.close()


@pytest.mark.parametrize(
    ("backend", "before", "workdir", "folder"),
    [
        ("gpu", None, "/runs/a", "/runs/a/programs"),
        ("tpu", None, "gs://bucket/a", "gs://bucket/a/programs"),
        ("tpu", None, "s3://bucket/a", None),  # jax cannot write there
        ("gpu", "/cache", "/runs/a", "/cache"),  # chosen by the user
        ("cpu", None, "/runs/a", None),
    ],
)
def test_compiled_programs_are_kept_in_the_workdir(backend, before, workdir, folder, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    original = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)
    try:
        keep_programs(epath.Path(workdir))
        assert jax.config.jax_compilation_cache_dir == folder
    finally:
        jax.config.update("jax_compilation_cache_dir", original)
