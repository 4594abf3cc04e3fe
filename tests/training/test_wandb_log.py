"""Logging to Weights & Biases, with a stand-in for its package."""

import gzip
import json
import re
import sys
from types import SimpleNamespace
from unittest import mock

import pytest

from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.errors import UserError
from unite_fast.training.wandb_log import WandbLog
from unite_fast.utils.rows import read_rows


class Wandb:
    """Stands in for the wandb package and records what `init` and its run receive."""

    def __init__(self, failure: Exception | None = None):
        self.failure, self.started, self.logged, self.finished = failure, [], [], 0

    def init(self, **settings):
        if self.failure:
            raise self.failure
        self.started.append(settings)
        return SimpleNamespace(id=settings["id"] or "ab12", log=self.log, finish=self.finish)

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_rows_are_logged_with_their_steps_and_a_resumed_run_keeps_its_id(wandb, tiny_config, tmp_path):
    tiny_config.train.wandb = "pictures"
    for step in (5, 10):
        log = WandbLog(tiny_config, tmp_path)
        log.write({"step": step, "l1": 0.5})
        log.close()
    assert wandb.logged == [(5, {"l1": 0.5}), (10, {"l1": 0.5})] and wandb.finished == 2
    first, second = wandb.started
    assert (first["project"], first["name"], first["id"], second["id"]) == ("pictures", "tiny", None, "ab12")
    assert second["resume"] == "allow" and first["dir"] == str(tmp_path)
    # The config is sent as plain values.
    assert json.loads(json.dumps(first["config"]))["train"]["batch_size"] == 6


def test_a_missing_package_is_an_error(tiny_config, tmp_path, monkeypatch, mentions):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=mentions("train.wandb", "unite-fast[wandb]")):
        WandbLog(tiny_config, tmp_path)


def test_a_run_goes_on_without_wandb_and_says_so_once(command, tiny_run, tmp_path, monkeypatch, mentions):
    out = tmp_path / "run"
    arguments = ("train", *tiny_run, f"train.out={out}", "train.wandb=pictures", "train.log_every=1")
    # It cannot start: no key, or no network.
    monkeypatch.setitem(sys.modules, "wandb", Wandb(RuntimeError("no API key\nconfigured")))
    ended = command(*arguments, "train.steps=2")
    assert ended.status == 0 and load_checkpoint(out).step == 2
    (warning,) = [line for line in ended.out.splitlines() if "warning" in line]
    assert re.search(mentions("train.wandb", "no API key configured", "WANDB_MODE=offline"), warning)
    # It goes down during the run.
    broken = Wandb()
    monkeypatch.setattr(broken, "log", mock.Mock(side_effect=ConnectionError("down")))
    monkeypatch.setitem(sys.modules, "wandb", broken)
    ended = command(*arguments, "train.steps=5", "--resume")
    assert ended.status == 0 and load_checkpoint(out).step == 5
    assert ended.out.count("down") == 1
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_foreign_run_id_and_a_link_are_not_used(wandb, tiny_config, tmp_path):
    (tmp_path / "wandb_run").write_text("../../x\n")
    WandbLog(tiny_config, tmp_path)
    assert wandb.started[0]["id"] is None
    (tmp_path / "wandb").rmdir()
    (tmp_path / "wandb").symlink_to(tmp_path)
    assert WandbLog(tiny_config, tmp_path).run is None and len(wandb.started) == 1


def test_a_run_logs_every_row_and_traces_selected_steps(wandb, command, tiny_run, tmp_path):
    out = tmp_path / "run"
    options = ("train.wandb=pictures", "profile.steps=2:4")
    ended = command("train", *tiny_run, "train.steps=4", "train.log_every=2", f"train.out={out}", *options)
    assert ended.status == 0 and "profile: " in ended.out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in wandb.logged] == rows and wandb.finished == 1
    trace = gzip.decompress((out / "profile" / "rank0_step2.json.gz").read_bytes())
    names = [event.get("name", "") for event in json.loads(trace)["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#AdamW") for name in names) == 2
