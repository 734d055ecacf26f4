"""model.remat=auto takes the fastest setting that fits, and keeps it for the whole run."""

import json
import types

import pytest
from etils import epath
from tiny import Setup, tiny

from stf_jax.data.sampling import BatchShape
from stf_jax.training import remat
from stf_jax.training.remat import SETTINGS, choose_remat, least_bytes, resolve_remat, with_remat

SHAPE = BatchShape(8, 192, 1)
AUTO = {"model.remat": "auto", "mesh.data": 1}


@pytest.fixture(scope="module")
def setup():
    return Setup.of(**AUTO)


def test_settings_are_ordered_by_what_they_keep(setup):
    """The lower bound of memory falls from setting to setting, and with microbatches."""
    needed = [least_bytes(with_remat(setup.config, setting), setup.mesh, SHAPE) for setting in SETTINGS]
    assert needed == sorted(needed, reverse=True)
    assert len(set(needed)) == len(needed)
    split = tiny(**AUTO, **{"optimizer.accumulation_steps": 4})
    assert least_bytes(with_remat(split, "none"), setup.mesh, SHAPE) < needed[0]


@pytest.mark.parametrize("fitting", [*SETTINGS, "nothing"])
def test_fastest_setting_that_fits_is_chosen(fitting, setup, monkeypatch):
    """Settings that cannot fit are not compiled."""
    monkeypatch.setattr(remat, "least_bytes", lambda config, *_: 6 - SETTINGS.index(config.model.remat))
    tried = []

    def fits(config):
        tried.append(config.model.remat)
        return config.model.remat == fitting

    chosen = choose_remat(setup.config, setup.mesh, SHAPE, 5, fits)
    possible = SETTINGS[1:]  # none needs 6 bytes
    assert chosen == (fitting if fitting in possible else "offload")
    assert tried == list(possible[: possible.index(chosen) + 1])[:4]  # offload is the last resort


def test_compiled_steps_decide_on_accelerators(setup, tmp_path, monkeypatch):
    """A step needs more than the lower bound: the compiler says how much."""
    assert (
        remat._peak_bytes(setup.config, setup.mesh, BatchShape(8, 64, 1)) > 0
    )  # the figure of CPUs leaves some buffers out
    monkeypatch.setattr(remat, "least_bytes", lambda *_: 0)
    monkeypatch.setattr(remat, "_peak_bytes", lambda config, *_: {"none": 9, "dots": 7}.get(config.model.remat, 1))

    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 7}

    mesh = types.SimpleNamespace(local_devices=[Device()])
    assert resolve_remat(setup.config, epath.Path(tmp_path), mesh, SHAPE).model.remat == "dots"
    # A run that resumes keeps its setting, unless there is less memory now.
    monkeypatch.setattr(remat, "newest_step", lambda _: 2)
    for saved, expected in (("full", "full"), ("none", "dots")):
        (tmp_path / "config.json").write_text(json.dumps({"model": {"remat": saved}}))
        assert resolve_remat(setup.config, epath.Path(tmp_path), mesh, SHAPE).model.remat == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model": {"remat": "mlp"}}, "mlp"),  # the choice of the first start
        ({"model": {"remat": "auto"}}, "none"),
        ({"model": {}}, "none"),
        ([], "none"),
        (None, "none"),  # on CPUs there is memory enough for this model
    ],
)
def test_choice_stands_when_a_run_resumes(setup, tmp_path, monkeypatch, content, expected):
    monkeypatch.setattr(remat, "newest_step", lambda _: 2)
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    assert resolve_remat(setup.config, epath.Path(tmp_path), setup.mesh, SHAPE).model.remat == expected
    monkeypatch.setattr(remat, "newest_step", lambda _: None)  # without a checkpoint, its first step may have failed
    assert resolve_remat(setup.config, epath.Path(tmp_path), setup.mesh, SHAPE).model.remat == "none"
    explicit = tiny(**{"model.remat": "full"})
    assert resolve_remat(explicit, epath.Path(tmp_path), setup.mesh, SHAPE) is explicit
