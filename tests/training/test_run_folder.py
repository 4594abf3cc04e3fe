"""The run folder: its status, and restarts by torchrun."""

import os
from pathlib import Path

import pytest

from unite_fast.distributed.launch import join_training
from unite_fast.distributed.peers import Peers
from unite_fast.errors import UserError
from unite_fast.training.run_folder import read_status, restarted, running_status, write_status


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
