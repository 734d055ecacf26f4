"""A run resumes with a changed config only if model and data stay the same."""

import json

import pytest
from tiny import tiny

from stf_jax.config import UserError, flatten, to_json
from stf_jax.training.resume import check_changes


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny())))
    return tmp_path


ALLOWED = {
    "steps": 12,
    "log_every_steps": 5,
    "name": "again",
    "deterministic": True,
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
REJECTED = {
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


def test_same_config_has_no_changes(workdir):
    assert check_changes(tiny(), workdir) == {}


@pytest.mark.parametrize("key", ALLOWED)
def test_allowed_changes_are_logged(workdir, key, caplog):
    config = tiny(**{key: ALLOWED[key]})
    was, now = (json.loads(json.dumps(flatten(to_json(one))[key])) for one in (tiny(), config))
    with caplog.at_level("INFO", logger="stf_jax"):
        assert check_changes(config, workdir) == {key: (was, now)}
    assert f"The run resumes with a changed {key} (was {was!r}, now {now!r})." in caplog.text


@pytest.mark.parametrize("key", REJECTED)
def test_changes_that_make_another_run_are_rejected(workdir, key):
    with pytest.raises(UserError) as caught:
        check_changes(tiny(**{key: REJECTED[key]}), workdir)
    was, now = (json.loads(json.dumps(flatten(to_json(one))[key])) for one in (tiny(), tiny(**{key: REJECTED[key]})))
    assert f"cannot resume with a changed {key} (was {was!r}, now {now!r}): use the values in" in str(caught.value)


def test_all_other_keys_of_model_and_data_are_rejected(workdir):
    """New keys are rejected until they are listed as allowed."""
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
            allowed = {"model.scan_layers", "model.remat", "model.attention"} | {
                f"data.{name}" for name in ("threads", "annotations", "images", "records", "tokenizer")
            }
            if key in allowed:
                assert check_changes(tiny(), folder).keys() == {key}
            else:
                with pytest.raises(UserError, match=key):
                    check_changes(tiny(), folder)


def test_key_missing_from_the_old_config_has_its_default(workdir):
    old = json.loads((workdir / "config.json").read_text())
    del old["faults"], old["data"]["buckets"]
    (workdir / "config.json").write_text(json.dumps(old))
    assert check_changes(tiny(), workdir) == {}
    with pytest.raises(UserError, match=r"data.buckets \(was 1, now 3\)"):
        check_changes(tiny(**{"data.buckets": 3}), workdir)


@pytest.mark.parametrize("content", [None, "{"])
def test_unreadable_config_does_not_prevent_resuming(workdir, content, caplog):
    (workdir / "config.json").unlink()
    if content:
        (workdir / "config.json").write_text(content)
    assert check_changes(tiny(seed=3), workdir) == {}
    assert "changes of the config are not detected" in caplog.text
