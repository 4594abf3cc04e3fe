"""Checkpoints of several ranks: bit-equal for every world size and sharding, saved on all ranks or on none."""

import errno
import os
import re
import shutil
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from unite_fast.checkpoint import format as files
from unite_fast.checkpoint import manager, save_plan
from unite_fast.checkpoint.folders import step_folders, step_of, step_path
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.config import Config
from unite_fast.distributed.dtensor import local
from unite_fast.errors import UserError

PROGRESS = {"averages": {"sums": [0.1 + 0.2, 1e-300], "count": 3}, "loader": {"batch": 7, "skipped": [["a", "b"]]}}


class Parts(nn.Module):
    """Parameters that divide evenly and unevenly, that have fewer rows than ranks, and one sharded along columns, where
    FSDP needs an even split."""

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


def zeros(mesh_shape: tuple[int, int] | None) -> dict[str, torch.Tensor]:
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


def shard(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, computed with torch.chunk."""
    if not hasattr(target, "placements"):
        return whole
    (dim,) = (placement.dim for placement in target.placements if placement.is_shard())
    count, index = target.device_mesh.shape[1], target.device_mesh.get_coordinate()[1]
    chunks = whole.chunk(count, dim)
    return chunks[index] if index < len(chunks) else whole.narrow(dim, 0, 0)


def save_sharded(mesh_shape, folder) -> int:
    """Returns the bytes that this rank copied."""
    named = zeros(mesh_shape)
    for name, whole in values().items():
        local(named[name].detach()).copy_(shard(whole, named[name]))
    checkpoints = Checkpoints(folder, 0)
    checkpoints.save(10, Config(), PROGRESS, named)
    for value in named.values():
        local(value.detach()).zero_()
    staged = sum(copy.nbytes for copy in checkpoints.copies.values())
    checkpoints.close()
    return staged


def assert_loads(mesh_shape, folder) -> None:
    checkpoints, named = Checkpoints(folder, 0), zeros(mesh_shape)
    checkpoint = checkpoints.find()
    checkpoints.load_into(checkpoint, named)
    checkpoints.close()
    assert (checkpoint.step, checkpoint.progress) == (10, PROGRESS)
    wrong = [n for n, whole in values().items() if not torch.equal(local(named[n].detach()), shard(whole, named[n]))]
    assert wrong == []


MESHES_OF_FOUR = [(1, 4), (4, 1), (2, 2)]
FILES_OF_EIGHT = {(1, 8): (1, 3), (2, 4): (3,)}
"""Numbers of files that ranks then share; 3 does not divide 8."""


def save_and_load_on_four(folder) -> list[int]:
    torch.distributed.init_process_group("gloo")
    staged = [save_sharded(saved, folder / f"{saved}") for saved in MESHES_OF_FOUR]
    for saved in MESHES_OF_FOUR:
        for loaded in MESHES_OF_FOUR:
            assert_loads(loaded, folder / f"{saved}")
    return staged


def load_on_meshes(meshes, folder) -> None:
    torch.distributed.init_process_group("gloo")
    for saved in MESHES_OF_FOUR:
        for mesh in meshes:
            assert_loads(mesh, folder / f"{saved}")


def test_a_checkpoint_of_four_ranks_loads_on_any_world_size(ranks, tmp_path):
    staged = ranks(4, save_and_load_on_four, tmp_path)
    whole = values()
    state = sum(value.nbytes for value in whole.values())
    for by_rank in zip(*staged, strict=True):
        assert sum(by_rank) == state, "a replica copies only what it writes"
        assert max(by_rank) < state / 2
    for saved in MESHES_OF_FOUR:
        folder = tmp_path / f"{saved}"
        # Every element is written once, replicated or not.
        stored = sum((folder / "latest" / name).stat().st_size for name in os.listdir(folder / "latest"))
        assert stored < sum(value.nbytes for value in whole.values()) + 20_000
        assert all(torch.equal(value, whole[name]) for name, value in load_checkpoint(folder).tensors.items())
        assert load_checkpoint(folder).tensors.keys() == whole.keys()
        assert_loads(None, folder)
    ranks(2, load_on_meshes, [(1, 2), (2, 1)], tmp_path)
    ranks(8, load_on_meshes, [(1, 8), (2, 4)], tmp_path)


def share_files_of_eight(folder) -> None:
    torch.distributed.init_process_group("gloo")
    for mesh, numbers in FILES_OF_EIGHT.items():
        for number in numbers:
            save_plan.MOST_FILES = number
            save_sharded(mesh, folder / f"{mesh} {number}")
            assert_loads(mesh, folder / f"{mesh} {number}")


def test_ranks_share_a_file_if_there_are_many(ranks, tmp_path):
    """What they write is read as if each had its own."""
    ranks(8, share_files_of_eight, tmp_path)
    whole = values()
    for mesh, numbers in FILES_OF_EIGHT.items():
        for number in numbers:
            folder = tmp_path / f"{mesh} {number}"
            stored = sorted((folder / "latest").glob("*.safetensors"))
            assert len(stored) <= number
            assert sum(path.stat().st_size for path in stored) < sum(value.nbytes for value in whole.values()) + 20_000
            loaded = load_checkpoint(folder).tensors
            assert loaded.keys() == whole.keys()
            assert all(torch.equal(loaded[name], value) for name, value in whole.items())
            assert_loads(None, folder)


class NoMemory:
    """The module torch, without memory."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *_, **__):
        raise RuntimeError("can't allocate memory")


def fail_on_the_writer(folder) -> list[str]:
    torch.distributed.init_process_group("gloo")
    save_plan.MOST_FILES, errors = 1, []
    rank, checkpoints, named = torch.distributed.get_rank(), Checkpoints(folder, 0), zeros((1, 4))
    checkpoints.save(10, Config(), PROGRESS, named)
    checkpoints.wait()
    real_save = files.save_file
    for step, module, name, failure in ((20, files, "save_file", full_disk), (30, manager, "torch", NoMemory())):
        real = getattr(module, name)
        setattr(module, name, failure if rank == 0 else real)
        checkpoints.save(step, Config(), PROGRESS, named)
        try:
            checkpoints.wait()
        except (UserError, RuntimeError) as error:
            errors.append(str(error))
        setattr(module, name, real)
    assert files.save_file is real_save
    checkpoints.save(40, Config(), PROGRESS, named)
    checkpoints.close()
    return errors


def test_a_writer_that_fails_leaves_no_rank_waiting(ranks, folder, mentions):
    for errors in ranks(4, fail_on_the_writer, folder):
        full, memory = errors
        assert re.search(mentions(step_path(folder, 20), os.strerror(errno.ENOSPC)), full)
        assert re.search(mentions("memory"), memory)
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010", "step_00000040"]
    assert [path.name for path in (folder / "latest").glob("*.safetensors")] == ["shard_00001.safetensors"]


def full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in step_folders(folder)]


def save_with_failures(folder) -> list:
    """Each failure happens on one rank; returns what this rank sees of them."""
    torch.distributed.init_process_group("gloo")
    rank, errors = torch.distributed.get_rank(), []
    checkpoints, named = Checkpoints(folder, 0), zeros((1, 2))
    checkpoints.save(10, Config(), PROGRESS, named)
    checkpoints.wait()
    real_save, real_read = files.save_file, files.read_shard

    def delete_and_read(path):
        path.unlink()
        return real_read(path)

    for step, failing_rank, name, failure in (
        (20, 1, "save_file", full_disk),
        (30, 1, "read_shard", delete_and_read),
        (40, 0, "write_manifest", full_disk),
    ):
        real = getattr(files, name)
        setattr(files, name, failure if rank == failing_rank else real)
        checkpoints.save(step, Config(), PROGRESS, named)
        try:
            checkpoints.wait()
        except UserError as error:
            errors.append((str(error), steps(folder), os.readlink(folder / "latest")))
        setattr(files, name, real)
    assert files.save_file is real_save
    checkpoints.save(50, Config(), PROGRESS, named)
    checkpoints.close()
    # If one rank sees damage, all ranks load the same earlier checkpoint.
    if rank == 0:
        flip_a_bit(folder / "step_00000050" / "shard_00002.safetensors")
    torch.distributed.barrier()
    checkpoints = Checkpoints(folder, 0)
    finite = checkpoints.all_finite(named)
    if rank == 1:
        local(named["model.even"].detach())[0, 0] = torch.inf
    return [*errors, checkpoints.find().step, finite, checkpoints.all_finite(named)]


def test_a_save_that_fails_on_one_rank_fails_on_all_and_keeps_the_previous_checkpoint(ranks, folder, mentions):
    for *errors, step_found, finite, still_finite in ranks(2, save_with_failures, folder):
        reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.ENOENT, errno.ENOSPC)]
        for step, reason, (message, *files_left) in zip((20, 30, 40), reasons, errors, strict=True):
            assert re.search(mentions(step_path(folder, step), reason), message)
            assert files_left == [[10], "step_00000010"]
        assert (step_found, finite, still_finite) == (10, True, False)
    shutil.rmtree(step_path(folder, 50))
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]
