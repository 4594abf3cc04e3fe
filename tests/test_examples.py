"""The examples and the code blocks of the docs run; the training loop gives the trainer's weights."""

import ast
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import unite_fast

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example():
    """Imports a script of examples/."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def run(module, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_the_training_loop_trains_as_the_trainer_does(example, command, tmp_path, monkeypatch, capfd):
    loop = example("training_loop")
    ended = command("train", "digits", "train.steps=4", "train.picture_every=0", f"train.out={tmp_path / 'run'}")
    assert ended.status == 0, ended.err
    trainer = unite_fast.load(tmp_path / "run").network.state_dict()
    for name, value in loop.train(steps=4).network.state_dict().items():
        torch.testing.assert_close(value, trainer[name], rtol=1e-5, atol=1e-6, msg=name)
    run(loop, monkeypatch, "--steps", 1, "--out", tmp_path / "digits")
    for name in ("samples", "reconstructions"):
        with Image.open(tmp_path / f"digits_{name}.png") as picture:
            assert picture.width > 400
    assert re.search(r"step 1: L1 [\d.]+", capfd.readouterr().out)


def test_latents_are_edited(example, trained_folder, tmp_path, monkeypatch):
    edit = example("edit_latents")
    out = tmp_path / "morph.png"
    run(edit, monkeypatch, trained_folder, "--rows", 2, "--columns", 4, "--out", out)
    with Image.open(out) as picture:
        assert picture.size == ((4 * 9 + 1) * 6, (2 * 9 + 1) * 6)
    model = unite_fast.load(trained_folder)
    images = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frames = edit.morph(model, images[:2], images[2:], columns=3)
    ends = torch.stack([model.reconstruct(images[:2]), model.reconstruct(images[2:])], dim=1)
    assert (frames[:, [0, 2]].int() - ends.int()).abs().max() <= 1


def test_the_notebook_runs(trained_folder, tmp_path, monkeypatch, capsys):
    """Runs the code cells in order, and collects the values that they show."""
    notebook = json.loads((ROOT / "examples" / "latents.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained_folder)
    names, shown = {}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            *statements, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(statements, []), "<cell>", "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), "<cell>", "eval"), names))
            else:
                exec(compile(ast.Module([last], []), "<cell>", "exec"), names)
    pictures = [value for value in shown if isinstance(value, Image.Image)]
    assert len(pictures) == 4 and all(len(picture.convert("L").getcolors(256) or ()) > 5 for picture in pictures)
    assert "360 held-out images" in capsys.readouterr().out


def test_the_page_on_datasets_is_true(tmp_path, monkeypatch, capsys, forget_registered_sources):
    """Runs its code block as a script."""
    page = (ROOT / "docs" / "adding-a-dataset.md").read_text()
    (block,) = re.findall(r"<!-- test -->\n```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "adding-a-dataset.md", "exec"), {"__name__": "__main__"})
    output = capsys.readouterr().out
    assert re.search(r"shapes: 1000 images of split train of 16 x 16 pixels, 2 classes", output)
    assert re.search(r"data: 1000 images, source loader", output)
    assert sorted(os.listdir(tmp_path)) == ["inspect.png", "runs"]
    assert unite_fast.load(tmp_path / "runs" / "shapes").config.data.source == "shapes"
