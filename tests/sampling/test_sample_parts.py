"""The parts of one file: what counts as finished, and what merging leaves. test_sample_writer.py has whole runs."""

import json
import os

import numpy as np
import pytest
import torch

from unite_fast.errors import UserError
from unite_fast.sampling.sample_parts import FORMAT, MANIFEST, MERGED, FileParts, is_manifest

MANIFEST_OF = {"format": FORMAT, "seed": 3, "interval": (0.1, 1.0)}


class Numbers(FileParts):
    """A sample is two float32 numbers; the result is all of them."""

    sample_bytes, part_suffix = 8, "float32"

    def bytes_of(self, samples):
        return samples.numpy().data

    def write_result(self, path):
        path.write_bytes(b"".join(self.contents()))


@pytest.fixture
def parts(tmp_path):
    def make(**changes) -> Numbers:
        return Numbers(tmp_path / "out.bin", MANIFEST_OF | changes, torch.arange(5), batch=2)

    return make


def samples_of(parts: Numbers, number: int) -> torch.Tensor:
    return torch.tensor([[float(i), -float(i)] for i in parts.samples(number)])


def write_all(one: Numbers) -> None:
    for number in one.batches:
        one.write(number, samples_of(one, number))


def test_batches_cover_the_samples_and_the_last_may_be_short(parts):
    one = parts()
    assert [list(one.samples(number)) for number in one.batches] == [[0, 1], [2, 3], [4]]


def test_parts_become_the_file_in_order_whatever_the_order_of_writing(parts, tmp_path):
    one = parts()
    assert one.resume() == set()
    for number in (2, 0, 1):
        one.write(number, samples_of(one, number))
    assert one.finished() == {0, 1, 2} and (tmp_path / "out.bin.parts").is_dir()
    one.merge()
    found = np.frombuffer((tmp_path / "out.bin").read_bytes(), np.float32).reshape(5, 2)
    assert found.tolist() == [[i, -i] for i in range(5)]
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "out.json"]
    assert json.loads((tmp_path / "out.json").read_text()) == {**MANIFEST_OF, "interval": [0.1, 1.0]}


def test_a_part_counts_only_if_it_has_all_its_bytes(parts):
    one = parts()
    one.resume()
    write_all(one)
    os.truncate(one.path(1), 15)
    one.path(2).write_bytes(bytes(9))
    one.close()
    again = parts()
    assert again.resume() == {0}
    again.close()


@pytest.mark.parametrize("change", [{"seed": 4}, {"format": FORMAT + "0"}, {"more": 1}])
def test_parts_of_other_settings_are_refused(change, parts, mentions):
    one = parts()
    one.resume()
    one.close()
    (key,) = change
    with pytest.raises(UserError, match=mentions(key, "out.bin.parts")):
        parts(**change).resume()


def test_an_output_that_exists_and_a_foreign_folder_are_in_the_way(parts, tmp_path):
    (tmp_path / "out.bin").touch()
    with pytest.raises(UserError, match=r"out\.bin already exists"):
        parts().resume()
    (tmp_path / "out.bin").unlink()
    (tmp_path / "out.bin.parts").mkdir()
    (tmp_path / "out.bin.parts" / "mine.txt").touch()
    with pytest.raises(UserError, match=rf"out\.bin\.parts.*{MANIFEST}"):
        parts().resume()
    assert (tmp_path / "out.bin.parts" / "mine.txt").exists()


def test_another_json_is_not_overwritten(parts, tmp_path):
    one = parts()
    one.resume()
    write_all(one)
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(UserError, match=r"out\.json is in the way"):
        one.merge()
    assert (tmp_path / "out.json").read_text() == "{}" and not (tmp_path / "out.bin").exists()
    (tmp_path / "out.json").write_text(json.dumps({"format": FORMAT}))
    assert is_manifest(tmp_path / "out.json")
    one.merge()
    assert (tmp_path / "out.bin").exists()


def test_a_kill_after_the_rename_leaves_only_the_cleanup(parts, tmp_path, monkeypatch):
    one = parts()
    one.resume()
    write_all(one)
    with monkeypatch.context() as patch:
        patch.setattr(one, "close", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("pathlib.Path.unlink", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one.write_result(one.merged)
            one.merge()
    assert not one.only_cleanup_left(), "the file is not there yet"
    one.merged.rename(one.out)
    (one.folder / MANIFEST).write_text(json.dumps(one.manifest | {MERGED: True}))
    one.close()
    again = parts()
    assert again.resume() == {0, 1, 2} and again.only_cleanup_left()
    again.merge()
    assert (tmp_path / "out.bin").exists() and not (tmp_path / "out.bin.parts").exists()


def test_a_link_in_place_of_the_folder_is_refused(parts, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.bin.parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"out\.bin\.parts is a link"):
        parts().resume()
    assert os.listdir(tmp_path / "elsewhere") == []
