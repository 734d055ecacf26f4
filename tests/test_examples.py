"""The example notebook runs from top to bottom, with a few steps of training."""

import json
import pathlib

import matplotlib.pyplot as plt

NOTEBOOK = pathlib.Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_quickstart_notebook(monkeypatch, capsys):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    shorter = {
        "PRETRAIN_STEPS, FINETUNE_STEPS = 500, 120": "PRETRAIN_STEPS, FINETUNE_STEPS = 20, 2",
        '"log_every_steps=10"': '"log_every_steps=1", "data.scenes.size=400"',
        "limit=200": "limit=8",
    }
    for long, short in shorter.items():
        assert code.count(long) == 1
        code = code.replace(long, short)
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    names = {"__name__": "notebook"}
    exec(compile(code, NOTEBOOK, "exec"), names)
    losses = [row["loss"] for row in names["read_metrics"]("pretrain")]
    assert len(losses) == 20
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
    assert len(names["answers"]) == 8
    assert names["tokens"].shape == (36, 128)
    assert names["result"]["questions"] == 8
    assert (names["workdir"] / "export" / "model.safetensors").exists()
    assert len(figures) == 3
    assert "config.json" in capsys.readouterr().out
    plt.close("all")
