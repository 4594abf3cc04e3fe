"""Progress in a pipe."""

import re

import pytest

from unite_fast.distributed.process_group import Ranks
from unite_fast.utils import progress as module


@pytest.fixture
def ten_seconds_a_call(monkeypatch):
    """A clock that advances by 10 s each time it is read, and a line of progress for every call."""
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))


def test_lines_have_rate_and_time_left(capsys, ten_seconds_a_call, mentions):
    with module.progress("shards", 100, "images") as show:
        show(40)  # an earlier run made these
        show(60)
    lines = capsys.readouterr().out.splitlines()
    first, second = lines
    assert re.match(mentions("shards", "40/100", "0.0 images/s"), first), "earlier work has no rate"
    assert re.match(mentions("shards", "60/100", "1.0 images/s", "40 s"), second)


def test_a_short_run_prints_nothing(capsys):
    with module.progress("shards", 100, "images") as show:
        show(100)
    assert capsys.readouterr().out == ""


def test_track_yields_the_items_and_prints_to_stderr(capsys, ten_seconds_a_call, mentions):
    assert list(module.track("abc", 3, "reading")) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == "" and re.match(mentions("reading", "3/3", "batches/s"), err.splitlines()[-1])


def test_only_rank_0_shows_progress(capsys, ten_seconds_a_call, monkeypatch):
    monkeypatch.setattr(module, "current_ranks", lambda: Ranks(1, 2))
    assert list(module.track("abc", 3, "reading")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
