"""The run folder: its status, and restarts by torchrun."""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from unite_fast.distributed.launch import join_training
from unite_fast.distributed.peers import Peers
from unite_fast.errors import UserError
from unite_fast.recipes import load_config
from unite_fast.training import run_folder
from unite_fast.training.run_folder import OpenFolder, read_status, restarted, running_status, write_status


def _restarted(folder: Path, count_on_rank_1: int, run: str) -> bool:
    with join_training("cpu", 3) as (ranks, _):
        os.environ["TORCHELASTIC_RUN_ID"] = run
        if ranks.rank == 1:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(count_on_rank_1)
        return restarted(folder, Peers(ranks.rank, ranks.world))


def test_all_ranks_recognise_a_restart_by_torchrun(ranks, tmp_path, monkeypatch):
    """Each machine's torchrun counts its own restarts, and one that joins later counts from 0."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    write_status(tmp_path, running_status())
    assert read_status(tmp_path) == "running under torchrun job 7"
    assert ranks(2, _restarted, tmp_path, 1, "job 7") == [True, True]
    assert ranks(2, _restarted, tmp_path, 0, "job 7") == [False, False]
    # This launch never started the run: the folder belongs to another, so --resume is still needed.
    assert ranks(2, _restarted, tmp_path, 1, "job 8") == [False, False]
    assert ranks(2, _restarted, tmp_path / "none", 1, "job 7") == [False, False]


@pytest.mark.parametrize("text", ["x", "", "1_0"])
def test_a_count_of_restarts_that_is_no_number_is_named(tmp_path, monkeypatch, mentions, text):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", text)
    with pytest.raises(UserError, match=mentions("TORCHELASTIC_RESTART_COUNT", repr(text))):
        restarted(tmp_path, Peers(0, 1))


def test_an_open_folder_is_followed_and_made_again(tmp_path):
    folder = OpenFolder(tmp_path / "run", load_config("digits"))
    assert (folder.follow(), folder.moves) == ("", 0)
    os.rename(tmp_path / "run", tmp_path / "moved")
    assert str(tmp_path / "moved") in folder.follow()
    assert (folder.path, folder.moves, folder.follow()) == (tmp_path / "moved", 1, "")
    # Another folder of the old name is not ours.
    (tmp_path / "run").mkdir()
    assert folder.follow() == ""
    shutil.rmtree(tmp_path / "moved")
    assert "deleted" in folder.follow()
    assert (folder.path, folder.moves) == (tmp_path / "moved", 2)
    assert sorted(os.listdir(tmp_path / "moved")) == [".lock", "config.yaml", "status"]
    folder.close()


def test_a_name_that_another_run_has_taken_is_refused_and_closes_once(tmp_path, monkeypatch):
    folder = OpenFolder(tmp_path / "run", load_config("digits"))
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "lock_run", mock.Mock(side_effect=UserError("taken")))
        with pytest.raises(UserError, match="taken"):
            folder.follow()
    folder.close()
