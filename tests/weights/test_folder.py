"""Loading weights under our own paths, or refusing them with a list of all problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors import safe_open
from safetensors.flax import save_file

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.checkpointing.params import write_params
from stf_jax.config import CheckpointConfig, MeshConfig, ModelConfig, UserError
from stf_jax.models.blueprint import blueprint
from stf_jax.models.positions import interpolate_positions
from stf_jax.parallel.mesh import make_mesh
from stf_jax.training.state import TrainState
from stf_jax.weights import folder as folder_module
from stf_jax.weights.folder import EMBEDDED, load_params

MESH = make_mesh(MeshConfig(1, 4, 2))
SPECS = {"llm/a": ("fsdp", "tensor"), "llm/b": ("tensor",), "fusion/c": ()}
SHAPES = {"llm/a": (8, 6), "llm/b": (4,), "fusion/c": (3,)}


@pytest.fixture
def layout():
    """Three parameters of a model, with their shardings."""
    return {
        path: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.NamedSharding(MESH, jax.sharding.PartitionSpec(*SPECS[path]))
        )
        for path, shape in SHAPES.items()
    }


def _make_params(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {path: jax.random.normal(key, shape, dtype) for key, (path, shape) in zip(keys, SHAPES.items(), strict=True)}


def write(folder, params):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(params, folder / "model.safetensors")


def _error_message(sources, layout, fresh=()):
    with pytest.raises(UserError) as raised:
        load_params(str(sources), layout, fresh)
    return str(raised.value)


# ---- Loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "vision", "llm"),
    [
        ("miniatures", "clip-mini-16-96", "llama-mini"),
        ("miniatures/siglip", "siglip-mini-16-96", "llama-mini"),
        ("miniatures/2", "clip-mini-8-96", "llama-mini-6"),
    ],
)
def test_embedded_weights_contain_all_but_the_fusion(source, vision, llm):
    plan = blueprint(ModelConfig(vision=vision, llm=llm))
    shardings = plan.shardings(MESH)
    layout = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in plan.shapes.items()}
    loaded = load_params(source, layout, ("fusion/.*",))
    assert {path: x.shape for path, x in loaded.items()} == {
        path: x.shape for path, x in layout.items() if not path.startswith("fusion/")
    }
    assert {x.dtype for x in loaded.values()} == {jnp.bfloat16.dtype}
    assert all(np.isfinite(np.float32(x)).all() and np.float32(x).any() for x in loaded.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_round_trip_exactly_on_their_devices(tmp_path, layout, dtype):
    params = _make_params(dtype=dtype)
    write(tmp_path / "new" / "folder", params)
    loaded = load_params(str(tmp_path / "new" / "folder"), layout, ())
    assert list(loaded) == list(layout)
    for path, value in params.items():
        assert loaded[path].dtype == value.dtype == dtype
        assert np.asarray(loaded[path]).tobytes() == np.asarray(value).tobytes()
        assert loaded[path].sharding == layout[path].sharding
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_host_reads_only_the_slices_of_its_devices(tmp_path, layout, dtype, monkeypatch):
    """Each slice is read once; device_put would compare and send full values between hosts."""
    params = _make_params(dtype=dtype)
    write(tmp_path, params)
    read = []

    class CountingSlice:
        def __init__(self, path, view):
            self.path, self.view = path, view

        def __getitem__(self, index):
            read.append((self.path, self.view[index].nbytes))
            return self.view[index]

    class CountingFile:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.tensors = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, path):
            return CountingSlice(path, self.tensors.get_slice(path))

    def refuse(*_, **__):
        raise AssertionError("device_put of a parameter")

    # As on a host with two of the eight devices: those of the first row of "fsdp".
    local_devices = set(MESH.devices.reshape(4, 2)[0])
    make_array = jax.make_array_from_callback

    def make_array_on_this_host(shape, sharding, read_slice):
        indices = sharding.devices_indices_map(shape)
        for device in local_devices:
            read_slice(indices[device])
        read_locally = list(read)
        array = make_array(shape, sharding, read_slice)
        read[:] = read_locally
        return array

    monkeypatch.setattr(folder_module, "safe_open", CountingFile)
    monkeypatch.setattr(jax, "device_put", refuse)
    monkeypatch.setattr(jax, "make_array_from_callback", make_array_on_this_host)
    loaded = load_params(str(tmp_path), layout, ())
    size = jnp.dtype(dtype).itemsize
    # llm/a [8, 6] over fsdp 4, tensor 2: two slices of 2×3; llm/b [4] over tensor: two of 2; all of fusion/c [3], once.
    assert sorted(read) == sorted([("llm/a", 6 * size)] * 2 + [("llm/b", 2 * size)] * 2 + [("fusion/c", 3 * size)])
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_several_files_are_loaded(tmp_path, layout):
    params = _make_params()
    for number, (path, value) in enumerate(params.items()):
        save_file({path: value}, tmp_path / f"model-{number}.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_params(str(tmp_path), layout, ()), params)


def test_a_run_is_loaded(tmp_path, layout):
    params = _make_params()
    frozen = {"fusion/c": params["fusion/c"].astype(jnp.bfloat16)}
    trainable = {path: params[path] for path in ("llm/a", "llm/b")}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=1))
    checkpoints.save(1, TrainState(jnp.int32(1), trainable, frozen, (jnp.zeros(2),)), {"rows": 8}, {"seconds": 0.0})
    checkpoints.close()
    loaded = load_params(str(tmp_path), layout, ())
    jax.tree.map(np.testing.assert_array_equal, loaded, trainable | frozen)
    assert {path: value.sharding for path, value in loaded.items()} == {p: leaf.sharding for p, leaf in layout.items()}
    # A run with other parameters is refused like a folder.
    message = _error_message(tmp_path, {path: leaf for path, leaf in layout.items() if path != "llm/b"})
    assert "unknown llm/b (4,)" in message


def test_later_sources_win(tmp_path, layout):
    first, second = _make_params(1), _make_params(2)
    write(tmp_path / "first", first)
    write(tmp_path / "second", {"llm/b": second["llm/b"]})
    write(tmp_path / "third", {"fusion/c": second["fusion/c"]})
    sources = f"{tmp_path / 'first'}, {tmp_path / 'second'},{tmp_path / 'third'},"
    expected = {"llm/a": first["llm/a"], "llm/b": second["llm/b"], "fusion/c": second["fusion/c"]}
    jax.tree.map(np.testing.assert_array_equal, load_params(sources, layout, ()), expected)
    reversed_sources = ",".join(reversed([s.strip() for s in sources.split(",")]))
    jax.tree.map(np.testing.assert_array_equal, load_params(reversed_sources, layout, ()), first)


def test_a_later_source_replaces_a_weight_of_the_wrong_shape(tmp_path, layout):
    params = _make_params()
    write(tmp_path / "first", params | {"llm/b": jnp.zeros(5)})
    write(tmp_path / "second", {"llm/b": params["llm/b"]})
    loaded = load_params(f"{tmp_path / 'first'},{tmp_path / 'second'}", layout, ())
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(1, 4, 2)], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "imported", "run"])
def test_positions_of_a_tower_of_another_size_are_interpolated(kind, mesh, tmp_path):
    plan = blueprint(ModelConfig(vision="clip-mini-8-48", llm="llama-mini-6"))
    shardings = plan.shardings(make_mesh(mesh))
    layout = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in plan.shapes.items()}
    with safe_open(EMBEDDED["miniatures/2"] / "model.safetensors", framework="flax") as opened:
        saved = {path: np.asarray(opened.get_tensor(path)) for path in opened.keys()}  # noqa: SIM118 (not a mapping)
    if kind == "imported":
        write_params(tmp_path, saved.items())
    elif kind == "run":
        checkpoints = Checkpoints(epath.Path(tmp_path), CheckpointConfig(every_steps=1))
        frozen = {path: jnp.asarray(value) for path, value in saved.items()}
        checkpoints.save(1, TrainState(jnp.int32(1), {}, frozen, (jnp.zeros(2),)), {"rows": 8}, {"seconds": 0.0})
        checkpoints.close()
    loaded = load_params("miniatures/2" if kind == "safetensors" else str(tmp_path), layout, ("fusion/.*",))
    path = "vision/position_embed"
    assert {path: x.shape for path, x in loaded.items()} == {
        path: x.shape for path, x in layout.items() if not path.startswith("fusion/")
    }
    np.testing.assert_array_equal(loaded[path], interpolate_positions(saved[path], 37))
    assert loaded[path].sharding == shardings[path]
    assert loaded[path].dtype == jnp.bfloat16


@pytest.mark.parametrize("positions", [36, 38, 144])
def test_positions_that_are_not_a_square_grid_are_refused(tmp_path, positions):
    write(tmp_path, {"vision/position_embed": jnp.zeros((positions, 4))})
    leaf = jax.ShapeDtypeStruct(
        (37, 4), jnp.float32, sharding=jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec())
    )
    assert "vision/position_embed is" in _error_message(tmp_path, {"vision/position_embed": leaf})


# ---- Errors ----------------------------------------------------------------------------------------------------------


def test_all_problems_are_listed(tmp_path, layout):
    write(tmp_path, {"llm/a": jnp.zeros((6, 8)), "llm/x": jnp.zeros(2), "llm/y": jnp.zeros((2, 3))})
    message = _error_message(tmp_path, layout)
    for problem in (
        "missing llm/b (4,)",
        "missing fusion/c (3,)",
        "unknown llm/x (2,)",
        "unknown llm/y (2, 3)",
        "llm/a is (6, 8) there and (8, 6) here",
    ):
        assert problem in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_parameters_that_match_fresh_are_not_loaded(tmp_path, layout):
    params = _make_params()
    write(tmp_path, {"llm/a": params["llm/a"], "llm/b": jnp.zeros(9), "old/head": jnp.zeros(2)})
    # Patterns match full paths; they exclude missing, misshapen and unknown parameters.
    loaded = load_params(str(tmp_path), layout, ("fusion/.*", "llm/b", "old/.*"))
    assert loaded.keys() == {"llm/a"}
    message = _error_message(tmp_path, layout, ("fusion", "llm/b", "old/.*"))
    assert "missing fusion/c" in message
    assert "llm/b" not in message.split(": ", 1)[1]
    # They also exclude parameters that fit.
    write(tmp_path, params)
    assert load_params(str(tmp_path), layout, ("llm/.*",)).keys() == {"fusion/c"}


@pytest.mark.parametrize("damage", ["cut", "cut in the header", "empty", "noise"])
def test_errors_name_a_damaged_file(tmp_path, layout, damage):
    write(tmp_path, _make_params())
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"cut": content[:-7], "cut in the header": content[:40], "empty": b"", "noise": b"not weights" * 50}[damage]
    )
    message = _error_message(tmp_path, layout)
    assert message.startswith(f"{file} cannot be read as safetensors")
    assert "\n" not in message


def test_errors_name_a_source_without_weights(tmp_path, layout):
    assert f"init_from names {tmp_path / 'absent'}" in _error_message(tmp_path / "absent", layout)
    (tmp_path / "weights.bin").write_bytes(b"")
    assert f"init_from names {tmp_path}, which holds neither" in _error_message(tmp_path, layout)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert f"Run {tmp_path / 'run'} has no complete checkpoint" in _error_message(tmp_path / "run", layout)
