"""The means that are logged, and the files that hold them."""

import json
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unite_fast.errors import UserError
from unite_fast.objective import Losses
from unite_fast.training.metrics import Averages, MetricsLog, read_rows


def losses(value: float) -> Losses:
    return Losses(*torch.tensor([value, 2 * value, 3 * value, 4 * value]).unbind())


def row(step: int) -> dict:
    return {"step": step, "l1": 0.1 + step, "lr": 1e-7 / 3}


def events(folder) -> dict[int, float]:
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {event.step: event.value for event in reader.Scalars("l1")}


def test_means_are_over_the_steps_since_the_last_time():
    averages = Averages(torch.device("cpu"))
    for step, value in enumerate((1.0, 2.0, 6.0), start=1):
        averages.add(step, losses(value), torch.tensor(10 * value))
    expected = Losses(*torch.tensor([3.0, 6.0, 9.0, 12.0]).unbind())
    for _ in range(2):
        means = averages.take()
        assert means.pop("grad_norm") == 30
        assert means == {name: float(getattr(expected, name)) for name in ("total", "l1", "flow", "lpips")}
        averages.add(4, losses(3.0), torch.tensor(30.0))


def test_means_survive_json_to_the_last_bit():
    whole, first = Averages(torch.device("cpu")), Averages(torch.device("cpu"))
    for step, value in enumerate((0.1, 1e-30, 3e7)):
        whole.add(step, losses(value), torch.tensor(value / 3))
        first.add(step, losses(value), torch.tensor(value / 3))
    second = Averages(torch.device("cpu"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for averages in (whole, second):
        averages.add(9, losses(0.7), torch.tensor(0.3))
    assert whole.take() == second.take()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["losses", "gradient"])
def test_the_first_step_that_is_not_finite_is_remembered(bad, where):
    averages = Averages(torch.device("cpu"))
    for step in range(1, 8):
        value = bad if step in (3, 5) else 1.0
        averages.add(step, losses(value if where == "losses" else 1.0), torch.tensor(value))
        assert averages.bad_step() == (3 if step >= 3 else None)


def test_rows_and_events_can_be_read_back(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (5, 10):
        log.write(row(step))
        # At once: who follows a run must not wait for its end.
        assert read_rows(tmp_path / "metrics.jsonl")[-1] == row(step)
    log.flush()
    assert events(tmp_path).keys() == {5, 10}
    log.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [row(5), row(10)]
    assert events(tmp_path) == pytest.approx({5: 5.1, 10: 10.1})


def test_rows_after_the_checkpoint_are_written_anew(tmp_path):
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
def test_what_a_kill_or_a_full_disk_left_half_written_is_passed_over(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((json.dumps(row(5)) + "\n" + torn).encode(errors="surrogateescape"))
    log = MetricsLog(tmp_path, 20)
    log.write(row(20))
    log.close()
    assert read_rows(path) == [row(5), row(20)]
    assert os.listdir(tmp_path).count("metrics.jsonl.partial") == 0


def test_a_full_disk_is_named_with_the_file(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        log.write(row(5))
    log.close()
