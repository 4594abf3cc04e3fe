"""Tensors assembled from shards written without DCP. test_manager_on_ranks.py reads what
DCP wrote on several ranks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from unite_fast.checkpoint import reader
from unite_fast.checkpoint.folders import step_path
from unite_fast.checkpoint.reader import OFFSETS, SHARDING_INFO, load_checkpoint, read_tensors
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


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ([([0, 0], (2, 3)), ([1, 0], (2, 3))], "missing"),  # overlap, and twice a row too many
        ([([0, 0], (2, 3)), ([1, 0], (2, 3)), ([5, 0], (1, 3))], "missing"),
        ([([0, 0], (2, 3)), ([1, 0], (2, 3)), ([4, 0], (1, 3))], "overlap"),  # the sizes add up: row 3 is missing
        ([([0, 0], (2, 2)), ([0, 2], (1, 1)), ([0, 2], (1, 1))], "overlap"),
        ([([0, 0], (3, 1)), ([0, 1], (1, 2)), ([1, 1], (1, 2)), ([2, 0], (1, 2))], "overlap"),  # the first and the last
        ([([0, 0], (2, 3)), ([0, 0], (2, 3))], "missing"),
        ([([-1, 0], (2, 3))], "saved_offsets"),
        ([([0, 2**60], (2, 3))], "saved_offsets"),
        ([([0], (2, 3))], "offsets"),
        ([([0, 0, 0], (2, 3))], "offsets"),
        ([([0.0, 0], (2, 3))], "saved_offsets"),
        ([(["0", 0], (2, 3))], "saved_offsets"),
        ([([0, 0], (2, 3)), ([2, 0], (2, 3, 1))], "offsets"),
    ],
)
def test_parts_that_are_no_whole_tensor_are_refused(tmp_path, parts, word, mentions):
    shards = [
        write(tmp_path / f"{i}.safetensors", {"model.a": start}, **{"model.a": torch.zeros(shape)})
        for i, (start, shape) in enumerate(parts)
    ]
    with pytest.raises(UserError, match=mentions(tmp_path) + f".*{word}"):
        read_tensors(tmp_path, shards, ("",))


def test_parts_of_different_types_are_refused(tmp_path, mentions):
    shards = [
        write(tmp_path / f"{i}.safetensors", {"model.a": [i]}, **{"model.a": torch.zeros(1, dtype=dtype)})
        for i, dtype in enumerate((torch.float32, torch.float64))
    ]
    with pytest.raises(UserError, match=mentions(tmp_path, "model.a")):
        read_tensors(tmp_path, shards, ("",))


@pytest.mark.parametrize("text", ["no json", "[]", '{"model.b": {"saved_offsets": [0]}}', '{"model.a": {}}'])
def test_a_header_that_does_not_say_where_parts_go_is_refused(tmp_path, text, mentions):
    save_file({"model.a": torch.zeros(2)}, tmp_path / "1.safetensors", {SHARDING_INFO: text})
    with pytest.raises(UserError, match=mentions(tmp_path)):
        read_tensors(tmp_path, [tmp_path / "1.safetensors"], ("",))


def test_checkpoints_deleted_while_they_are_read_give_way_to_newer_ones(trained_folder, tmp_path, monkeypatch):
    """As by a run that saves and prunes meanwhile."""
    shutil.copytree(trained_folder, tmp_path / "run", symlinks=True)
    folder, real, calls = tmp_path / "run" / "checkpoints", reader.read_tensors, []

    def prune_and_read(path, shards, prefixes):
        calls.append(path)
        if len(calls) < 3:
            newer = step_path(folder, 20 + len(calls))
            (folder / "latest").unlink(missing_ok=True)
            path.rename(newer)
        return real(path, shards, prefixes)

    monkeypatch.setattr(reader, "read_tensors", prune_and_read)
    assert load_checkpoint(tmp_path / "run").path == step_path(folder, 22)
    monkeypatch.setattr(reader, "read_tensors", lambda *_: calls.append("once more") or real(tmp_path, [tmp_path], ()))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "run")
    assert calls.count("once more") == 1, "a checkpoint that stays damaged is read once"


def test_a_missing_part_is_named(tmp_path, mentions):
    shards = [write(tmp_path / "1.safetensors", {"model.a": [2, 0]}, **{"model.a": torch.zeros(2, 3)})]
    with pytest.raises(UserError, match=mentions(tmp_path, "model.a")):
        read_tensors(tmp_path, shards, ("",))


def test_a_file_that_is_no_safetensors_is_an_error(tmp_path, mentions):
    (tmp_path / "1.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match=mentions(tmp_path)):
        read_tensors(tmp_path, [tmp_path / "1.safetensors"], ("",))
