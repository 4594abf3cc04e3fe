"""The run folder: its status, and restarts by torchrun."""

import os
import re
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from unite_fast.data_pipeline import open_source
from unite_fast.distributed.launch import join_training
from unite_fast.distributed.process_group import ALONE
from unite_fast.errors import UserError
from unite_fast.recipes import load_config
from unite_fast.training import run_folder
from unite_fast.training.run_folder import (
    OpenFolder,
    check_apart,
    check_new,
    check_same_settings,
    check_shared,
    choose_folder,
    final_status,
    note_failed_start,
    orphaned_status,
    read_status,
    restarted,
    running_status,
    write_status,
)


def _restarted(folder: Path, count_on_rank_1: int, run: str) -> bool:
    with join_training("cpu", 3) as (ranks, _, _):
        os.environ["TORCHELASTIC_RUN_ID"] = run
        if ranks.rank == 1:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(count_on_rank_1)
        return restarted(folder, ranks)


def test_all_ranks_recognise_a_restart_by_torchrun(ranks, tmp_path, monkeypatch):
    """Each machine's torchrun counts its own restarts, and one that joins later counts from 0."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    write_status(tmp_path, running_status())
    assert read_status(tmp_path) == "running under torchrun job 7"
    assert ranks(2, _restarted, tmp_path, 1, "job 7") == [True, True]
    assert ranks(2, _restarted, tmp_path, 0, "job 7") == [False, False]
    write_status(tmp_path, orphaned_status(7, 1))
    assert (
        read_status(tmp_path) == "stopped at step 7 by the end of torchrun of rank 1; was running under torchrun job 7"
    )
    assert ranks(2, _restarted, tmp_path, 1, "job 7") == [True, True]
    # This launch never started the run: the folder belongs to another, so --resume is still needed.
    assert ranks(2, _restarted, tmp_path, 1, "job 8") == [False, False]
    assert ranks(2, _restarted, tmp_path / "none", 1, "job 7") == [False, False]


@pytest.mark.parametrize("text", ["x", "", "1_0"])
def test_a_count_of_restarts_that_is_no_number_is_named(tmp_path, monkeypatch, mentions, text):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", text)
    with pytest.raises(UserError, match=mentions("TORCHELASTIC_RESTART_COUNT", repr(text))):
        restarted(tmp_path, ALONE)


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


@pytest.mark.parametrize("name", ["status", "metrics.jsonl", "samples.png", "curves.png"])
def test_a_new_run_replaces_no_file_of_others(tmp_path, name, mentions):
    check_new(tmp_path)
    (tmp_path / "notes.txt").touch()
    check_new(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=mentions(tmp_path / name, "train.out=FOLDER")):
        check_new(tmp_path)


def test_a_checkpoint_is_no_run_folder(tmp_path, mentions):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    (run / "checkpoints" / "latest").symlink_to("step_00000010")
    for part in ("checkpoints", "checkpoints/latest", "checkpoints/step_00000010"):
        with pytest.raises(UserError, match=mentions(run / part, f"train.out={run}")):
            choose_folder(load_config("digits", (f"train.out={run / part}",)))
    assert choose_folder(load_config("digits", (f"train.out={run}",))) == run


def test_a_run_is_not_among_the_images_of_its_data(tmp_path, mentions, monkeypatch):
    """Its pictures would be another class when it resumes. Beside the folders of splits it disturbs nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("flat/cats", "split/train/cats", "split/val/cats"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    flat, split = (open_source("folder", name, 8, "train") for name in ("flat", "split"))
    for out in ("flat", "flat/run", "flat/cats/run", "other/../flat/run"):
        with pytest.raises(UserError, match=mentions(out, tmp_path / "flat")):
            check_apart(Path(out), flat)
    with pytest.raises(UserError, match=mentions("split/train/run")):
        check_apart(Path("split/train/run"), split)
    for out, source in (("flat2", flat), ("split/run", split)):
        check_apart(Path(out), source)


def test_a_failed_start_is_noted_unless_another_process_trains_there(tmp_path, mentions):
    config = load_config("digits", (f"train.out={tmp_path / 'run'}",))
    note_failed_start(config, "data.path is wrong")
    assert re.fullmatch(r"failed at step 0: data.path is wrong", read_status(tmp_path / "run"))
    check_new(tmp_path / "run")  # it holds no run
    write_status(tmp_path / "run", final_status(7, 0))
    note_failed_start(config, "data.path is wrong")
    assert read_status(tmp_path / "run") == "finished at step 7"
    write_status(tmp_path / "run", running_status())
    with pytest.raises(UserError, match=mentions("status")):
        check_new(tmp_path / "run")
    pid = os.fork()
    if pid == 0:
        lock = run_folder.lock_run(tmp_path / "run")
        (tmp_path / "locked").touch()
        time.sleep(30)
        os._exit(bool(lock.closed))
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    note_failed_start(config, "data.path is wrong")
    assert read_status(tmp_path / "run") == running_status()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _shared(folder: Path, own: Path) -> str:
    """Rank 1 has another folder in place of the shared one."""
    with join_training("cpu", 30) as (ranks, _, _):
        try:
            check_shared(folder if ranks.main else own, ranks)
        except UserError as error:
            return str(error)
    return ""


def test_a_run_folder_that_is_not_shared_is_named(ranks, tmp_path, monkeypatch, mentions):
    monkeypatch.setattr(run_folder, "SHARED_SECONDS", 0.5)
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert ranks(2, _shared, run, run, nodes=2) == [""] * 2
    assert not run.exists(), "nothing is left"
    (tmp_path / "old").mkdir()
    for message in ranks(2, _shared, tmp_path / "old", elsewhere, nodes=2):
        assert re.search(mentions(str(tmp_path), "rank 0", "rank 1", "train.out"), message)
    assert list((tmp_path / "old").iterdir()) == [] and not elsewhere.exists()
    assert ranks(2, _shared, run, elsewhere, nodes=1) == [""] * 2, "one machine has one file system"


def test_a_run_goes_on_under_the_recipe_with_a_unit():
    """Runs of before the setting have the same steps, counted in none."""
    recipe = "imagenet256_b"
    before = load_config(recipe, ("schedule.unit=0", "train.steps=300240", "schedule.steps=1000"))
    check_same_settings(before, load_config(recipe))
    check_same_settings(load_config(recipe), load_config(recipe, ("schedule.unit=0", "schedule.steps=9")))
    for change in ("schedule.warmup_steps=50041", "schedule.batch_rule=square_root"):
        with pytest.raises(UserError, match="cannot resume"):
            check_same_settings(before, load_config(recipe, (change,)))
