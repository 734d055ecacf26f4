"""Weights under our own paths: read whole, or refused with all that is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.flax import save_file

from stf_jax.config import CheckpointConfig, MeshConfig, ModelConfig, UserError
from stf_jax.models.positions import interpolated
from stf_jax.runtime.checkpoint import Checkpoints
from stf_jax.runtime.mesh import make_mesh
from stf_jax.training.state import TrainState, blueprint
from stf_jax.weights import folder as folder_module
from stf_jax.weights.folder import EMBEDDED, load_params

MESH = make_mesh(MeshConfig(1, 4, 2))
SPECS = {"llm/a": ("fsdp", "tensor"), "llm/b": ("tensor",), "fusion/c": ()}
SHAPES = {"llm/a": (8, 6), "llm/b": (4,), "fusion/c": (3,)}


@pytest.fixture
def layout():
    """Three parameters, as a model wants them."""
    return {
        path: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.NamedSharding(MESH, jax.sharding.PartitionSpec(*SPECS[path]))
        )
        for path, shape in SHAPES.items()
    }


def _params(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {path: jax.random.normal(key, shape, dtype) for key, (path, shape) in zip(keys, SHAPES.items(), strict=True)}


def write(folder, params):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(params, folder / "model.safetensors")


def _refusal(sources, layout, fresh=()):
    with pytest.raises(UserError) as raised:
        load_params(str(sources), layout, fresh)
    return str(raised.value)


# ---- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "vision", "llm"),
    [
        ("miniatures", "clip-mini-16-96", "llama-mini"),
        ("miniatures/siglip", "siglip-mini-16-96", "llama-mini"),
        ("miniatures/2", "clip-mini-8-96", "llama-mini-6"),
    ],
)
def test_the_embedded_weights_are_all_of_a_model_but_its_fusion(source, vision, llm):
    plan = blueprint(ModelConfig(vision=vision, llm=llm))
    places = plan.shardings(MESH)
    layout = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in plan.shapes.items()}
    loaded = load_params(source, layout, ("fusion/.*",))
    assert {path: x.shape for path, x in loaded.items()} == {
        path: x.shape for path, x in layout.items() if not path.startswith("fusion/")
    }
    assert {x.dtype for x in loaded.values()} == {jnp.bfloat16.dtype}
    assert all(np.isfinite(np.float32(x)).all() and np.float32(x).any() for x in loaded.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_back_to_the_bit_on_their_devices(tmp_path, layout, dtype):
    params = _params(dtype=dtype)
    write(tmp_path / "new" / "folder", params)
    loaded = load_params(str(tmp_path / "new" / "folder"), layout, ())
    assert list(loaded) == list(layout)
    for path, value in params.items():
        assert loaded[path].dtype == value.dtype == dtype
        assert np.asarray(loaded[path]).tobytes() == np.asarray(value).tobytes()
        assert loaded[path].sharding == layout[path].sharding
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_what_lies_on_this_hosts_devices_is_read_and_nothing_is_sent(tmp_path, layout, dtype, monkeypatch):
    """Each slice once, whichever devices hold it; device_put would compare and send whole values between hosts."""
    params = _params(dtype=dtype)
    write(tmp_path, params)
    read = []

    class Counted:
        def __init__(self, path, view):
            self.path, self.view = path, view

        def __getitem__(self, index):
            read.append((self.path, self.view[index].nbytes))
            return self.view[index]

    class Opened:
        def __init__(self, *how, **more):
            self.file = safe_open(*how, **more)

        def __enter__(self):
            self.tensors = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, path):
            return Counted(path, self.tensors.get_slice(path))

    def refuse(*_, **__):
        raise AssertionError("device_put of a parameter")

    # As a host sees it that holds two of the eight devices: those of the first row of "fsdp".
    mine = set(MESH.devices.reshape(4, 2)[0])
    make_array = jax.make_array_from_callback

    def of_this_host(shape, sharding, part):
        indices = sharding.devices_indices_map(shape)
        for device in mine:
            part(indices[device])
        held = list(read)
        array = make_array(shape, sharding, part)
        read[:] = held
        return array

    monkeypatch.setattr(folder_module, "safe_open", Opened)
    monkeypatch.setattr(jax, "device_put", refuse)
    monkeypatch.setattr(jax, "make_array_from_callback", of_this_host)
    loaded = load_params(str(tmp_path), layout, ())
    size = jnp.dtype(dtype).itemsize
    # llm/a [8, 6] over fsdp 4, tensor 2: two slices of 2×3; llm/b [4] over tensor: two of 2; fusion/c [3] whole, once.
    assert sorted(read) == sorted([("llm/a", 6 * size)] * 2 + [("llm/b", 2 * size)] * 2 + [("fusion/c", 3 * size)])
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_folder_may_hold_several_files(tmp_path, layout):
    params = _params()
    for number, (path, value) in enumerate(params.items()):
        save_file({path: value}, tmp_path / f"model-{number}.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_params(str(tmp_path), layout, ()), params)


def test_a_run_is_a_source(tmp_path, layout):
    params = _params()
    frozen = {"fusion/c": params["fusion/c"].astype(jnp.bfloat16)}
    trainable = {path: params[path] for path in ("llm/a", "llm/b")}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=1))
    checkpoints.save(1, TrainState(jnp.int32(1), trainable, frozen, (jnp.zeros(2),)), {"rows": 8}, {"seconds": 0.0})
    checkpoints.close()
    loaded = load_params(str(tmp_path), layout, ())
    jax.tree.map(np.testing.assert_array_equal, loaded, trainable | frozen)
    assert {path: value.sharding for path, value in loaded.items()} == {p: leaf.sharding for p, leaf in layout.items()}
    # A run whose model has other parameters is refused as a folder is.
    says = _refusal(tmp_path, {path: leaf for path, leaf in layout.items() if path != "llm/b"})
    assert "unknown llm/b (4,)" in says


def test_of_several_sources_the_later_wins(tmp_path, layout):
    first, second = _params(1), _params(2)
    write(tmp_path / "first", first)
    write(tmp_path / "second", {"llm/b": second["llm/b"]})
    write(tmp_path / "third", {"fusion/c": second["fusion/c"]})
    sources = f"{tmp_path / 'first'}, {tmp_path / 'second'},{tmp_path / 'third'},"
    expected = {"llm/a": first["llm/a"], "llm/b": second["llm/b"], "fusion/c": second["fusion/c"]}
    jax.tree.map(np.testing.assert_array_equal, load_params(sources, layout, ()), expected)
    backwards = ",".join(reversed([s.strip() for s in sources.split(",")]))
    jax.tree.map(np.testing.assert_array_equal, load_params(backwards, layout, ()), first)


def test_a_misshapen_weight_may_be_replaced_by_a_later_source(tmp_path, layout):
    params = _params()
    write(tmp_path / "first", params | {"llm/b": jnp.zeros(5)})
    write(tmp_path / "second", {"llm/b": params["llm/b"]})
    loaded = load_params(f"{tmp_path / 'first'},{tmp_path / 'second'}", layout, ())
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(1, 4, 2)], ids=str)
def test_a_tower_of_another_size_has_its_positions_interpolated(mesh):
    plan = blueprint(ModelConfig(vision="clip-mini-8-48", llm="llama-mini-6"))
    places = plan.shardings(make_mesh(mesh))
    layout = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in plan.shapes.items()}
    loaded = load_params("miniatures/2", layout, ("fusion/.*",))
    path = "vision/position_embed"
    assert {path: x.shape for path, x in loaded.items()} == {
        path: x.shape for path, x in layout.items() if not path.startswith("fusion/")
    }
    with safe_open(EMBEDDED["miniatures/2"] / "model.safetensors", framework="flax") as opened:
        table = np.asarray(opened.get_tensor(path))
    np.testing.assert_array_equal(loaded[path], interpolated(table, 37))
    assert loaded[path].sharding == places[path]
    assert loaded[path].dtype == jnp.bfloat16


@pytest.mark.parametrize("positions", [36, 38, 144])
def test_positions_of_no_such_grid_are_refused(tmp_path, positions):
    write(tmp_path, {"vision/position_embed": jnp.zeros((positions, 4))})
    one = jax.ShapeDtypeStruct(
        (37, 4), jnp.float32, sharding=jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec())
    )
    assert "vision/position_embed is" in _refusal(tmp_path, {"vision/position_embed": one})


# ---- What does not fit -----------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_listed_at_once(tmp_path, layout):
    write(tmp_path, {"llm/a": jnp.zeros((6, 8)), "llm/x": jnp.zeros(2), "llm/y": jnp.zeros((2, 3))})
    says = _refusal(tmp_path, layout)
    for wrong in (
        "missing llm/b (4,)",
        "missing fusion/c (3,)",
        "unknown llm/x (2,)",
        "unknown llm/y (2, 3)",
        "llm/a is (6, 8) there and (8, 6) here",
    ):
        assert wrong in says
    assert str(tmp_path) in says
    assert "\n" not in says


def test_patterns_name_what_starts_afresh(tmp_path, layout):
    params = _params()
    write(tmp_path, {"llm/a": params["llm/a"], "llm/b": jnp.zeros(9), "old/head": jnp.zeros(2)})
    # Whole paths match; missing, misshapen and unknown ones alike are left to the initialisers.
    loaded = load_params(str(tmp_path), layout, ("fusion/.*", "llm/b", "old/.*"))
    assert loaded.keys() == {"llm/a"}
    says = _refusal(tmp_path, layout, ("fusion", "llm/b", "old/.*"))
    assert "missing fusion/c" in says
    assert "llm/b" not in says.split(": ", 1)[1]
    # What fits is left out as well.
    write(tmp_path, params)
    assert load_params(str(tmp_path), layout, ("llm/.*",)).keys() == {"fusion/c"}


@pytest.mark.parametrize("damage", ["cut", "cut in the header", "empty", "noise"])
def test_a_damaged_file_is_refused_by_name(tmp_path, layout, damage):
    write(tmp_path, _params())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {"cut": whole[:-7], "cut in the header": whole[:40], "empty": b"", "noise": b"not weights" * 50}[damage]
    )
    says = _refusal(tmp_path, layout)
    assert says.startswith(f"{file} cannot be read as safetensors")
    assert "\n" not in says


def test_a_source_that_holds_nothing_is_refused_by_name(tmp_path, layout):
    assert f"init_from names {tmp_path / 'absent'}" in _refusal(tmp_path / "absent", layout)
    (tmp_path / "weights.bin").write_bytes(b"")
    assert f"init_from names {tmp_path}, which holds neither" in _refusal(tmp_path, layout)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert f"Run {tmp_path / 'run'} holds no complete checkpoint" in _refusal(tmp_path / "run", layout)
