"""Which loader is chosen, and the reason."""

import pytest
import torch

from unite_fast.config import LOADERS
from unite_fast.data_pipeline import Loader, Source, choose_loader, dali, open_source
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
def test_auto_chooses_the_fastest_loader(source, monkeypatch, kind, device, here, name, why):
    monkeypatch.setattr(dali, "missing", lambda: None if here else "DALI is missing: pip install it")
    choice = choose_loader("auto", source(kind), device)
    assert choice.name == name and why in choice.why
    assert choice.decoder == ("dali" if name == "dali" else "pillow")


def test_a_named_loader_must_be_able_to_read_the_source(source, monkeypatch, mentions):
    monkeypatch.setattr(dali, "missing", lambda: None)
    assert choose_loader("dali", source("original"), CPU).decoder == "dali"
    assert choose_loader("webdataset", source("original"), CUDA).name == "webdataset"
    for kind, wrong, fits in (
        ("raw", "dali", ("raw",)),
        ("original", "raw", ("webdataset", "dali")),
        ("digits", "folder", ("memory",)),
    ):
        with pytest.raises(UserError, match=mentions("data.loader", wrong, *fits)):
            choose_loader(wrong, source(kind), CPU)


class Rings(Source):
    """A source outside the package."""

    def __init__(self, workers):
        self.image_size, self.class_names, self.workers = 4, ["ring"], workers

    def __len__(self):
        return 6

    def class_counts(self):
        return [6]

    def name(self, index):
        return f"ring {index}"

    def read_into(self, index, image):
        image[:] = index
        return 0


@pytest.mark.parametrize(("workers", "name"), [("processes", "source"), ("threads", "source"), ("none", "memory")])
def test_an_unknown_source_has_the_loader_source_or_memory(workers, name, mentions):
    source = Rings(workers)
    choice = choose_loader("auto", source, CPU)
    assert choose_loader(name, source, CPU).name == name
    assert (choice.name, choice.decoder) == (name, "pillow")
    for other in set(LOADERS) - {"auto", name}:
        with pytest.raises(UserError, match=mentions("data.loader", other, name)):
            choose_loader(other, source, CPU)
    with Loader(source, 3, 0, workers=2, reader=choice.reader) as loader:
        batch = next(loader)
    assert batch.data[:, 0, 0, 0].tolist() == batch.ids.tolist()
