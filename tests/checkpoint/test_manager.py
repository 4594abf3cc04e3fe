"""Checkpoints: bit-equal whatever the number of processes and their sharding, written beside the steps, never torn."""

import errno
import json
import multiprocessing
import os
import pickletools
import re
import shutil
import signal
import struct
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.format import step_folders, step_of, step_path
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.config import Config
from unite_fast.distributed.dtensor import local
from unite_fast.errors import UserError

PROGRESS = {"averages": {"sums": [0.1 + 0.2, 1e-300], "count": 3}, "loader": {"batch": 7, "skipped": [["a", "b"]]}}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.randn(5, 123),
        "ema.a": torch.randn(5, 123).T,  # strided: safetensors itself refuses it
        "optim.a.step": torch.tensor(3.0),
        "optim.a.momentum": torch.randn(7, dtype=torch.bfloat16),
        "model.empty": torch.zeros(0, 3),
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def checkpoints(folder):
    made = Checkpoints(folder, keep_every=0)
    yield made
    made.writer.shutdown()


def save(checkpoints, step, tensors, config=None) -> None:
    checkpoints.save(step, config or Config(), PROGRESS, tensors)
    checkpoints.wait()


def full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


def steps(folder) -> list[int]:
    return [step_of(path) for path in step_folders(folder)]


def test_what_is_saved_is_what_is_loaded(checkpoints, folder, tensors, tiny_config):
    save(checkpoints, 12, tensors, tiny_config)
    for path in (folder.parent, folder, folder / "latest", str(step_path(folder, 12))):
        found = load_checkpoint(path)
        assert (found.step, found.progress, found.config) == (12, PROGRESS, tiny_config)
        assert found.tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            assert found.tensors[name].dtype == value.dtype
            assert torch.equal(found.tensors[name], value)
    places = {name: torch.full_like(value, 7) for name, value in tensors.items()}
    found = checkpoints.find()
    checkpoints.load_into(found, places)
    assert (found.step, found.progress, found.config) == (12, PROGRESS, tiny_config)
    assert all(torch.equal(places[name], value) for name, value in tensors.items())
    assert checkpoints.all_finite(places)


def test_only_the_wanted_tensors_are_read(checkpoints, folder, tensors):
    save(checkpoints, 1, tensors)
    assert load_checkpoint(folder, ("ema.",)).tensors.keys() == {"ema.a"}


def test_a_checkpoint_is_json_and_numbers_without_pickles(checkpoints, folder, tensors):
    save(checkpoints, 1, tensors)
    assert sorted(os.listdir(folder / "latest")) == ["checkpoint.json", "shard_00001.safetensors"]
    assert json.loads((folder / "latest" / "checkpoint.json").read_text())["content"]["progress"] == PROGRESS
    data = (folder / "latest" / "shard_00001.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    sizes = [info["data_offsets"][1] - info["data_offsets"][0] for name, info in header.items() if name[0] != "_"]
    assert sum(sizes) == sum(value.numel() * value.element_size() for value in tensors.values())
    assert len(data) == 8 + length + sum(sizes)
    with pytest.raises(ValueError):
        list(pickletools.genops(data))


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda places: places.update({"more": torch.zeros(1)}), ("more",)),
        (lambda places: places.pop("ema.a"), ("ema.a",)),
        (lambda places: places.update({"ema.a": torch.zeros(5, 123)}), ("ema.a", "[123, 5]", "[5, 123]")),
        (
            lambda places: places.update({"ema.a": torch.zeros(123, 5).half()}),
            ("ema.a", "torch.float32", "torch.float16"),
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(checkpoints, folder, tensors, change, tokens, mentions):
    save(checkpoints, 1, tensors)
    places = dict(tensors)
    change(places)
    with pytest.raises(UserError, match=mentions(step_path(folder, 1), *tokens)) as refusal:
        checkpoints.load_into(checkpoints.find(), places)
    assert "\n" not in str(refusal.value)


def test_steps_go_on_while_a_checkpoint_is_written(checkpoints, folder, tensors, monkeypatch):
    """What is written is what the tensors held when they were saved."""
    save(checkpoints, 10, tensors)
    goes_on, real = threading.Event(), files.save_file
    monkeypatch.setattr(files, "save_file", lambda *call: (goes_on.wait(60), real(*call)))
    before = {name: value.clone() for name, value in tensors.items()}
    checkpoints.save(20, Config(), {}, tensors)
    for value in tensors.values():
        value.fill_(-1)
    assert load_checkpoint(folder).step == 10
    assert steps(folder) == [10]
    goes_on.set()
    checkpoints.wait()
    found = load_checkpoint(folder)
    assert found.step == 20
    assert all(torch.equal(found.tensors[name], value) for name, value in before.items())
    save(checkpoints, 30, tensors)
    assert all(bool((value == -1).all()) for value in load_checkpoint(folder).tensors.values())


@pytest.mark.parametrize("broken", ["save_file", "flush", "write_manifest", "os.replace"])
def test_a_save_that_fails_leaves_what_was_there(checkpoints, folder, tensors, monkeypatch, broken, mentions):
    save(checkpoints, 10, tensors)
    # The same step again, too: a resumed run writes over what it wrote before.
    for step in (10, 20):
        with monkeypatch.context() as patch:
            patch.setattr(f"unite_fast.checkpoint.format.{broken}", full_disk)
            checkpoints.save(step, Config(), {}, {"model.a": torch.zeros(1)})
            with pytest.raises(UserError, match=mentions(step_path(folder, step), os.strerror(errno.ENOSPC))):
                checkpoints.wait()
        assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]
        found = load_checkpoint(folder)
        assert found.step == 10
        assert torch.equal(found.tensors["model.a"], tensors["model.a"])


@pytest.mark.parametrize("share", [0.0, 0.5, None])
def test_a_shard_that_shrinks_or_goes_before_the_commit_fails_the_save(
    checkpoints, folder, tensors, monkeypatch, share, mentions
):
    """As on a network's disk that took a write and lost it: its size is the last thing looked at."""
    save(checkpoints, 10, tensors)
    write_manifest = files.write_manifest

    def lose(partial: Path, manifest) -> None:
        write_manifest(partial, manifest)
        shard = partial / manifest.shards[0].name
        if share is None:
            shard.unlink()
        else:
            os.truncate(shard, int(share * manifest.shards[0].size))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", lose)
        checkpoints.save(20, Config(), {}, tensors)
        with pytest.raises(UserError, match=mentions(step_path(folder, 20), "shard_00001.safetensors")):
            checkpoints.wait()
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]
    assert load_checkpoint(folder).step == 10


def test_the_error_of_a_save_is_raised_by_the_next_one_and_the_one_after_works(
    checkpoints, folder, tensors, monkeypatch, mentions
):
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full_disk)
        checkpoints.save(10, Config(), {}, tensors)
        with pytest.raises(UserError, match=mentions(step_path(folder, 10), os.strerror(errno.ENOSPC))):
            checkpoints.save(20, Config(), {}, tensors)
    assert steps(folder) == []
    checkpoints.save(30, Config(), {}, tensors)
    checkpoints.close()
    assert load_checkpoint(folder).step == 30


def test_something_in_the_way_is_an_error_of_one_line(tmp_path, tensors, mentions):
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", 0)
    checkpoints.save(1, Config(), {}, tensors)
    with pytest.raises(UserError, match=mentions(step_path(checkpoints.folder, 1), os.strerror(errno.ENOTDIR))):
        checkpoints.close()


def test_kill_9_in_the_middle_of_a_save(checkpoints, folder, tensors):
    save(checkpoints, 10, tensors)

    def die(_tensors, path, _metadata):
        Path(path).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)

    def child():
        files.save_file = die
        save(Checkpoints(folder, 0), 20, tensors)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010", "step_00000020.partial"]
    assert load_checkpoint(folder).step == 10
    save(checkpoints, 30, tensors)
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010", "step_00000030"]


def test_of_damaged_checkpoints_the_newest_whole_one_is_used(
    checkpoints, folder, tensors, checkpoint_warnings, mentions
):
    checkpoints.keep_every = 1
    for step in (10, 20, 30):
        save(checkpoints, step, tensors)
    flip_a_bit(step_path(folder, 30) / "shard_00001.safetensors")
    (step_path(folder, 20) / "shard_00001.safetensors").unlink()
    assert load_checkpoint(folder.parent).step == 10
    newest, second = checkpoint_warnings()
    assert re.match(mentions(step_path(folder, 30), "shard_00001.safetensors", step_path(folder, 10)), newest)
    assert re.match(mentions(step_path(folder, 20), os.strerror(errno.ENOENT), step_path(folder, 10)), second)
    # Whoever names one gets that one or an error, and the advice is a whole one.
    for step in (20, 30):
        with pytest.raises(UserError, match=rf"{step_path(folder, step)} .*step_000000[13]0$"):
            load_checkpoint(step_path(folder, step))
    flip_a_bit(step_path(folder, 10) / "shard_00001.safetensors")
    with pytest.raises(UserError, match=mentions(folder, step_path(folder, 30))):
        checkpoints.find()


def test_find_returns_none_without_checkpoints(checkpoints):
    assert checkpoints.find() is None


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


# Many processes.


class Parts(nn.Module):
    """Shapes that divide evenly, that do not, that have fewer rows than there are processes, and one cut along columns,
    which FSDP cuts evenly alone."""

    def __init__(self):
        super().__init__()
        shapes = {"even": (16, 4), "uneven": (5, 7), "few": (3,), "columns": (3, 16), "one": (1, 1)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.register_buffer("fixed", torch.zeros(6))


def values() -> dict[str, torch.Tensor]:
    """Whole tensors, all different."""
    generator = torch.Generator().manual_seed(0)
    model = Parts().state_dict()
    named = {f"{kind}.{name}": value for kind in ("model", "ema", "optim") for name, value in model.items()}
    named["optim.even"] = named["optim.even"].bfloat16()
    named["optim.step"] = torch.tensor(0.0)
    return {name: torch.randn(value.shape, generator=generator).to(value.dtype) for name, value in named.items()}


def places(mesh_shape: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """Zeros to load into: plain, or sharded over a mesh (replicate, shard)."""
    model = Parts()
    if mesh_shape:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
        columns = model.columns
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p is columns else None)
    named = {}
    for name, value in model.state_dict().items():
        named[f"model.{name}"] = value
        named[f"ema.{name}"] = value.detach().clone()
        named[f"optim.{name}"] = torch.zeros_like(value, dtype=torch.bfloat16 if name == "even" else None)
    return named | {"optim.step": torch.tensor(0.0)}


def part(whole: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, cut by hand: as torch.chunk cuts."""
    if not hasattr(place, "placements"):
        return whole
    (dim,) = (placement.dim for placement in place.placements if placement.is_shard())
    count, here = place.device_mesh.shape[1], place.device_mesh.get_coordinate()[1]
    chunks = whole.chunk(count, dim)
    return chunks[here] if here < len(chunks) else whole.narrow(dim, 0, 0)


def save_sharded(mesh_shape, folder) -> None:
    named = places(mesh_shape)
    for name, whole in values().items():
        local(named[name].detach()).copy_(part(whole, named[name]))
    checkpoints = Checkpoints(folder, 0)
    checkpoints.save(10, Config(), PROGRESS, named)
    for value in named.values():
        local(value.detach()).zero_()
    checkpoints.close()


def assert_loads(mesh_shape, folder) -> None:
    checkpoints, named = Checkpoints(folder, 0), places(mesh_shape)
    found = checkpoints.find()
    checkpoints.load_into(found, named)
    checkpoints.close()
    assert (found.step, found.progress) == (10, PROGRESS)
    wrong = [n for n, whole in values().items() if not torch.equal(local(named[n].detach()), part(whole, named[n]))]
    assert wrong == []


FOUR = [(1, 4), (4, 1), (2, 2)]


def on_four(folder) -> None:
    torch.distributed.init_process_group("gloo")
    for saved in FOUR:
        save_sharded(saved, folder / f"{saved}")
    for saved in FOUR:
        for loaded in FOUR:
            assert_loads(loaded, folder / f"{saved}")


def on_any(meshes, folder) -> None:
    torch.distributed.init_process_group("gloo")
    for saved in FOUR:
        for mesh in meshes:
            assert_loads(mesh, folder / f"{saved}")


def test_what_four_save_any_number_can_load(ranks, tmp_path):
    ranks(4, on_four, tmp_path)
    whole = values()
    for saved in FOUR:
        folder = tmp_path / f"{saved}"
        # Each number is written once, copies or not.
        stored = sum((folder / "latest" / name).stat().st_size for name in os.listdir(folder / "latest"))
        assert stored < sum(value.nbytes for value in whole.values()) + 20_000
        assert all(torch.equal(value, whole[name]) for name, value in load_checkpoint(folder).tensors.items())
        assert load_checkpoint(folder).tensors.keys() == whole.keys()
        assert_loads(None, folder)
    ranks(2, on_any, [(1, 2), (2, 1)], tmp_path)
    ranks(8, on_any, [(1, 8), (2, 4)], tmp_path)


def save_with_mishaps(folder) -> list:
    """Each mishap happens on one rank only; what every rank sees of it."""
    torch.distributed.init_process_group("gloo")
    rank, seen = torch.distributed.get_rank(), []
    checkpoints, named = Checkpoints(folder, 0), places((1, 2))
    checkpoints.save(10, Config(), PROGRESS, named)
    checkpoints.wait()
    real_save, real_read = files.save_file, files.read_shard

    def delete_and_read(path):
        path.unlink()
        return real_read(path)

    for step, victim, name, mishap in (
        (20, 1, "save_file", full_disk),
        (30, 1, "read_shard", delete_and_read),
        (40, 0, "write_manifest", full_disk),
    ):
        real = getattr(files, name)
        setattr(files, name, mishap if rank == victim else real)
        checkpoints.save(step, Config(), PROGRESS, named)
        try:
            checkpoints.wait()
        except UserError as error:
            seen.append((str(error), steps(folder), os.readlink(folder / "latest")))
        setattr(files, name, real)
    assert files.save_file is real_save
    checkpoints.save(50, Config(), PROGRESS, named)
    checkpoints.close()
    # A rank alone cannot load what the others find damaged: both go on from the same one.
    if rank == 0:
        flip_a_bit(folder / "step_00000050" / "shard_00002.safetensors")
    torch.distributed.barrier()
    checkpoints = Checkpoints(folder, 0)
    finite = checkpoints.all_finite(named)
    if rank == 1:
        local(named["model.even"].detach())[0, 0] = torch.inf
    return [*seen, checkpoints.find().step, finite, checkpoints.all_finite(named)]


def test_what_fails_on_one_rank_fails_on_all_and_the_checkpoint_before_survives(ranks, folder, mentions):
    for *seen, found, finite, still_finite in ranks(2, save_with_mishaps, folder):
        reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.ENOENT, errno.ENOSPC)]
        for step, reason, (message, *left) in zip((20, 30, 40), reasons, seen, strict=True):
            assert re.search(mentions(step_path(folder, step), reason), message)
            assert left == [[10], "step_00000010"]
        assert (found, finite, still_finite) == (10, True, False)
    shutil.rmtree(step_path(folder, 50))
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]
