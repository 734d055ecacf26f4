"""Configs: every misspelled key is rejected with a suggestion."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import typing

import ml_collections
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny

from stf_jax.config import (
    FusionConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    default_config,
    flatten,
    from_json,
    parse_arg,
    resolve,
    single_stage,
    to_json,
)

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def put(tree, path, value):
    """Sets a dotted key of nested dicts, existing or new."""
    *parents, leaf = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def changed(**changes) -> ml_collections.ConfigDict:
    """The default config with dotted keys changed or added."""
    tree = default_config().to_dict()
    for path, value in changes.items():
        put(tree, path, value)
    return ml_collections.ConfigDict(tree)


def staged(stages, run=None, **changes) -> ml_collections.ConfigDict:
    config = changed(**changes)
    config.stages = stages
    config.run = tuple(stages) if run is None else run
    return config


def leaves(cls, prefix=""):
    """Maps every dotted key to its type."""
    found = {}
    for field in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(field.type)
        found |= leaves(field.type, f"{prefix}{field.name}.") if nested else {prefix + field.name: field.type}
    return found


# ---- Defaults --------------------------------------------------------------------------------------------------------


def test_defaults_resolve_to_defaults():
    assert resolve(default_config()) == [TrainConfig()]
    assert resolve({}) == [TrainConfig()]


def test_default_config_has_every_key_plus_stages_and_run():
    keys = set(flatten(default_config().to_dict()))
    assert keys == set(flatten(to_json(TrainConfig()))) | {"run"}
    assert "stages" in default_config()


def test_config_keys_of_the_contract_exist():
    """Scripts rely on these keys (DESIGN.md, Contracts)."""
    keys = set(flatten(to_json(TrainConfig())))
    assert keys >= {"seed", "steps", "global_batch_size", "log_every_steps", "checkpoint.every_steps", "init_from"}
    assert keys >= {"mesh.data", "mesh.fsdp", "mesh.tensor", "model.vision", "model.llm", "model.fusion.taps"}


def test_resolved_configs_are_frozen():
    (config,) = resolve(default_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3


def test_resolve_applies_changes():
    (config,) = resolve(
        changed(
            **{
                "steps": 7,
                "model.fusion.taps": (3, 2),
                "optimizer.learning_rate": 1,
                "rules": (("a", "train"), ("b", "freeze")),
                "mesh.fsdp": 8,
            }
        )
    )
    assert config.steps == 7
    assert config.model == ModelConfig(fusion=FusionConfig(taps=(3, 2)))
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.rules == (("a", "train"), ("b", "freeze"))
    assert config.mesh.fsdp == 8


# ---- Unknown keys ----------------------------------------------------------------------------------------------------

TYPOS = {
    "stps": "steps",
    "modle.llm": "model",
    "model.lm": "llm",
    "model.fusion.kernal": "kernel",
    "optimizer.learnin_rate": "learning_rate",
    "data.scenes.tasks": "task",
    "checkpoint.every_step": "every_steps",
}


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_setting_an_unknown_key_raises(typo, meant):
    """In a config file: the locked ConfigDict itself raises."""
    with pytest.raises((AttributeError, KeyError), match=f'Did you mean "{meant}"'):
        exec(f"config.{typo} = 3", {"config": default_config()})
    with pytest.raises((AttributeError, KeyError)):
        default_config().update_from_flattened_dict({typo: 3})


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_resolve_rejects_an_unknown_key(typo, meant):
    first = re.escape(typo if typo.split(".")[0] in default_config() else typo.split(".")[0])
    with pytest.raises(UserError, match=rf"^Unknown config key {first}: did you mean '{meant}'\?$"):
        resolve(changed(**{typo: 3}))


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_from_json_rejects_an_unknown_key(typo, meant):
    data = to_json(TrainConfig())
    put(data, typo, 3)
    with pytest.raises(UserError, match=rf"Unknown config key .*: did you mean '{meant}'\?$"):
        from_json(data)


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_resolve_rejects_an_unknown_key_of_a_stage(typo, meant):
    nested = {}
    put(nested, typo, 3)
    with pytest.raises(UserError, match=rf"^Unknown config key stages\.one\.{re.escape(typo)}: did you mean .*{meant}"):
        resolve(staged({"one": nested}))
    with pytest.raises(UserError, match=r"Unknown config key stages\.one\."):
        resolve({"stages": {"one": nested}, "run": ("one",), **nested})  # also if the base has the key


def test_without_a_close_match_all_keys_are_listed():
    with pytest.raises(UserError, match=r"Unknown config key mesh\.zzz: known: data, fsdp, tensor\.$"):
        resolve(changed(**{"mesh.zzz": 1}))


# ---- Types and ranges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "3"),
        ("steps", 3.0),
        ("steps", True),
        ("steps", None),
        ("steps", (3,)),
        ("steps", {"a": 3}),
        ("name", 3),
        ("epochs", "1"),
        ("epochs", True),
        ("optimizer.learning_rate", None),
        ("data.packing", 1),
        ("data.packing", "true"),
        ("model.fusion.taps", 3),
        ("model.fusion.taps", "32"),
        ("model.fusion.taps", (3, "2")),
        ("model.fusion.taps", (3, 2.0)),
        ("rules", ("a", "train")),
        ("rules", (("a",),)),
        ("rules", (("a", "train", "b"),)),
        ("rules", (("a", 3),)),
        ("init_missing", (3,)),
        ("init_missing", "a"),
        ("model", 3),
        ("model.fusion", ()),
        ("optimizer", None),
    ],
)
def test_a_value_of_the_wrong_type_is_rejected(key, value):
    data = to_json(TrainConfig())
    put(data, key, value)
    for read in (resolve, from_json):
        with pytest.raises(UserError, match=rf"Config key {re.escape(key)} is .*, which is not of type \w+"):
            read(data)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("global_batch_size", 0, "must be between 1 and 1,000,000,000"),
        ("steps", 10**12, "must be between 0 and 1,000,000,000"),
        ("steps", -1, "must be between 0 and 1,000,000,000"),
        ("epochs", float("inf"), "must be between 0 and 100,000"),
        ("epochs", 10**310, "must be between 0 and 100,000"),
        ("optimizer.learning_rate", 0, "must be between 1e-30 and 1e\\+30"),
        ("optimizer.learning_rate", float("nan"), "must be between 1e-30 and 1e\\+30"),
        ("optimizer.eps", 0, "must be between 1e-30 and 1e\\+30"),
        ("optimizer.eps", 1e-46, "must be between 1e-30"),  # 0 in float32
        ("optimizer.b2", 1, "must be between 0 and 0.9999999"),
        ("optimizer.b1", 0.99999999, "must be between 0 and 0.9999999"),  # 1 in float32
        ("optimizer.warmup_ratio", 1.5, "must be between 0 and 1"),
        ("data.mix", (1.0, float("nan")), "must be between 0 and"),
        ("data.mix", (1.0, -2), "must be between 0 and"),
        ("model.fusion.taps", (3, -1), "must be between 0 and"),
        ("mesh.fsdp", -2, "must be between -1 and"),
        ("seed", 2**32, "must be between 0 and 4,294,967,295"),
        ("model.fusion.variant", "papper", "did you mean 'paper'"),
        ("model.fusion.init", "xaviar", "did you mean 'xavier'"),
        ("model.precision", "float16", "did you mean 'bfloat16'"),
        ("model.remat", "ful", "did you mean 'full'"),
        ("model.attention", "triton", "known: auto, reference, xla, cudnn, splash"),
        ("data.scenes.task", "caption", "did you mean 'captions'"),
        ("data.aspect", "padd", "did you mean 'pad'"),
        ("optimizer.schedule", "cosin", "did you mean 'cosine'"),
    ],
)
def test_a_value_out_of_range_is_rejected(key, value, sentence):
    with pytest.raises(UserError, match=rf"^Config key {re.escape(key)} is .*{sentence}"):
        resolve(changed(**{key: value}))


def numbers(kind):
    """The number types in the type of a key: the type itself, or those in its tuple."""
    inner = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
    return [item for item in inner if item in (int, float) or typing.get_origin(item) is typing.Annotated]


NUMBERS = {key: numbers(kind) for key, kind in leaves(TrainConfig).items() if numbers(kind)}


def test_every_number_has_a_range():
    assert {"steps", "optimizer.eps", "data.mix", "model.fusion.taps"} <= NUMBERS.keys()
    for key, kinds in NUMBERS.items():
        assert not {int, float} & set(kinds), key


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_are_accepted_within_their_range_and_rejected_outside(key):
    """Includes the numbers in tuples."""
    ((number, allowed),) = (typing.get_args(kind) for kind in NUMBERS[key])
    is_tuple = typing.get_origin(leaves(TrainConfig)[key]) is tuple

    def data(value):
        tree = {}
        put(tree, key, (value,) if is_tuple else value)
        return tree

    for end in (number(allowed.low), number(allowed.high)):
        assert flatten(to_json(resolve(data(end))[0]))[key] == ((end,) if is_tuple else end)
    outside = [allowed.low - 1, allowed.high * 2, *([math.nan, math.inf, -math.inf] if number is float else [])]
    for value in outside:
        for read in (resolve, from_json):
            with pytest.raises(UserError, match=rf"^Config key {re.escape(key)} is .* between .* and .*\.$"):
                read(data(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("epochs", 0),
        ("seed", 2**32 - 1),
        ("data.images_per_row", 0),
        ("mesh.data", 4),
        ("eval.limit", 0),
        ("eval.every_steps", 0),
        ("eval.batch", 1),
        ("eval.benchmarks", ()),
    ],
)
def test_range_ends_are_accepted(key, value):
    (config,) = resolve(changed(**{key: value}))
    assert flatten(to_json(config))[key] == value


# ---- Stages ----------------------------------------------------------------------------------------------------------

STAGES = {
    "text": {"steps": 5, "optimizer": {"learning_rate": 2e-3}, "rules": (("llm/.*", "train"), (".*", "freeze"))},
    "captions": {"steps": 9, "data": {"scenes": {"task": "mixture"}}},
}


def test_stages_resolve_in_the_order_of_run():
    text, captions = resolve(staged(STAGES, seed=4))
    assert (text.name, captions.name) == ("text", "captions")
    assert (text.steps, captions.steps) == (5, 9)
    assert (text.seed, captions.seed) == (4, 4)
    assert text.optimizer.learning_rate == 2e-3
    assert captions.optimizer.learning_rate == TrainConfig().optimizer.learning_rate
    assert text.rules == STAGES["text"]["rules"]
    assert captions.rules == TrainConfig().rules
    assert captions.data.scenes.task == "mixture"
    assert [stage.name for stage in resolve(staged(STAGES, run=("captions", "text")))] == ["captions", "text"]
    assert [stage.name for stage in resolve(staged(STAGES, run=("captions",)))] == ["captions"]


def test_a_partial_mapping_may_have_stages():
    (one,) = resolve({"seed": 3, "stages": {"one": {"steps": 4}}, "run": ("one",)})
    assert one == TrainConfig(name="one", seed=3, steps=4)


def test_resolve_does_not_modify_the_config():
    config = staged(STAGES)
    before = config.to_json()
    assert resolve(config) == resolve(config)
    assert config.to_json() == before


def test_run_rejects_an_unknown_stage():
    with pytest.raises(UserError, match=r"run names stage 'caption': did you mean 'captions'\?"):
        resolve(staged(STAGES, run=("text", "caption")))


@pytest.mark.parametrize("run", [("text", "text"), (1,), ([],)])
def test_run_rejects_repeated_or_non_string_names(run):
    with pytest.raises(UserError, match=r"^Config key run is .*; it should list names of stages, each once\.$"):
        resolve({"stages": STAGES, "run": run})


def test_a_stage_must_be_a_mapping():
    with pytest.raises(UserError, match=r"^Config key stages\.text is 3; it should hold the keys to override\.$"):
        resolve({"stages": {"text": 3}, "run": ("text",)})


@pytest.mark.parametrize("key", ["steps", "optimizer.learning_rate", "data.scenes.task"])
def test_a_key_may_not_be_set_for_the_run_and_by_a_stage(key):
    value = {"steps": 3, "optimizer.learning_rate": 0.5, "data.scenes.task": "captions"}[key]
    with pytest.raises(UserError, match=rf"{key} is set by stage '(\w+)'; set stages\.\1\.{key} instead"):
        resolve(staged(STAGES, **{key: value}))


def test_stage_values_are_validated():
    with pytest.raises(UserError, match=r"Config key steps is -3; it must"):
        resolve(staged({"one": {"steps": -3}}))
    with pytest.raises(UserError, match=r"Config key steps is 'x', which is not of type int"):
        resolve(staged({"one": {"steps": "x"}}))
    with pytest.raises(UserError, match=r"Unknown config key stages\.one\.model: did you mean"):
        resolve(staged({"one": {"model": 3}}))


def test_single_stage_resolves_to_that_stage():
    config = staged(STAGES, seed=4)
    for name, stage in zip(STAGES, resolve(config), strict=True):
        single = single_stage(config, name)
        assert resolve(single) == [stage]
        assert single.run == ()
        assert not single.stages
        single.steps = 77  # as the command line does
        assert resolve(single)[0].steps == 77
        with pytest.raises((AttributeError, KeyError)):
            single.stps = 77
    assert resolve(config)[0].steps == 5  # the original config is unchanged


def test_single_stage_rejects_an_unknown_stage():
    with pytest.raises(UserError, match=r"Unknown stage 'captoins'; did you mean 'captions'\?"):
        single_stage(staged(STAGES), "captoins")


# ---- Config arguments ------------------------------------------------------------------------------------------------

KNOWN = {"stage": "", "steps": 0, "scale": 1.0, "packing": False}


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        (None, {}),
        ("", {}),
        (",", {}),
        ("steps=3", {"steps": 3}),
        ("steps=-3,scale=1e-2", {"steps": -3, "scale": 0.01}),
        ("scale=2", {"scale": 2.0}),
        ("stage=pretrain,packing=true,", {"stage": "pretrain", "packing": True}),
        ("packing=True", {"packing": True}),
        ("packing=0", {"packing": False}),
        ("stage=", {"stage": ""}),
        ("stage=a=b", {"stage": "a=b"}),
        ("steps=3,steps=4", {"steps": 4}),
    ],
)
def test_parse_arg(arg, expected):
    result = parse_arg(arg, **KNOWN)
    assert result.to_dict() == KNOWN | expected
    assert {key: type(value) for key, value in result.items()} == {key: type(value) for key, value in KNOWN.items()}


@pytest.mark.parametrize(
    ("arg", "sentence"),
    [
        ("step=3", r"'step=3' is not known; did you mean 'steps='"),
        ("steps", r"'steps' is not known; did you mean 'steps='"),
        ("pretrain", r"'pretrain' is not known; known: stage=, steps=, scale=, packing="),
        ("=3", r"'=3' is not known"),
        ("steps=x", r"steps='x' should be of type int"),
        ("steps=1.5", r"steps='1\.5' should be of type int"),
        ("steps=", r"steps='' should be of type int"),
        ("scale=fast", r"scale='fast' should be of type float"),
        ("packing=maybe", r"packing='maybe' should be of type bool"),
    ],
)
def test_parse_arg_rejects(arg, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_arg(arg, **KNOWN)


@given(
    st.one_of(
        st.none(),
        st.text(),
        st.lists(
            st.tuples(st.sampled_from([*KNOWN, "stps", ""]), st.sampled_from(["=", "", "=="]), st.text(max_size=5))
        ).map(lambda items: ",".join("".join(item) for item in items)),
    )
)
@example("steps=٣")
@example("steps=1_000")
@example("steps=" + "9" * 5000)
@example("scale=1e999,packing=İ")
@settings(deadline=None, max_examples=300)
def test_parse_arg_raises_or_returns_the_types_of_the_defaults(arg):
    try:
        result = parse_arg(arg, **KNOWN)
    except UserError:
        return
    assert {key: type(value) for key, value in result.items()} == {key: type(KNOWN[key]) for key in KNOWN}


# ---- JSON ------------------------------------------------------------------------------------------------------------


def values(key, kind):
    """A strategy for values of a key with this type."""
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner, *rest = typing.get_args(kind)
        if rest == [...]:
            return st.lists(values("", inner), max_size=3).map(tuple)
        return st.tuples(*(values("", k) for k in (inner, *rest)))
    if typing.get_origin(kind) is typing.Annotated:
        number, allowed = typing.get_args(kind)
        return {int: st.integers, float: st.floats}[number](allowed.low, allowed.high)
    return {bool: st.booleans(), str: st.text(max_size=5)}[kind]


@given(st.fixed_dictionaries({}, optional={key: values(key, kind) for key, kind in leaves(TrainConfig).items()}))
@settings(max_examples=100, deadline=None)
def test_json_round_trip(changes):
    (config,) = resolve(changed(**changes))
    flat = flatten(to_json(config))
    assert {key: flat[key] for key in changes} == changes
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_json_round_trip_of_real_configs():
    for config in [TrainConfig(), *resolve(staged(STAGES, **{"model.fusion.taps": (3, 1)}))]:
        assert from_json(json.loads(json.dumps(to_json(config)))) == config


# ---- The configs of this project -------------------------------------------------------------------------------------


def load(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_expected_configs_exist():
    assert {"demo", "pretrain", "finetune"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_resolves(path):
    config = load(path).get_config(None)
    assert config.is_locked
    stages = resolve(config)
    assert stages
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        assert from_json(json.loads(json.dumps(to_json(stage)))) == stage
    for name in config.run:
        assert resolve(single_stage(config, name)) == [stage for stage in stages if stage.name == name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_rejects_an_unknown_argument(path):
    with pytest.raises(UserError, match="Config argument 'nonsense=1' is not known"):
        load(path).get_config("nonsense=1")


def test_a_run_from_before_the_second_edition_continues_with_the_first():
    config = tiny(**{"data.scenes.edition": 1, "eval.benchmarks": ("shapes", "gqa")})
    written = json.loads(json.dumps(to_json(config)))
    assert from_json(written) == config
    del written["data"]["scenes"]["edition"]
    written["eval"]["benchmarks"] = ["scenes", "gqa"]
    assert from_json(written) == config
