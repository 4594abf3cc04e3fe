"""The whole check in forked processes, each as a host."""

import json
import time
from pathlib import Path

import pytest

from unite_fast.cluster_check import coordinator, network, rates, run, shared_folder
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.recipes import load_config


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(coordinator, "SLACK", 2.0)
    monkeypatch.setattr(shared_folder, "SEEN_WITHIN", 1.0)
    monkeypatch.setattr(network, "SIZES", (8, 2**12))
    monkeypatch.setattr(network, "PAYLOADS", (2**12,))
    monkeypatch.setattr(network, "TIMED", 0.02)
    monkeypatch.setattr(rates, "FILE_BYTES", 2**22)
    monkeypatch.setattr(run, "LOADER_SECONDS", 0.05)


def check(out: Path, *folders: Path) -> tuple[int, float]:
    """Rank r uses folder r, and the first one if there are fewer."""
    rank = Ranks.from_environment().rank
    begun = time.monotonic()
    status = run.check_cluster(load_config("digits", ("train.device=cpu",)), str(folders[rank % len(folders)]), out)
    return status, time.monotonic() - begun


def test_healthy_hosts(ranks, tmp_path):
    folder, out = tmp_path / "a/run", tmp_path / "found.json"
    assert [status for status, _ in ranks(2, check, out, folder, nodes=2)] == [0, 0]
    assert list(tmp_path.iterdir()) == [out], "nothing is left behind"
    found = json.loads(out.read_text())
    assert (found["status"], found["errors"], found["world"]) == (0, [], 2)
    first, second = found["hosts"]
    assert second["folder"]["sees"] and second["folder"]["lock_refused"]
    assert second["clock"]["offset"] < 1 and second["link"]["latency"] > 0 and second["disk"]["write"] > 0
    assert first["loaders"][0]["images"] == 1437
    assert [row["bytes"] for row in found["all_reduce"]] == [8, 2**12]
    # Two hosts of one name are told apart by their first ranks.
    assert "(rank 1)" in second["label"] and first["label"] != second["label"]


def test_a_folder_that_is_not_shared_fails_on_all_ranks(ranks, tmp_path, found):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    out = tmp_path / "found.json"
    assert [status for status, _ in ranks(2, check, out, *folders, nodes=2)] == [2, 2]
    errors = json.loads(out.read_text())["errors"]
    assert len(errors) == 1 and "(rank 1)" in errors[0] and str(folders[0]) in errors[0]
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def hang_on_rank_1(out: Path, folder: Path) -> tuple[int, float]:
    if Ranks.from_environment().rank == 1:
        run.disk_rates = lambda _: time.sleep(100)
    run._Check.leave = lambda self, status: self.coordinator.leave()
    return check(out, folder)


def test_a_host_that_hangs_is_named(ranks, tmp_path, monkeypatch):
    monkeypatch.setitem(run.LIMITS, "disk", 2.0)
    out = tmp_path / "found.json"
    results = ranks(2, hang_on_rank_1, out, tmp_path, nodes=2)
    assert [status for status, _ in results] == [2, 2]
    found = json.loads(out.read_text())
    assert len(found["errors"]) == 1
    assert "(rank 1)" in found["errors"][0] and "disk" in found["errors"][0] and "2 s" in found["errors"][0]
    assert found["hosts"][1]["loaders"], "the next part ran"


def differ_on_rank_1(out: Path, folder: Path) -> tuple[int, float]:
    if Ranks.from_environment().rank == 1:
        facts = run.rank_facts
        run.rank_facts = lambda kind: facts(kind) | {"device": "cuda"}
    run._Check.leave = lambda self, status: self.coordinator.leave()
    return check(out, folder)


def test_ranks_with_different_devices_do_not_join(ranks, tmp_path):
    out = tmp_path / "found.json"
    results = ranks(2, differ_on_rank_1, out, tmp_path, nodes=2)
    assert [status for status, _ in results] == [2, 2]
    found = json.loads(out.read_text())
    assert any("cpu on" in error and "cuda on" in error for error in found["errors"])
    assert found["all_reduce"] == [] and not found["joined"]
    assert any("network" in warning and "join" in warning for warning in found["warnings"])


def test_one_process(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = command("check-cluster", "digits", "train.device=cpu", "--json", "found.json")
    assert (ended.status, ended.err) == (0, ""), ended
    assert ended.out.splitlines()[-1].startswith("ok")
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_missing_data_is_an_error(command, tmp_path):
    settings = ("data.source=folder", f"data.path={tmp_path / 'nowhere'}", f"train.out={tmp_path / 'run'}")
    ended = command("check-cluster", "digits", "train.device=cpu", *settings)
    assert ended.status == 2
    assert [line for line in ended.out.splitlines() if line.startswith("error: ") and "nowhere" in line]


def test_wrong_arguments(command, tmp_path):
    command("check-cluster", "digits", "--json", tmp_path / "x.txt").error(".txt", ".json")
    command("check-cluster", "no-such-recipe").error("no-such-recipe")


def test_a_restart_does_not_check_again(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="--max-restarts"):
        run.check_cluster(load_config("digits"))
