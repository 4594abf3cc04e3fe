"""The manifest of a checkpoint, checks of its files, and detection of damage."""

import errno
import json
import os

import pytest
import torch

from unite_fast.checkpoint import folders
from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.format import (
    MANIFEST,
    DamagedCheckpoint,
    Shard,
    check_checksums,
    check_sizes,
    places_of,
    read_manifest,
)
from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.recipes import from_tree, to_tree
from unite_fast.training.run_folder import flatten


def test_a_manifest_round_trips(folder, tiny_config, write, progress):
    manifest = read_manifest(write(folder, 12, b"123456789", tiny_config))
    assert (manifest.config, manifest.step, manifest.progress) == (tiny_config, 12, progress)
    # The check value in the definition of CRC-32.
    assert manifest.shards == [Shard("shard", 9, 0xCBF43926)]


@pytest.mark.parametrize(("umask", "mode"), [((), "0o644"), ((0o077,), "0o600"), ((0o002,), "0o664")])
def test_the_umask_sets_the_permissions_of_shards(folder, umask, mode):
    before = os.umask(*umask or (0o022,))
    try:
        folders.make_empty(folder)
        files.save_safetensors({"a": torch.zeros(3)}, folder / "shard", {})
    finally:
        os.umask(before)
    assert oct((folder / "shard").stat().st_mode & 0o777) == mode


def test_damage_to_a_shard_is_detected(folder, mentions, write):
    path = write(folder, 10, bytes(1000))
    shards, shard = read_manifest(path).shards, path / "shard"
    check_sizes(path, shards)
    check_checksums(path, shards)
    flipped = bytearray(1000)
    flipped[617] ^= 1
    shard.write_bytes(flipped)
    check_sizes(path, shards)
    with pytest.raises(DamagedCheckpoint, match=mentions("step_00000010", "shard")):
        check_checksums(path, shards)
    shard.write_bytes(bytes(999))
    with pytest.raises(DamagedCheckpoint, match=mentions("shard", 999, 1000)):
        check_sizes(path, shards)
    shard.unlink()
    for check in (check_sizes, check_checksums):
        with pytest.raises(DamagedCheckpoint, match=mentions("shard", os.strerror(errno.ENOENT))):
            check(path, shards)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_manifest_is_detected(folder, fraction, mentions, write):
    path = write(folder, 10)
    whole = (path / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(DamagedCheckpoint, match=mentions("step_00000010", MANIFEST)):
        read_manifest(path)
    (path / MANIFEST).unlink()
    assert folders.candidates(path) == [path], "its name marks it as a checkpoint"
    with pytest.raises(DamagedCheckpoint, match=mentions("step_00000010", MANIFEST)):
        read_manifest(path)


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", "{}", '{"format": "unite_fast checkpoint 2"}', "[" * 100_000, '{"format": NaN}', "9" * 5000],
)
def test_a_malformed_manifest_is_detected(folder, text, write):
    path = write(folder, 10)
    (path / MANIFEST).write_text(text)
    with pytest.raises(DamagedCheckpoint) as refusal:
        read_manifest(path)
    assert "\n" not in str(refusal.value)


def test_an_edited_manifest_is_detected_and_another_version_refused(folder, mentions, write):
    path = write(folder, 10)
    outer = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(outer).replace('"step": 10', '"step": 11'))
    with pytest.raises(DamagedCheckpoint, match=mentions("step_00000010", MANIFEST)):
        read_manifest(path)
    (path / MANIFEST).write_text(json.dumps(outer | {"format": "unite_fast checkpoint 9"}))
    with pytest.raises(UserError, match=mentions("step_00000010", "checkpoint 9", "checkpoint 2")):
        read_manifest(path)


def named_everywhere() -> Config:
    """Settings in which every place is named."""
    return from_tree(
        Config,
        {
            "data": {"source": "shards", "path": "pipe:touch mark; cat {}"},
            "perceptual": {"vgg_path": "/v", "lpips_path": "/l"},
            "train": {"out": "/o", "wandb": "mine"},
            "evaluation": {"inception": "/i", "reference": "/r"},
        },
    )


def test_a_checkpoint_names_no_file_command_or_address_that_is_used(folder, write):
    config = named_everywhere()
    read = read_manifest(write(folder, 10, config=config)).config
    assert read == from_tree(Config, {"data": {"source": "shards"}})
    assert files.as_recorded(read) == config
    assert places_of(read).keys() == set(files.PLACES)
    assert places_of(config) == {}, "a recipe's paths are not recorded ones"
    # Settings that may hold any text are either places, or name something that is neither opened nor run.
    texts = {key for key, value in flatten(to_tree(Config())).items() if isinstance(value, str)}
    choices = {"kernels", "attention", "data.loader", "perceptual.input_range", "optim.muon_dtype", "optim.adamw"}
    choices |= {"optim.nonfinite", "train.precision", "train.device", "parallel.strategy", "sampling.solver"}
    choices |= {"sampling.order", "evaluation.features", "model.modality", "model.latent_norm", "molecules.rotate"}
    choices |= {"molecules.batching", "model.elements", "schedule.batch_rule"}
    digests = {"perceptual.vgg_sha256", "perceptual.lpips_sha256"}
    assert texts == {*files.PLACES, *choices, *digests, "name", "data.source", "profile.steps"}


@pytest.mark.parametrize(
    "change", [{"step": step} for step in (-1, 1.5, "1_0", "\u0663", True, 2**80, None)] + [{"progress": []}]
)
def test_values_of_another_kind_are_an_error(folder, change, mentions, write):
    path = write(folder, 10)
    outer = json.loads((path / MANIFEST).read_text())
    outer["content"] |= change
    (path / MANIFEST).write_text(json.dumps(outer | {"crc32": files._crc32(outer["content"])}))
    with pytest.raises(DamagedCheckpoint, match=mentions(path, MANIFEST)) as refusal:
        read_manifest(path)
    assert "\n" not in str(refusal.value)


def test_a_manifest_that_is_no_file_is_an_error(folder, tmp_path, mentions, write):
    path = write(folder, 10)
    (path / MANIFEST).rename(tmp_path / "outside")
    os.mkfifo(path / MANIFEST)
    with pytest.raises(DamagedCheckpoint, match=mentions(path, MANIFEST, "regular")):
        read_manifest(path)
    (path / MANIFEST).unlink()
    (path / MANIFEST).symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedCheckpoint, match=mentions(path, MANIFEST, "link")):
        read_manifest(path)


def test_unknown_settings_are_an_error(folder, mentions, write):
    path = write(folder, 10)
    outer = json.loads((path / MANIFEST).read_text())
    outer["content"]["config"]["zzz"] = 1
    (path / MANIFEST).write_text(json.dumps(outer | {"crc32": files._crc32(outer["content"])}))
    with pytest.raises(UserError, match=mentions("step_00000010", "zzz")):
        read_manifest(path)


def test_a_manifest_is_not_written_larger_than_it_is_read(folder, write, monkeypatch, mentions):
    path = write(folder, 10)
    manifest = read_manifest(path)
    monkeypatch.setattr(files, "MOST_MANIFEST_BYTES", 1000)
    with pytest.raises(OSError, match=mentions(MANIFEST, "1,000")):
        files.write_manifest(path, manifest)
    with pytest.raises(DamagedCheckpoint, match=mentions(path, MANIFEST, "1,000")):
        read_manifest(path)
