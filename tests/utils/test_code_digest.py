"""The digest of the package's code."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import torch

import unite_fast
from unite_fast.utils import code_digest as module
from unite_fast.utils.code_digest import code_digest, version_of


def test_a_changed_file_changes_the_digest(tmp_path, monkeypatch):
    before = code_digest()
    assert len(before) == 16 and code_digest() == before
    folders = {name: Path(str(__import__(name, fromlist=["x"]).__file__)).parent for name in module.PARTS}
    copies = {}
    for number, (name, folder) in enumerate(folders.items()):
        shutil.copytree(folder, tmp_path / str(number), ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        copies[name] = SimpleNamespace(__file__=str(tmp_path / str(number) / "__init__.py"))
    monkeypatch.setattr(module.importlib, "import_module", copies.__getitem__)
    assert code_digest() == before, "it depends on the place"
    for changed in ("0/objective.py", "1/adaln.py", "2/loader.py"):
        file = tmp_path / changed
        text = file.read_text()
        file.write_text(text + "#")
        assert code_digest() != before, changed
        file.write_text(text)
    (tmp_path / "0" / "objective.py").rename(tmp_path / "0" / "objective_2.py")
    assert code_digest() != before


def test_versions_of_libraries():
    assert version_of("torch").split("+")[0] == torch.__version__.split("+")[0]
    assert version_of("no-such-library") == ""
    assert unite_fast.__version__ == version_of("unite-fast")
