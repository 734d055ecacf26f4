"""Benchmarks run, say the same in both forms, and measure what they say; no test here looks at a clock."""

import json

import numpy as np
import pytest
import tiny  # noqa: F401 (its presets)

from stf_jax.bench import main
from stf_jax.benches import decode, step
from stf_jax.benches.made import make_export
from stf_jax.benches.mixture import SOURCES, jpegs, lengths
from stf_jax.config import FusionConfig, ModelConfig
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.cli import door
from stf_jax.runtime.table import table


def test_input(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert door(main, ["input", "--pictures=16", "--rows=20000", f"--json={file}"]) == 0
    rows = json.loads(file.read_text())
    assert capsys.readouterr().out == table(rows) + "\n"
    by_name = {row["what"]: row for row in rows}
    assert {name for name in by_name if "LLaVA" in name} == {
        "LLaVA's way, plain loop",
        "LLaVA's way, DataLoader (2 workers)",
        "LLaVA's group_by_modality_length",
    }
    loop = by_name["LLaVA's way, plain loop"]["images_per_second_per_core"]
    for row in rows:
        if "ratio_per_core" in row:
            assert row["ratio_per_core"] == pytest.approx(row["images_per_second_per_core"] / loop)
    # These depend on no clock.
    useful = {row["what"]: row["useful_positions"] for row in rows if "useful_positions" in row}
    assert useful["ours, packed (8 pictures a row)"] >= 0.95
    assert useful["ours, grouped (8 lengths)"] > useful["LLaVA's group_by_modality_length"]


def test_weights(tmp_path):
    file = tmp_path / "figures.json"
    assert door(main, ["weights", "--model=llama-mini", f"--scratch={tmp_path}", f"--json={file}"]) == 0
    rows = {row["what"]: row for row in json.loads(file.read_text())}
    assert len(rows) == 5
    assert rows["import, peak"]["gib"] > rows["model, in bfloat16"]["gib"] > rows["its largest parameter"]["gib"] > 0


@pytest.mark.usefixtures("torch_alone", "quick_to_compile")
@pytest.mark.parametrize("fusion", ["mlp", "mbtf_stf"])
def test_decode_asks_both_programs_the_same_of_an_export(fusion, tmp_path, monkeypatch):
    config = ModelConfig("clip-tiny", "llama-tiny", FusionConfig(fusion), "float32")
    export = tmp_path / "export"
    make_export(config, tmp_path / "made", export)
    asked, prompt = [], decode._prompt
    monkeypatch.setattr(decode, "_prompt", lambda *how: asked.append(how) or prompt(*how))
    for program in (decode._ours, decode._transformers):
        figures = program(str(export), 2, 3, "float32")
        assert set(decode._FIGURES) - {"times_transformers", "gib"} <= figures.keys()
        assert min(figures.values()) > 0
    slots = slots_per_image(config)
    assert asked == [(2, slots, 128 if fusion == "mlp" else 64), (2, slots, slots + 60)]
    _, taken = prompt(2, slots, 128)
    assert (taken[0] >= 0).sum() == slots
    assert prompt(2, slots, slots + 60)[0].shape == (2, slots + 60)


@pytest.mark.usefixtures("torch_alone", "quick_to_compile")
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_step_takes_the_same_steps_on_both_sides(stage, tmp_path):
    config = ModelConfig("clip-tiny", "llama-tiny", FusionConfig("mbtf_stf"), "float32", remat="full")
    export = tmp_path / "export"
    make_export(config, tmp_path / "made", export)
    task = step.Task(
        str(tmp_path / "made"), str(export), stage, rows=2, text=12, steps=3, precision="float32", remat="full"
    )
    ours, torchs = step.ours(task), step.in_torch(task)
    assert min(ours["step_ms"], torchs["step_ms"]) > 0
    # The same model, rows, optimizer and learning rate: so the same losses, before the first step and after each.
    assert len(ours["losses"]) == len(torchs["losses"]) == 4
    np.testing.assert_allclose(ours["losses"], torchs["losses"], rtol=2e-4)
    assert ours["losses"][-1] < ours["losses"][0]


def test_the_mixture_is_as_it_says():
    assert sum(count for count, *_ in SOURCES.values()) == 665_298
    tokens, pictures = lengths(20_000, 144, np.random.default_rng(0))
    assert pictures.mean() == pytest.approx(1 - 40_688 / 665_298, abs=0.01)
    assert tokens[pictures == 1].min() > 144
    assert tokens.max() == 2048
    sizes = [len(file) for file in jpegs(40, np.random.default_rng(0))]
    assert 100_000 < np.mean(sizes) < 250_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["input", "--json=no/such/folder.json"], "--json=no/such/folder.json: there is no such folder"),
        (["weights", "--model=llama-7"], "Unknown preset model.llm='llama-7'"),
        (["decode", "--llm=smol"], "Unknown preset model.llm='smol'"),
        (["decode", "--batches=1;8"], "--batches=1;8 should be numbers with commas between"),
        (["decode", "--tokens=1"], "--tokens at least 2"),
        (["weights", "--scratch=nowhere"], "--scratch=nowhere is not a folder"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(arguments, sentence, capsys):
    assert door(main, arguments) == 2
    assert sentence in capsys.readouterr().err
