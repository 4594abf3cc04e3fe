"""Opening data by name."""

import subprocess
import sys

import pytest
from PIL import Image

from unite_fast.data_pipeline import open_source
from unite_fast.errors import UserError


def test_unknown_names(mentions):
    with pytest.raises(UserError, match=mentions("data.source", "'webdata'", "digits", "folder", "idx", "shards")):
        open_source("webdata", None, 8, "train")
    with pytest.raises(UserError, match=mentions("split", "'valid'", "train", "test")):
        open_source("digits", None, 8, "valid")


@pytest.mark.parametrize("kind", ["folder", "idx"])
@pytest.mark.parametrize("path", [None, ""])
def test_a_path_is_needed(kind, path, mentions):
    with pytest.raises(UserError, match=mentions(kind, "data.path")):
        open_source(kind, path, 8, "train")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a" / "0.png")
    assert len(open_source("folder", "~/data", 8, "train")) == 1


def test_importing_is_light():
    heavy = "[name for name in ('sklearn', 'scipy', 'torchvision', 'nvidia.dali') if name in sys.modules]"
    code = f"import sys, unite_fast.data_pipeline; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
