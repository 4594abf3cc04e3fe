"""The flight recorder's files."""

import json

import torch
from torch import distributed

from unite_fast.distributed.launch import join_training
from unite_fast.training import flight_recorder


def _dump(folder) -> list[str]:
    with join_training("cpu", 60) as (ranks, _, _):
        distributed.all_reduce(torch.ones(3))
        flight_recorder.dump(folder, ranks.rank)
        ranks.wait()
        return sorted(path.name for path in folder.iterdir())


def test_each_rank_writes_its_collectives(ranks, tmp_path):
    folder = tmp_path / "flight_recorder"
    assert ranks(2, _dump, folder) == [["rank_0.json", "rank_1.json"]] * 2
    for rank in range(2):
        entries = json.loads((folder / f"rank_{rank}.json").read_text())["entries"]
        assert [[3]] in [entry["input_sizes"] for entry in entries if "all_reduce" in entry["profiling_name"]]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    flight_recorder.dump(tmp_path / "file", 0)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    flight_recorder.dump(tmp_path / "link", 0)
    assert not (tmp_path / "elsewhere").exists()
