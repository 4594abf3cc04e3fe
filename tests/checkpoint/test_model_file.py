"""Models as single files: `export`, `load` and `describe`."""

import errno
import json
import os
import random
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

import unite_fast
from unite_fast.checkpoint import model_file
from unite_fast.checkpoint.model_file import describe, export_model, load_model, save_model
from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.recipes import to_tree


@pytest.fixture
def exported(trained_folder, tmp_path):
    export_model(trained_folder, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_an_exported_model_samples_what_its_run_samples(trained_folder, exported):
    one, other = unite_fast.load(trained_folder), unite_fast.load(exported)
    assert (one.config, one.step) == (other.config, other.step)
    assert one.class_names == other.class_names == [str(digit) for digit in range(10)]
    for name, value in one.network.state_dict().items():
        assert torch.equal(other.network.state_dict()[name], value), name
    assert torch.equal(one.generate([1, 2]), other.generate([1, 2]))


def test_a_file_has_only_averages_and_buffers(trained_folder, exported):
    run, file = load_model(trained_folder), load_model(exported)
    assert file.averages.keys() == run.averages.keys() == run.weights.keys()
    assert "encoder.time_embed.frequencies" in file.averages  # drawn once, never trained
    assert all(torch.equal(value, run.averages[name]) for name, value in file.averages.items())
    assert any(not torch.equal(value, run.weights[name]) for name, value in file.averages.items())
    assert file.weights is file.averages
    plain = exported.with_name("plain")
    plain.touch()
    assert exported.stat().st_mode == plain.stat().st_mode
    data = exported.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header["__metadata__"][model_file.FORMAT])["step"] == 20
    assert len(data) == 8 + length + sum(value.nbytes for value in file.averages.values())


def test_commands_accept_an_exported_model(command, exported, tmp_path, mentions):
    assert command("export", exported, tmp_path / "again.safetensors").status == 0
    assert (tmp_path / "again.safetensors").read_bytes() == exported.read_bytes()
    ended = command("info", exported)
    assert re.match(mentions("model.safetensors", "digits", 20), ended.out)
    ended = command("sample", exported, "--count", 2, "--steps", 1, "--out", tmp_path / "a.png")
    assert (ended.status, ended.err) == (0, "")
    command("export", exported, tmp_path / "model.bin").error(tmp_path / "model.bin", ".safetensors")


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(exported, fraction, mentions):
    exported.write_bytes(exported.read_bytes()[: int(fraction * exported.stat().st_size)])
    with pytest.raises(UserError, match=mentions(exported)) as refusal:
        load_model(exported)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"garbage" * 100, b"\xff" * 64, b"PK\x03\x04", b"\x80\x04\x95K."])
def test_garbage_is_refused(tmp_path, content, mentions):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=mentions(path)):
        load_model(path)


def test_foreign_files_and_checkpoints_of_other_versions_are_refused(tmp_path, mentions):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=mentions(path, "unite-fast export")):
        load_model(path)
    save_file({"model.a": torch.zeros(3), "optim.a.momentum": torch.zeros(3)}, path, {"unite_fast checkpoint 1": "{}"})
    with pytest.raises(UserError, match=mentions(path, "checkpoint", "version")):
        load_model(path)


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "[]",
        "3",
        "{}",
        '{"config": {}}',
        '{"config": [], "step": 1}',
        '{"config": {"zzz": 1}, "step": 1}',
        '{"config": {}, "step": "one"}',
        '{"config": {}, "step": null}',
        '{"config": {}, "step": -1}',
        '{"config": {}, "step": 1e3}',
        '{"config": {}, "step": "1_0"}',
        '{"config": {}, "step": 1, "step": 2}',
        '{"config": {"schedule": {"lr": NaN}}, "step": 1}',
        '{"config": {"schedule": {"lr": 1e999}}, "step": 1}',
        '{"config": {}, "step": 1, "sha256": "0"}',
        '{"config": {}, "step": 1, "shb256": "%s"}' % ("0" * 64),
        "[" * 100_000,
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, path, {model_file.FORMAT: header})
    with pytest.raises(UserError) as refusal:
        load_model(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("seed", range(4))
def test_any_damaged_byte_is_refused(exported, seed):
    """50 bytes each: of the length, the header, its padding and the tensors."""
    data, draw = exported.read_bytes(), random.Random(seed)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(50):
        place = draw.randrange(*draw.choice([(0, 8), (8, end), (end - 16, end), (end, len(data))]))
        damaged = bytearray(data)
        damaged[place] ^= draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
        exported.write_bytes(damaged)
        with pytest.raises(UserError) as refusal:
            load_model(exported)
        assert str(exported) in str(refusal.value) and "\n" not in str(refusal.value)


def rewritten(path, change, **entries) -> None:
    """Write a model file again as a version without checksums would, with other tensors and header entries."""
    model = load_model(path)
    tensors = dict(model.averages)
    change(tensors)
    header = {"config": to_tree(model.config), "step": model.step} | entries
    save_file(tensors, path, {model_file.FORMAT: json.dumps(header)})


def test_a_file_of_an_earlier_version_loads_with_a_warning(exported, checkpoint_warnings, mentions):
    before = load_model(exported)
    assert checkpoint_warnings() == []
    rewritten(exported, lambda tensors: None)
    assert all(torch.equal(value, before.averages[name]) for name, value in load_model(exported).averages.items())
    (warning,) = checkpoint_warnings()
    assert re.search(mentions(exported, "checksum"), warning)


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda t: t["latent_norm.weight"].fill_(torch.nan), ("latent_norm.weight", "finite")),
        (lambda t: t["encoder.time_embed.frequencies"].fill_(torch.inf), ("encoder.time_embed.frequencies", "finite")),
        (lambda t: t.update({"latent_norm.weight": t["latent_norm.weight"].half()}), ("latent_norm.weight", "float16")),
        (lambda t: t.update({"latent_norm.weight": t["latent_norm.weight"].int()}), ("latent_norm.weight", "int32")),
    ],
)
def test_weights_that_are_not_finite_or_of_another_type_are_refused(exported, change, tokens, mentions):
    rewritten(exported, change)
    with pytest.raises(UserError, match="^(?!.*\n)" + mentions(exported, *tokens)):
        load_model(exported)


@pytest.mark.parametrize(
    "model",
    [
        {"encoder": {"depth": 10**9}},
        {"image_size": 2**31, "patch_size": 2},
        {"encoder": {"width": 2**40, "depth": 2, "heads": 2**30}},
        {"num_classes": 2**62},
        {"num_classes": 2**80},
    ],
)
def test_sizes_that_no_file_has_are_refused_at_once(exported, model):
    rewritten(exported, lambda tensors: None, config={"model": model})
    with pytest.raises(UserError) as refusal:
        load_model(exported)
    assert str(exported) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_header_that_claims_more_elements_than_the_file_has_is_refused(exported, mentions):
    header = {"a": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    text = json.dumps(header | {"__metadata__": {model_file.FORMAT: json.dumps({"config": {}, "step": 1})}}).encode()
    exported.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(UserError, match=mentions(exported)):
        load_model(exported)


def test_a_pipe_or_a_device_is_no_model(tmp_path, mentions):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match=mentions(path)):
            load_model(path)


def test_a_failed_write_keeps_the_previous_file(exported, tmp_path, monkeypatch, mentions):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before = exported.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("unite_fast.checkpoint.format.save_file", fail)
        with pytest.raises(UserError, match=mentions(exported, os.strerror(errno.ENOSPC))):
            save_model(exported, Config(), 1, {})
    assert exported.read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=mentions(tmp_path / "file" / "model.safetensors", os.strerror(errno.EEXIST))):
        save_model(tmp_path / "file" / "model.safetensors", Config(), 1, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "model.safetensors"]


def test_a_checkpoint_without_an_average_is_refused(trained_folder, rewrite, tmp_path, mentions):
    shutil.copytree(trained_folder, tmp_path / "run", symlinks=True)
    rewrite(tmp_path / "run", lambda saved: saved.tensors.pop("ema.latent_norm.weight"))
    with pytest.raises(UserError, match=mentions(tmp_path / "run", "latent_norm.weight")):
        load_model(tmp_path / "run")


def test_a_description_has_step_sizes_and_settings(trained_folder, mentions):
    text = describe(trained_folder)
    assert re.match(mentions("step_00000020", "digits", 20), text)
    total, encoder, decoder = (int(part.replace(",", "")) for part in numbers_after(text, "parameters: "))
    assert 0 < total - encoder - decoder < 100, "the LayerNorm between them"
    assert "width: 16" in text and "batch_size: 8" in text


def numbers_after(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [word.strip("(),") for word in line.split() if word.strip("(),").replace(",", "").isdigit()]


def test_describing_a_missing_path_is_an_error(tmp_path, mentions):
    with pytest.raises(UserError, match=mentions(tmp_path / "nothing")):
        describe(tmp_path / "nothing")


def test_names_that_would_not_fit_into_the_header_are_not_written(trained_folder, tmp_path, monkeypatch):
    saved = load_model(trained_folder)
    names = ["\udcff" * 100, *map(str, range(9))]
    save_model(tmp_path / "a.safetensors", saved.config, 1, saved.averages, names)
    assert load_model(tmp_path / "a.safetensors").class_names == names
    monkeypatch.setattr(model_file, "MOST_NAME_BYTES", 600)
    save_model(tmp_path / "a.safetensors", saved.config, 1, saved.averages, names)
    assert load_model(tmp_path / "a.safetensors").class_names == []
