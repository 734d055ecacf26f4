"""A run goes on with another config only where that makes neither another model nor other data of it."""

import json

import pytest
from tiny import tiny

from stf_jax.config import UserError, flatten, to_json
from stf_jax.training.resuming import changes


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny())))
    return tmp_path


HARMLESS = {
    "steps": 12,
    "log_every_steps": 5,
    "name": "again",
    "init_from": "miniatures",
    "optimizer.learning_rate": 5e-4,
    "optimizer.accumulation_steps": 2,
    "mesh.fsdp": 4,
    "checkpoint.every_steps": 3,
    "eval.benchmarks": ("scenes",),
    "model.scan_layers": False,
    "model.remat": "full",
    "model.attention": "xla",
    "data.threads": 4,
    "faults.spike": 0.0,
}
REFUSED = {
    "seed": 1,
    "global_batch_size": 16,
    "rules": (("vision/.*", "freeze"), ("llm/.*", "freeze"), (".*", "train")),
    "model.vision": "clip-mini-16-96",
    "model.llm": "llama-mini",
    "model.precision": "bfloat16",
    "model.fusion.fusion": "stf",
    "model.fusion.kernel": 4,
    "data.source": "llava",
    "data.scenes.size": 128,
    "data.template": "chatml",
    "data.aspect": "pad",
    "data.max_length": 256,
    "data.packing": True,
    "optimizer.clip_norm": 1.0,
}


def test_the_same_config_has_no_changes(workdir):
    assert changes(tiny(), workdir) == {}


@pytest.mark.parametrize("key", HARMLESS)
def test_what_is_harmless_is_allowed_and_told(workdir, key, caplog):
    config = tiny(**{key: HARMLESS[key]})
    was, now = (json.loads(json.dumps(flatten(to_json(one))[key])) for one in (tiny(), config))
    with caplog.at_level("INFO", logger="stf_jax"):
        assert changes(config, workdir) == {key: (was, now)}
    assert f"The run goes on with a changed {key} (was {was!r}, now {now!r})." in caplog.text


@pytest.mark.parametrize("key", REFUSED)
def test_what_makes_another_run_of_it_is_refused_with_the_difference(workdir, key):
    with pytest.raises(UserError) as caught:
        changes(tiny(**{key: REFUSED[key]}), workdir)
    was, now = (json.loads(json.dumps(flatten(to_json(one))[key])) for one in (tiny(), tiny(**{key: REFUSED[key]})))
    assert f"cannot go on with a changed {key} (was {was!r}, now {now!r}): continue with" in str(caught.value)


def test_every_key_of_model_and_data_is_refused_unless_it_is_named_as_harmless(workdir):
    """So that a new one is, until someone thinks of it."""
    flat = flatten(to_json(tiny()))
    for key in flat:
        if key.startswith(("model.", "data.")):
            other = {**json.loads((workdir / "config.json").read_text())}
            node = other
            *parents, leaf = key.split(".")
            for parent in parents:
                node[parent] = dict(node[parent])
                node = node[parent]
            node[leaf] = "something else"
            folder = workdir / key
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(other))
            harmless = {"model.scan_layers", "model.remat", "model.attention"} | {
                f"data.{name}" for name in ("threads", "annotations", "images", "records", "tokenizer")
            }
            if key in harmless:
                assert changes(tiny(), folder).keys() == {key}
            else:
                with pytest.raises(UserError, match=key):
                    changes(tiny(), folder)


def test_a_key_that_the_old_config_did_not_have_counts_as_its_default(workdir):
    old = json.loads((workdir / "config.json").read_text())
    del old["faults"], old["data"]["buckets"]
    (workdir / "config.json").write_text(json.dumps(old))
    assert changes(tiny(), workdir) == {}
    with pytest.raises(UserError, match=r"data.buckets \(was 1, now 3\)"):
        changes(tiny(**{"data.buckets": 3}), workdir)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_config_that_is_lost_does_not_keep_a_run_from_going_on(workdir, content, caplog):
    (workdir / "config.json").unlink()
    if content:
        (workdir / "config.json").write_text(content)
    assert changes(tiny(seed=3), workdir) == {}
    assert "changes of the config are not seen" in caplog.text
