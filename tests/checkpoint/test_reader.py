"""Tensors assembled from shards written without DCP. test_manager.py reads what DCP wrote on several ranks."""

import json

import pytest
import torch
from safetensors.torch import save_file

from unite_fast.checkpoint.reader import OFFSETS, SHARDING_INFO, read_tensors
from unite_fast.errors import UserError


def write(path, offsets: dict[str, list[int]], **tensors: torch.Tensor):
    save_file(tensors, path, {SHARDING_INFO: json.dumps({name: {OFFSETS: start} for name, start in offsets.items()})})
    return path


def test_offsets_say_where_parts_go(tmp_path):
    whole = torch.arange(35.0).reshape(5, 7)
    shards = [
        write(tmp_path / "1.safetensors", {"model.a": [3, 0]}, **{"model.a": whole[3:].clone()}),
        write(tmp_path / "2.safetensors", {"model.a": [0, 4]}, **{"model.a": whole[:3, 4:].clone()}),
        write(tmp_path / "3.safetensors", {"model.a": [0, 0]}, **{"model.a": whole[:3, :4].clone()}),
    ]
    assert torch.equal(read_tensors(tmp_path, shards, ("",))["model.a"], whole)


def test_whole_tensors_need_no_offsets(tmp_path):
    tensors = {"model.scalar": torch.tensor(3), "model.empty": torch.zeros(0, 4), "ema.b": torch.ones(2).bfloat16()}
    shards = [write(tmp_path / "1.safetensors", {}, **tensors)]
    read = read_tensors(tmp_path, shards, ("model.",))
    assert read.keys() == {"model.scalar", "model.empty"}
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)


def test_a_missing_part_is_named(tmp_path, mentions):
    shards = [write(tmp_path / "1.safetensors", {"model.a": [2, 0]}, **{"model.a": torch.zeros(2, 3)})]
    with pytest.raises(UserError, match=mentions(tmp_path, "model.a")):
        read_tensors(tmp_path, shards, ("",))


def test_a_file_that_is_no_safetensors_is_an_error(tmp_path, mentions):
    (tmp_path / "1.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match=mentions(tmp_path)):
        read_tensors(tmp_path, [tmp_path / "1.safetensors"], ("",))
