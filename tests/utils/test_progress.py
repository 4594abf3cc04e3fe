"""Progress where nobody watches a terminal."""

import re

from unite_fast.utils import progress as module


def test_lines_with_rate_and_time_left(capsys, monkeypatch, mentions):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with module.progress("shards", 100, "images") as show:
        show(40)  # an earlier run made these
        show(60)
    lines = capsys.readouterr().out.splitlines()
    first, second = lines
    assert re.match(mentions("shards", "40/100", "0.0 images/s"), first), "what was there before has no rate"
    assert re.match(mentions("shards", "60/100", "1.0 images/s", "40 s"), second)


def test_a_short_run_says_nothing(capsys):
    with module.progress("shards", 100, "images") as show:
        show(100)
    assert capsys.readouterr().out == ""
