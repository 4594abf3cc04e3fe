"""Weights & Biases, with a stand-in for its package."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from unite_fast.errors import UserError
from unite_fast.training.wandb_log import WandbLog


class Wandb:
    """Remembers what it is told, as the package wandb's `init` and its run take it."""

    def __init__(self, failure: Exception | None = None):
        self.failure, self.begun, self.logged, self.finished = failure, [], [], 0

    def init(self, **settings):
        if self.failure:
            raise self.failure
        self.begun.append(settings)
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


def test_rows_arrive_with_their_steps_and_a_resumed_run_goes_on(wandb, tiny_config, tmp_path):
    tiny_config.train.wandb = "pictures"
    for step in (5, 10):
        log = WandbLog(tiny_config, tmp_path)
        log.write({"step": step, "l1": 0.5})
        log.close()
    assert wandb.logged == [(5, {"l1": 0.5}), (10, {"l1": 0.5})] and wandb.finished == 2
    first, second = wandb.begun
    assert (first["project"], first["name"], first["id"], second["id"]) == ("pictures", "tiny", None, "ab12")
    assert second["resume"] == "allow" and first["dir"] == str(tmp_path)
    # It goes to others as it is: plain values.
    assert json.loads(json.dumps(first["config"]))["train"]["batch_size"] == 6


def test_a_missing_package_is_named(tiny_config, tmp_path, monkeypatch, mentions):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=mentions("train.wandb", "unite-fast[wandb]")):
        WandbLog(tiny_config, tmp_path)


def test_a_run_that_cannot_report_leaves_nothing_that_counts_as_a_run(command, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(RuntimeError("no API key")))
    out = tmp_path / "run"
    for _ in range(2):
        command("train", *tiny_run, f"train.out={out}", "train.wandb=pictures").error("train.wandb", "no API key")


def test_what_wandb_says_is_passed_on_in_a_line(tiny_config, tmp_path, monkeypatch, mentions):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(RuntimeError("no API key\nconfigured")))
    with pytest.raises(UserError, match=mentions("train.wandb", "no API key configured", "WANDB_MODE=offline")):
        WandbLog(tiny_config, tmp_path)


def test_a_run_reports_every_row_and_traces_the_steps_it_was_asked_for(wandb, command, tiny_run, tmp_path):
    out = tmp_path / "run"
    asked = ("train.wandb=pictures", "profile.steps=2:4")
    ended = command("train", *tiny_run, "train.steps=4", "train.log_every=2", f"train.out={out}", *asked)
    assert ended.status == 0 and "profile: " in ended.out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in wandb.logged] == rows and wandb.finished == 1
    trace = gzip.decompress((out / "profile" / "rank0_step2.json.gz").read_bytes())
    names = [event.get("name", "") for event in json.loads(trace)["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#AdamW") for name in names) == 2
