"""Checkpoints: whole or not there at all, no more of them than asked for, and nothing in them that runs."""

import json
import os
import pickletools
import struct

import pytest
import torch
from safetensors.torch import save_file

from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.recipes import from_tree
from unite_fast.training import checkpoint as ckpt
from unite_fast.training.checkpoint import load_checkpoint, save_checkpoint, step_path

PROGRESS = {"averages": {"sums": [0.1 + 0.2, 1e-300], "count": 3}, "loader": {"batch": 7, "skipped": [["a", "b"]]}}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.randn(5, 123),
        "ema.a": torch.randn(5, 123).T,  # strided: safetensors itself refuses it
        "optim.a.step": torch.tensor(3.0),
        "optim.a.momentum": torch.randn(7, dtype=torch.bfloat16),
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def save(folder, step, tensors, config=None) -> None:
    """What the trainer does at a checkpoint."""
    path = step_path(folder, step)
    save_checkpoint(path, config or Config(), step, PROGRESS, tensors)
    ckpt.point_latest(path)


def steps(folder) -> list[int]:
    return [ckpt.step_of(path) for path in ckpt.step_files(folder)]


def test_what_is_saved_is_what_is_loaded(folder, tensors, tiny_config):
    save(folder, 12, tensors, tiny_config)
    for path in (folder.parent, folder, folder / "latest.safetensors", str(step_path(folder, 12))):
        found = load_checkpoint(path)
        assert (found.step, found.progress, found.config) == (12, PROGRESS, tiny_config)
        assert found.tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            assert found.tensors[name].dtype == value.dtype
            assert torch.equal(found.tensors[name], value)


def test_only_the_wanted_tensors_are_read(folder, tensors):
    save(folder, 1, tensors)
    assert load_checkpoint(folder, ("ema.",)).tensors.keys() == {"ema.a"}


def test_a_checkpoint_is_json_and_numbers_without_pickles(folder, tensors):
    save(folder, 1, tensors)
    data = step_path(folder, 1).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    sizes = [info["data_offsets"][1] - info["data_offsets"][0] for name, info in header.items() if name[0] != "_"]
    assert sum(sizes) == sum(value.numel() * value.element_size() for value in tensors.values())
    assert len(data) == 8 + length + sum(sizes)
    assert not data.startswith(b"PK")
    with pytest.raises(ValueError):
        list(pickletools.genops(data))


def test_a_checkpoint_has_the_permissions_of_any_file(folder, tensors):
    save(folder, 1, tensors)
    plain = folder / "plain"
    plain.touch()
    assert step_path(folder, 1).stat().st_mode == plain.stat().st_mode


def test_latest_is_a_link_that_survives_a_move_of_the_folder(folder, tensors):
    save(folder, 1, tensors)
    save(folder, 2, tensors)
    assert os.readlink(folder / "latest.safetensors") == "step_00000002.safetensors"
    moved = folder.parent.rename(folder.parents[1] / "moved")
    assert load_checkpoint(moved).step == 2


@pytest.mark.parametrize("broken", ["save_file", "_flush", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there(folder, tensors, monkeypatch, broken, error):
    save(folder, 10, tensors)
    # The same step again, too: a resumed run writes over what it wrote before.
    for step in (10, 20):
        with monkeypatch.context() as patch:

            def fail(*_):
                # Whatever it writes, no one may take it for a checkpoint.
                assert steps(folder) == [10]
                raise error

            patch.setattr(f"unite_fast.training.checkpoint.{broken}", fail)
            expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
            with pytest.raises(expected) as failure:
                save_checkpoint(step_path(folder, step), Config(), step, {}, {"model.a": torch.zeros(1)})
        if expected is UserError:
            assert str(failure.value) == (
                f"could not save {step_path(folder, step)}: No space left on device; "
                "checkpoints saved before are untouched"
            )
        assert sorted(os.listdir(folder)) == ["latest.safetensors", "step_00000010.safetensors"]
        found = load_checkpoint(folder)
        assert found.step == 10
        assert torch.equal(found.tensors["model.a"], tensors["model.a"])


def test_what_a_killed_save_left_is_no_checkpoint_and_is_cleared_away(folder, tensors):
    save(folder, 10, tensors)
    aside = folder / "step_00000020.safetensors.partial"
    aside.mkdir()
    (aside / ".tmpXYZ").write_bytes(b"half a checkpoint")
    assert steps(folder) == [10]
    assert load_checkpoint(folder.parent).step == 10
    ckpt.prune(folder, 0, 10)
    assert not aside.exists()
    assert steps(folder) == [10]


@pytest.mark.parametrize(
    ("keep_every", "kept"), [(0, [50, 60]), (20, [20, 40, 50, 60]), (30, [30, 50, 60]), (7, [50, 60])]
)
def test_all_but_the_newest_two_and_the_multiples_are_deleted(folder, tensors, keep_every, kept):
    for step in range(10, 70, 10):
        save(folder, step, tensors)
        ckpt.prune(folder, keep_every, step)
    assert steps(folder) == kept
    assert load_checkpoint(folder).step == 60


def test_no_checkpoint_is_deleted_for_the_sake_of_a_later_step(folder, tensors):
    """Someone pointed the link at an older checkpoint, or a kill came between a save and its link: the run goes on from
    the older one, beside files of steps that it has yet to reach."""
    for step in (10, 30, 40):
        save(folder, step, tensors)
    ckpt.point_latest(step_path(folder, 10))
    save(folder, 20, tensors)
    ckpt.prune(folder, 0, 20)
    assert steps(folder) == [10, 20, 30, 40]
    assert load_checkpoint(folder).step == 20


def test_other_files_in_the_folder_do_not_matter(folder, tensors):
    save(folder, 10, tensors)
    (folder / "step_best.safetensors").write_bytes(b"")
    (folder / "step_00000010 (copy).safetensors").write_bytes(b"")
    ckpt.prune(folder, 0, 10)
    assert steps(folder) == [10]
    assert len(os.listdir(folder)) == 4


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_torn_file_is_refused_and_the_one_before_is_named(folder, tensors, share):
    save(folder, 10, tensors)
    save(folder, 20, tensors)
    torn = step_path(folder, 20)
    torn.write_bytes(torn.read_bytes()[: int(share * torn.stat().st_size)])
    with pytest.raises(UserError, match="is not a readable checkpoint, or is incomplete") as refusal:
        load_checkpoint(folder)
    assert str(refusal.value).endswith(f"; another one is {step_path(folder, 10)}")
    assert "\n" not in str(refusal.value)
    # The advice works: without the torn file the run goes on from the one before.
    torn.unlink()
    assert load_checkpoint(folder).step == 10


@pytest.mark.parametrize("content", [b"garbage" * 100, b"\xff" * 64, b"PK\x03\x04", b"\x80\x04\x95K."])
def test_garbage_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} is not a readable checkpoint"):
        load_checkpoint(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors is a safetensors file but no unite_fast checkpoint"):
        load_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "[]",
        "3",
        "{}",
        '{"config": {}}',
        '{"config": [], "step": 1, "progress": {}}',
        '{"config": {"zzz": 1}, "step": 1, "progress": {}}',
        '{"config": {}, "step": "one", "progress": {}}',
        '{"config": {}, "step": null, "progress": {}}',
        '{"config": {}, "step": 1, "progress": 3}',
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    save_file({"model.a": torch.zeros(3)}, path, {ckpt.FORMAT: header})
    with pytest.raises(UserError) as refusal:
        load_checkpoint(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)


def test_no_permission_to_make_the_folder_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"could not save .*: Not a directory; checkpoints saved before are untouched"):
        save_checkpoint(tmp_path / "file" / "model.safetensors", from_tree(Config, {}), 1, {}, {})
