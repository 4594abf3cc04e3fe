"""Which loader is taken, and why."""

import pytest
import torch

from unite_fast.data_pipeline import choose_loader, dali, open_source
from unite_fast.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def source(shards, image_folder):
    def open_(kind):
        if kind == "digits":
            return open_source("digits", None, 8, "train")
        if kind == "folder":
            return open_source("folder", str(image_folder), 32, "train")
        return open_source("shards", str(shards(kind)), 32, "train")

    return open_


@pytest.mark.parametrize(
    "kind, device, here, name, why",
    [
        ("digits", CPU, True, "memory", "memory"),
        ("folder", CUDA, True, "folder", "unite-fast shards"),
        ("raw", CUDA, True, "raw", "decoded"),
        ("original", CPU, True, "webdataset", "CPU"),
        ("original", CUDA, True, "dali", "GPU"),
        ("cropped-jpeg", CUDA, True, "dali", "GPU"),
        ("original", CUDA, False, "webdataset", "pip install"),
    ],
)
def test_auto(source, monkeypatch, kind, device, here, name, why):
    monkeypatch.setattr(dali, "missing", lambda: None if here else "DALI is not there: pip install it")
    choice = choose_loader("auto", source(kind), device)
    assert choice.name == name and why in choice.why
    assert choice.decoder == ("dali" if name == "dali" else "pillow")


def test_by_name(source, monkeypatch, mentions):
    monkeypatch.setattr(dali, "missing", lambda: None)
    assert choose_loader("dali", source("original"), CPU).decoder == "dali"
    assert choose_loader("webdataset", source("original"), CUDA).name == "webdataset"
    for kind, wrong, fits in (
        ("raw", "dali", "raw"),
        ("original", "raw", "dali"),
        ("digits", "folder", "memory"),
    ):
        with pytest.raises(UserError, match=mentions("data.loader", wrong, fits)):
            choose_loader(wrong, source(kind), CPU)
