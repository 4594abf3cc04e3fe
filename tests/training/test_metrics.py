"""Logged means and rates, and the files of metrics."""

import errno
import json
import math
import os
import re
import shutil
import time
import tracemalloc
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from unite_fast.config import MOLECULES, Config
from unite_fast.errors import UserError
from unite_fast.objective import Losses
from unite_fast.planning.flops import image_flops
from unite_fast.planning.gpus import find_gpu
from unite_fast.recipes import load_config
from unite_fast.training import metrics
from unite_fast.training.metrics import Averages, MetricsLog, Speedometer, loss_spike, training_metrics
from unite_fast.training.side_outputs import SideOutputs
from unite_fast.utils.rows import read_rows, thin_rows


def losses(value: float) -> Losses:
    return Losses(*torch.tensor([value, 2 * value, 3 * value, 4 * value, 0 * value, 5 * value]).unbind())


def row(step: int) -> dict:
    return {"step": step, "l1": 0.1 + step, "lr": 1e-7 / 3}


def events(folder) -> dict[int, float]:
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    scalars = reader.Scalars("l1")
    assert len({event.step for event in scalars}) == len(scalars)  # no duplicates of rewritten rows
    return {event.step: event.value for event in scalars}


def test_means_cover_the_steps_since_the_last_take():
    averages = Averages(torch.device("cpu"))
    for step, value in enumerate((1.0, 2.0, 6.0), start=1):
        averages.add(step, losses(value), torch.tensor(10 * value))
    expected = Losses(*torch.tensor([3.0, 6.0, 9.0, 12.0, 0.0, 15.0]).unbind())
    for _ in range(2):
        means = averages.take()
        assert means.pop("grad_norm") == 30
        names = ("total", "l1", "flow", "lpips", "latent_square")
        assert means == {name: float(getattr(expected, name)) for name in names}
        averages.add(4, losses(3.0), torch.tensor(30.0))


def test_means_survive_json_bit_for_bit():
    whole, first = Averages(torch.device("cpu")), Averages(torch.device("cpu"))
    for step, value in enumerate((0.1, 1e-30, 3e7)):
        whole.add(step, losses(value), torch.tensor(value / 3))
        first.add(step, losses(value), torch.tensor(value / 3))
    second = Averages(torch.device("cpu"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for averages in (whole, second):
        averages.add(9, losses(0.7), torch.tensor(0.3))
    assert whole.take() == second.take()


def test_sums_of_other_averages_are_refused():
    """One sum would be copied to all of them."""
    for sums in ([1.0], [1.0] * 4, [1.0] * 7):
        with pytest.raises(UserError, match="cannot resume"):
            Averages(torch.device("cpu")).load_state_dict({"sums": sums, "count": 1})


def test_sums_of_a_version_without_latents_are_left_out():
    averages = Averages(torch.device("cpu"))
    averages.load_state_dict({"sums": [1e6] * 5, "count": 7})
    averages.add(8, losses(2.0), torch.tensor(1.0))
    assert int(averages.count) == 1
    assert averages.take()["latent_square"] == 10.0


def test_averages_of_molecules_have_the_elements():
    averages = Averages(torch.device("cpu"), MOLECULES)
    averages.add(1, Losses(*torch.arange(6.0).unbind()), torch.tensor(9.0))
    expected = {"total": 0.0, "l1": 1.0, "cross_entropy": 4.0, "flow": 2.0, "grad_norm": 9.0, "latent_square": 5.0}
    assert averages.take() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["losses", "gradient"])
def test_the_first_nonfinite_step_is_remembered(bad, where):
    averages = Averages(torch.device("cpu"))
    for step in range(1, 8):
        value = bad if step in (3, 5) else 1.0
        averages.add(step, losses(value if where == "losses" else 1.0), torch.tensor(value))
        assert averages.bad_step() == (3 if step >= 3 else None)
    # The means leave out both bad steps.
    means = averages.take()
    assert (means["total"], means["flow"], means["grad_norm"]) == (1.0, 3.0, 1.0)


def test_means_without_a_finite_step_are_nan_and_ignored_by_loss_spike():
    averages = Averages(torch.device("cpu"))
    averages.add(1, losses(math.inf), torch.tensor(1.0))
    assert all(math.isnan(mean) for mean in averages.take().values())
    assert loss_spike(rows_of([2.0, 2.1] * 5 + [math.nan])) is None
    assert loss_spike(rows_of([2.0, 2.1] * 5 + [math.nan, 9.0])) is not None


def averages_of(rank: int) -> Averages:
    """The averages of one of two ranks after three steps."""
    averages = Averages(torch.device("cpu"))
    for step in (1, 2, 3):
        averages.add(step, losses(step + 10.0 * rank), torch.tensor(float(step)))
    return averages


def average_on_two_ranks() -> dict:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    averages, bad = averages_of(rank), averages_of(rank)
    results = {"before": averages.bad_step(), "state": averages.state_dict()}
    averages.add(4, losses(1.0), torch.tensor(1.0))
    bad.add(4, losses(math.nan if rank else 1.0), torch.tensor(1.0))
    results |= {"means": averages.take(), "bad": bad.bad_step()}
    resumed = Averages(torch.device("cpu"))
    resumed.load_state_dict(json.loads(json.dumps(results["state"])))
    resumed.add(4, losses(1.0), torch.tensor(1.0))
    speed = Speedometer(Config(), torch.device("cpu"))
    speed.clock = FakeClock()
    values = speed.row(4)
    rates = values["images_per_s"], values["images_per_s_per_gpu"]
    return results | {"resumed": resumed.take(), "memory": speed.memory(), "rates": rates}


def test_means_and_bad_steps_are_the_same_on_all_ranks(ranks):
    one, other = ranks(2, average_on_two_ranks)
    assert one == other
    assert one["before"] is None and one["bad"] == 4
    assert one["rates"] == (4 * Config().train.batch_size / 2, 4 * Config().train.batch_size / 2 / 2)
    # Rank 0 added 1, 2, 3 and rank 1 added 11, 12, 13; then both added 1.
    assert one["means"]["total"] == (6 + 36 + 2) / 8 and one["means"]["grad_norm"] == 7 / 4
    assert one["state"] == {"sums": [21.0, 42.0, 84.0, 63.0, 6.0, 105.0], "count": 3}
    assert one["resumed"] == one["means"]


class FakeClock:
    """A clock whose interval took two seconds."""

    def take(self) -> tuple[float, dict[str, float]]:
        return 2.0, {"data": 0.5, "forward": 1.0, "other": 0.5}


def test_a_row_has_rates_seconds_by_part_and_memory(tiny_config):
    speed = Speedometer(tiny_config, torch.device("cpu"))
    assert f"{speed.image_flops / 1e9:.4g} GFLOP per image, " in speed.mfu_note
    assert "GFLOP per molecule, " in Speedometer(load_config("qm9_tiny"), torch.device("cpu")).mfu_note
    assert speed.mfu_note.endswith("no peak of a CPU is known (unite_fast/planning/gpus.py)")
    speed.clock = FakeClock()
    values = speed.row(4)
    assert 0.01 < values.pop("memory_gb") < 100
    parts = {"seconds_data": 0.125, "seconds_forward": 0.25, "seconds_other": 0.125}
    assert values == {"images_per_s": 4 * 6 / 2, "images_per_s_per_gpu": 12.0, **parts}
    assert training_metrics({"step": 1, "total": 2.0, "lr": 0.1, **values, "mfu": 0.3}) == {
        "step": 1,
        "total": 2.0,
        "lr": 0.1,
    }


def test_mfu_is_flops_per_second_over_the_peak(tiny_config, monkeypatch):
    monkeypatch.setattr(metrics, "recognise", lambda name: find_gpu("h100"))
    speed = Speedometer(tiny_config, torch.device("cpu"))
    speed.clock = FakeClock()
    assert speed.row(4)["mfu"] == pytest.approx(12 * image_flops(tiny_config) / 989e12)
    assert "989 dense bfloat16 TFLOP/s" in speed.mfu_note


def rows_of(totals: list[float]) -> list[dict]:
    return [{"step": 50 * i, "total": total} for i, total in enumerate(totals, start=1)]


def test_a_loss_six_deviations_above_recent_rows_is_a_spike(mentions):
    steady = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0]
    mean, deviation = 2.0, (6 * 0.01 / 9) ** 0.5
    assert loss_spike(rows_of([*steady, mean + 5.9 * deviation])) is None
    line = loss_spike(rows_of([*steady, mean + 6.1 * deviation]))
    assert re.match(rf"{mentions(550, 10, '2.0000')}.*\b2\.49", line)
    assert loss_spike(rows_of([*steady, 0.1])) is None
    # Ten earlier rows are needed. Only recent ones count, so the high losses of a start do not hide a spike.
    assert loss_spike(rows_of([*steady[1:], 9.0])) is None
    assert loss_spike(rows_of([90.0, *steady, *steady, 9.0])) is not None
    assert loss_spike(rows_of([])) is loss_spike(rows_of([1.0])) is None


def test_rows_and_events_can_be_read_during_a_run(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (5, 10):
        log.write(row(step))
        # At once, so that a run can be followed.
        assert read_rows(tmp_path / "metrics.jsonl")[-1] == row(step)
    log.flush()
    assert events(tmp_path).keys() == {5, 10}
    log.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [row(5), row(10)]
    assert events(tmp_path) == pytest.approx({5: 5.1, 10: 10.1})


def test_resuming_drops_rows_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (5, 10, 15):
        log.write(row(step))
    log.close()
    log = MetricsLog(tmp_path, 10)
    assert read_rows(tmp_path / "metrics.jsonl") == log.rows == [row(5), row(10)]
    log.write({**row(15), "l1": 99.0})
    log.close()
    assert [entry["step"] for entry in read_rows(tmp_path / "metrics.jsonl")] == [5, 10, 15]
    assert events(tmp_path) == pytest.approx({5: 5.1, 10: 10.1, 15: 99.0})


@pytest.mark.parametrize("torn", ['{"step": 15, "l1"', "{", "5", "[]", "{}", '"', "\0" * 9, "\udcff\udcfe"])
def test_a_half_written_row_is_ignored(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((json.dumps(row(5)) + "\n" + torn).encode(errors="surrogateescape"))
    log = MetricsLog(tmp_path, 20)
    log.write(row(20))
    log.close()
    assert read_rows(path) == [row(5), row(20)]
    assert os.listdir(tmp_path).count("metrics.jsonl.partial") == 0


def test_logs_that_cannot_be_written_are_one_warning_each(tmp_path, mentions, monkeypatch):
    """A full disk: neither rows nor events. Both go on once there is space."""
    said = []
    log = MetricsLog(tmp_path, 0, sides=SideOutputs(said.append))
    log.write(row(5))
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "open_to_append", mock.Mock(side_effect=OSError(errno.ENOSPC, "disk full")))
        patch.setattr(SummaryWriter, "add_scalar", mock.Mock(side_effect=OSError(errno.ENOSPC, "disk full")))
        for step in (10, 15):
            log.write(row(step))
        log.flush()
    log.write(row(20))
    log.flush()
    log.close()
    assert len(said) == 2 and all("disk full" in line for line in said)
    assert re.search(mentions("metrics.jsonl"), said[0]) and re.search(mentions("TensorBoard"), said[1])
    assert [entry["step"] for entry in read_rows(log.path)] == [5, 20]
    assert events(tmp_path).keys() == {5, 20}


# TensorBoard's thread finds no file; see `cli._report_thread`.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_deleted_folder_of_events_is_made_again(tmp_path):
    said = []
    log = MetricsLog(tmp_path, 0, sides=SideOutputs(said.append))
    log.write(row(5))
    shutil.rmtree(tmp_path / "tensorboard")
    log.write(row(10))
    log.flush()
    log.write(row(15))
    log.close()
    assert 15 in events(tmp_path)


def test_logs_are_not_written_through_links(tmp_path):
    """Of a run folder that came from elsewhere."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to(victim / "file")
    (run / "tensorboard").symlink_to(victim)
    said = []
    log = MetricsLog(run, 0, sides=SideOutputs(said.append))
    log.write(row(5))
    log.flush()
    log.close()
    assert os.listdir(victim) == ["file"] and (victim / "file").read_text() == "mine"
    assert read_rows(run / "metrics.jsonl") == [row(5)] and len(said) == 1
    # A second name of a file is as good as a link.
    os.link(victim / "file", run / "hard")
    os.replace(run / "hard", run / "metrics.jsonl")
    log = MetricsLog(run, 0, sides=SideOutputs(said.append))
    log.write(row(5))
    log.close()
    assert (victim / "file").read_text() == "mine"


def test_a_long_log_is_neither_read_nor_kept_as_a_whole(tmp_path):
    """Of half a million rows, a start reads the last ones and some for the curves."""
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for first in range(0, 500_000, 50_000):
            file.writelines(f'{{"step": {i}, "total": 1.5, "l1": 0.5}}\n' for i in range(first, first + 50_000))
    size, started_at = path.stat().st_size, time.process_time()
    tracemalloc.start()
    log = MetricsLog(tmp_path, 499_000)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started_at < 2 and memory < 30e6
    steps = [entry["step"] for entry in log.rows]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-100:] == list(range(498_901, 499_001))
    assert 1000 < len(steps) < 10_000
    assert size - path.stat().st_size == len(f'{{"step": {499_001}, "total": 1.5, "l1": 0.5}}\n') * 999
    for step in range(499_001, 499_001 + 10_000):
        log.rows = thin_rows([*log.rows, {"step": step}])
    assert len(log.rows) < 10_000 and log.rows[-1]["step"] == 509_000
    log.close()
