"""A part that fails, hangs or is missing on one rank is named, and the others go on."""

import os
import re
import threading
import time
from pathlib import Path

import pytest

from unite_fast.cluster_check import coordinator
from unite_fast.cluster_check.coordinator import Coordinator, Outcome, open_store, run_limited
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.store import LostContact
from unite_fast.errors import UserError


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(coordinator, "SLACK", 1.5)
    monkeypatch.setattr(coordinator, "SHORTEST", 0.1)


def fail(error: Exception):
    raise error


def test_run_limited():
    assert run_limited(lambda: 7, 5).value == 7
    assert run_limited(lambda: fail(UserError("what to do")), 5) == Outcome(error="what to do")
    assert "KeyError" in run_limited(lambda: fail(KeyError("x")), 5).error
    assert run_limited(Path("/nowhere/file").read_text, 5).error == "/nowhere/file: No such file or directory"
    late = run_limited(threading.Event().wait, 0.2)
    assert late.late and not late.ok


def one_process() -> Coordinator:
    return Coordinator(Ranks(), None, 30)


def test_one_process_needs_no_store():
    check = one_process()
    assert open_store(Ranks(), 1) is None
    assert check.run("a", lambda: 3, 5)[0].value == 3
    assert check.run("b", lambda: fail(UserError("no")), 5)[0].error == "no"
    assert check.run("c", lambda: 3, 5, needs=("a",))[0].ok
    skipped = check.run("d", lambda: 3, 5, needs=("a", "b"))[0]
    assert skipped.skipped and "b" in skipped.error
    assert check.broadcast("x", {"y": 1}) == {"y": 1}
    check.leave()


def test_a_part_is_skipped_when_the_time_is_up():
    check = Coordinator(Ranks(), None, 0.05)
    assert check.run("a", lambda: 3, 5)[0].skipped


def outcomes_of_ranks() -> tuple:
    ranks = Ranks.from_environment()
    check = Coordinator(ranks, open_store(ranks, 20), 30)

    def work():
        if ranks.rank == 1:
            raise UserError("rank 1 cannot")
        if ranks.rank == 2:
            time.sleep(60)
        return ranks.rank * 10

    found = check.run("part", work, 1.0)
    after = check.run("after", lambda: "fine", 5.0)
    skipped = check.run("needing", lambda: "fine", 5.0, needs=("part",))
    word = check.broadcast("word", "from rank 0" if ranks.main else None)
    check.leave()
    values = [{rank: vars(one) for rank, one in part.items()} for part in (found, after, skipped)]
    return values, check.absent, check.late, word


def test_every_rank_answers(ranks):
    (first, *_), *others = results = ranks(3, outcomes_of_ranks)
    part, after, skipped = first
    assert part[0]["value"] == 0
    assert part[1]["error"] == "rank 1 cannot" and not part[1]["late"]
    assert part[2]["late"] and "1 s" in part[2]["error"]
    assert [one["value"] for one in after.values()] == ["fine"] * 3
    assert all(one["skipped"] for one in skipped.values()) and len(skipped) == 3
    assert [values for values, *_ in others] == [[{}, {}, {}]] * 2, "only rank 0 has the outcomes"
    assert [late for _, _, late, _ in results] == [False, False, True]
    assert all((absent, word) == ({}, "from rank 0") for _, absent, _, word in results)


def with_a_rank_that_stops() -> tuple | str:
    ranks = Ranks.from_environment()
    check = Coordinator(ranks, open_store(ranks, 20), 30)
    check.run("first", lambda: 1, 5.0)
    if ranks.rank == 1:
        time.sleep(6)
        return "stopped"
    begun = time.monotonic()
    found = check.run("second", lambda: 2, 1.0)
    third = check.run("third", lambda: 3, 5.0)
    seconds = time.monotonic() - begun
    check.leave()
    return check.absent, sorted(found), sorted(third), seconds


def test_a_rank_that_does_not_answer_is_waited_for_once(ranks):
    first, stopped, last = ranks(3, with_a_rank_that_stops)
    assert stopped == "stopped"
    assert first[:3] == ({1: "second"}, [0, 2], [0, 2])
    assert last[0] == {1: "second"}
    assert 2 < first[3] < 5  # its share and the slack, not also in the third part


def without_rank_0() -> str:
    ranks = Ranks.from_environment()
    store = open_store(ranks, 20)
    if ranks.main:
        time.sleep(5)
        return ""
    with pytest.raises(LostContact) as caught:
        Coordinator(ranks, store, 30).run("facts", lambda: 1, 0.5)
    return str(caught.value)


def test_rank_0_is_missed(ranks, mentions):
    assert re.search(mentions("rank 0", "facts", os.uname().nodename), ranks(2, without_rank_0)[1])


def test_an_address_that_nobody_has(monkeypatch, mentions):
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LostContact, match=mentions("127.0.0.1", "1", "MASTER_ADDR", os.uname().nodename)):
        open_store(Ranks(1, 2), 1.0)


def alone_of_two() -> str:
    if os.environ["RANK"] == "1":
        return ""
    with pytest.raises(LostContact) as caught:
        open_store(Ranks.from_environment(), 1.0)
    return str(caught.value)


def test_a_rank_that_does_not_come(ranks, mentions):
    assert re.search(mentions(os.uname().nodename, 2, "MASTER_ADDR"), ranks(2, alone_of_two)[0])
