"""Checkpoints, exported model files, checkpoints of the authors' code, traces, weights."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from unite_fast.checkpoint.format import MANIFEST
from unite_fast.checkpoint.model_file import describe, export_model, load_model
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.interop.official import export_official, import_official
from unite_fast.interop.trace import Trace
from unite_fast.recipes import to_tree
from unite_fast.utils.pretrained import WeightFile

pytestmark = pytest.mark.usefixtures("slow_inputs")


def _equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def checkpoint(trained_folder: Path) -> Path:
    return (trained_folder / "checkpoints/latest").resolve()


@pytest.fixture(scope="session")
def model_file(checkpoint: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    export_model(checkpoint, path)
    return path


def _copy(checkpoint: Path, folder: Path) -> Path:
    return shutil.copytree(checkpoint, folder / checkpoint.name)


def test_damaged_checkpoints(fuzz, checkpoint):
    """Bytes, whole files, foreign files, links: the same model, or an error."""
    whole = load_checkpoint(checkpoint)
    names = sorted(path.name for path in checkpoint.iterdir())

    def one(draw, folder):
        copy = _copy(checkpoint, folder)
        path = copy / draw(st.sampled_from(names))
        deed = draw(st.sampled_from(["bytes", "bytes", "bytes", "delete", "link", "pipe", "foreign", "folder"]))
        if deed == "bytes":
            path.write_bytes(draw(fuzz.damaged(path.read_bytes(), 4000)))
        elif deed == "foreign":
            other = draw(st.sampled_from(["shard_00009.safetensors", ".a.safetensors", "a.safetensors", ".DS_Store"]))
            content = (checkpoint / names[-1]).read_bytes()
            (copy / other).write_bytes(draw(fuzz.damaged(content)))
        else:
            path.unlink()
            if deed == "link":
                path.symlink_to(draw(st.sampled_from(["/dev/zero", "/etc/passwd", "nowhere", path.name])))
            elif deed == "pipe":
                import os

                os.mkfifo(path)
            elif deed == "folder":
                path.mkdir()
        read = load_checkpoint(copy)
        assert _equal(read.tensors, whole.tensors)
        assert (read.step, to_tree(read.config), read.progress) == (whole.step, to_tree(whole.config), whole.progress)

    fuzz("checkpoints, damaged", one)


def test_crafted_manifests(fuzz, checkpoint):
    """Any change of the manifest with the right checksum: the weights stay those of its shards, and nothing of the
    settings is executed, fetched or opened."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    tensors = load_checkpoint(checkpoint).tensors

    def one(draw, folder):
        copy = _copy(checkpoint, folder)
        content = draw(fuzz.changed_tree(manifest["content"]))
        text = json.dumps(content, sort_keys=True)
        crafted = {"format": manifest["format"], "crc32": zlib.crc32(text.encode()), "content": content}
        (copy / MANIFEST).write_text(json.dumps(crafted))
        assert _equal(load_checkpoint(copy).tensors, tensors)
        describe(copy)

    fuzz("manifests, crafted", one)


def test_damaged_model_files(fuzz, model_file):
    whole = load_model(model_file)

    def one(draw, folder):
        path = folder / "model.safetensors"
        path.write_bytes(draw(fuzz.damaged(model_file.read_bytes(), 4000)))
        read = load_model(path)
        assert _equal(read.averages, whole.averages)
        assert (read.step, read.config) == (whole.step, whole.config)

    fuzz("model files, damaged", one)


def test_crafted_headers(fuzz, model_file):
    """Another header before the same tensors, as an earlier version would have written it: without a checksum."""
    content = model_file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    (key,) = header["__metadata__"]
    inner = json.loads(header["__metadata__"][key])
    inner.pop("sha256")

    def one(draw, folder):
        changed = dict(header)
        if draw(st.booleans()):
            changed["__metadata__"] = {key: json.dumps(draw(fuzz.changed_tree(inner)))}
        else:
            changed = draw(fuzz.changed_tree({**header, "__metadata__": {key: json.dumps(inner)}}))
        text = json.dumps(changed).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
        load_model(folder / "model.safetensors")

    fuzz("model files, crafted", one)


@pytest.fixture(scope="session")
def official_file(model_file: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official") / "official.pt"
    export_official(model_file, path)
    return path


def test_checkpoints_of_the_authors_code(fuzz, official_file):
    def one(draw, folder):
        (folder / "official.pt").write_bytes(draw(fuzz.damaged(official_file.read_bytes(), 4000)))
        import_official(folder / "official.pt", folder / "model.safetensors")

    fuzz("checkpoints of the authors", one)


def test_crafted_checkpoints_of_the_authors_code(fuzz, official_file):
    whole = torch.load(official_file, weights_only=True)
    absurd = [
        torch.ones(2, 3).to_sparse(),
        torch.empty(2, device="meta"),
        torch.tensor(["nan"] == [], dtype=torch.bool),
        torch.ones(1, dtype=torch.complex64),
        torch.full((2,), float("nan")),
        torch.ones(2**20).expand(2**10, 2**20),
        {},
        "text",
        3,
    ]

    def one(draw, folder):
        tree = {name: dict(part) if isinstance(part, dict) else part for name, part in whole.items()}
        part = tree[draw(st.sampled_from(sorted(tree)))]
        value = draw(st.one_of(st.sampled_from(absurd), fuzz.value()))
        if isinstance(part, dict) and part:
            part[draw(st.sampled_from(sorted(part, key=str)))] = value
        else:
            tree[draw(st.sampled_from(sorted(tree)))] = value
        torch.save(tree, folder / "official.pt")
        import_official(folder / "official.pt", folder / "model.safetensors")

    fuzz("checkpoints of the authors, crafted", one)


def test_traces(fuzz):
    trace = Path(__file__).parents[1] / "data" / "official_tiny_a.npz"
    content = trace.read_bytes()
    with np.load(trace) as arrays:
        meta = json.loads(bytes(arrays["meta_json"]).decode())
        others = {name: arrays[name] for name in arrays.files if name != "meta_json"}

    def one(draw, folder):
        path = folder / "trace.npz"
        if draw(st.booleans()):
            path.write_bytes(draw(fuzz.damaged(content)))
        else:
            text = json.dumps(draw(fuzz.changed_tree(meta))).encode(errors="replace")
            few = {name: others[name] for name in list(others)[:20]}
            np.savez(path, meta_json=np.frombuffer(text, np.uint8), **few)
        read = Trace(path)
        read.model(read.config())

    fuzz("traces", one)


def test_weights(fuzz, tmp_path):
    shapes = {"a.weight": (4, 3), "b": (5,)}
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()

    def one(draw, folder):
        path = folder / "weights.pth"
        path.write_bytes(draw(fuzz.damaged(content, len(content))))
        WeightFile("key", "sha", "VARIABLE", "a test", "weights", "").load(str(path), "", shapes)

    fuzz("weights", one)
