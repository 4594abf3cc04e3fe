"""Disk and loader."""

import os

import pytest
import torch

from unite_fast.cluster_check import rates
from unite_fast.cluster_check.rates import disk_rates, loader_rate
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.recipes import load_config


def test_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "FILE_BYTES", 2**23)
    written = []
    write = os.write
    monkeypatch.setattr(rates.os, "write", lambda file, data: written.append(write(file, data)) or written[-1])
    found = disk_rates(tmp_path)
    assert found["write"] > 0 and found["read"] > 0
    assert sum(written) == 2**23
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="missing"):
        disk_rates(tmp_path / "missing")


def test_a_slow_disk_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "LONGEST", 0.0)
    assert disk_rates(tmp_path)["read"] == 0


@pytest.mark.parametrize("world", [1, 2])
def test_loader(world):
    found = loader_rate(load_config("digits"), Ranks(0, world), torch.device("cpu"), 0.01)
    assert (found["images"], found["classes"], found["loader"]) == (1437, 10, "memory")
    assert found["rate"] > 0 and found["opened"] >= 0


def test_faulty_data(mentions, tmp_path):
    config = load_config("digits", ("data.source=folder", f"data.path={tmp_path / 'nowhere'}"))
    with pytest.raises(UserError, match=mentions(tmp_path / "nowhere")):
        loader_rate(config, Ranks(), torch.device("cpu"), 0.01)


def test_a_batch_that_cannot_be_split(mentions):
    with pytest.raises(UserError, match=mentions("train.batch_size", 3)):
        loader_rate(load_config("digits", ("train.batch_size=64",)), Ranks(0, 3), torch.device("cpu"), 0.01)
