"""The search: what it tries, what wins, and what it skips for lack of time or memory."""

import re
from dataclasses import replace

import pytest

from unite_fast.benchmarking import candidate, tune, tuned_file
from unite_fast.benchmarking.candidate import FAILED, OK, OUT_OF_MEMORY, OUT_OF_TIME, Trial
from unite_fast.benchmarking.tune import Axis, timed_batch
from unite_fast.distributed.process_group import ALONE
from unite_fast.errors import UserError
from unite_fast.recipes import TUNABLE, load_config


class Machine:
    """Stands in for timing: a rule gives the speed of settings, and its clock is not the real one."""

    def __init__(self, monkeypatch, speed, seconds=10.0):
        self.speed, self.seconds, self.now, self.tried, self.limits = speed, seconds, 0.0, [], []
        monkeypatch.setattr(tune.time, "monotonic", lambda: self.now)

    def __call__(self, settings, limit):
        self.tried.append(settings)
        self.limits.append(limit)
        self.now += self.seconds
        rate = self.speed(settings)
        if isinstance(rate, str):
            return Trial(settings, rate, self.seconds, None, "it broke" if rate == FAILED else "")
        row = {"images_per_s": rate, "step_ms": 1e3 / rate, "memory_gb": 1.0}
        return Trial(settings, OK, self.seconds, row)


def search(machine, axes, budget=1000.0):
    messages = []
    result = tune.search(axes, machine, budget, ALONE, messages.append)
    assert len(messages) == len(result.trials)
    return result


AXES = [
    Axis("kernels", ("reference",)),
    Axis("train.micro_batch", (128, 256, 512), climbs=True),
    Axis("train.micro_batch", (32, 16), climbs=True, smaller=True),
    Axis("attention", ("sdpa_flash", "sdpa_cudnn")),
]


def test_each_setting_is_tried_with_the_best_before_it(monkeypatch, mentions):
    def speed(settings):
        rate = 100.0
        rate *= 0.5 if settings.get("kernels") == "reference" else 1
        rate *= {128: 1.1, 256: 1.2, 512: OUT_OF_MEMORY}.get(settings.get("train.micro_batch"), 1)
        return rate * {"sdpa_flash": 1.005, "sdpa_cudnn": 1.05}.get(settings.get("attention"), 1)

    def rule(settings):
        return OUT_OF_MEMORY if settings.get("train.micro_batch") == 512 else speed(settings)

    machine = Machine(monkeypatch, rule)
    result = search(machine, AXES)
    assert machine.tried == [
        {},
        {"kernels": "reference"},
        {"train.micro_batch": 128},
        {"train.micro_batch": 256},
        {"train.micro_batch": 512},
        {"train.micro_batch": 256, "attention": "sdpa_flash"},
        {"train.micro_batch": 256, "attention": "sdpa_cudnn"},
    ]
    assert result.best.settings == {"train.micro_batch": 256, "attention": "sdpa_cudnn"}
    text = "\n".join(tune.lines(result))
    assert re.search(mentions(1, 7, "memory"), text) and re.search(mentions("sdpa_cudnn", "26.0%"), text)
    assert "39.7%" in text, "the reference backend, relative to the best"


def test_smaller_micro_batches_are_tried_if_larger_ones_do_not_help(monkeypatch):
    machine = Machine(monkeypatch, lambda settings: 100.0 + (settings.get("train.micro_batch", 64) == 32))
    search(machine, AXES[1:3])
    assert machine.tried == [{}, {"train.micro_batch": 128}, {"train.micro_batch": 32}], "1 % is no gain"
    machine = Machine(monkeypatch, lambda settings: 6400.0 / settings.get("train.micro_batch", 64))
    assert search(machine, AXES[1:3]).best.settings == {"train.micro_batch": 16}


def test_a_recipe_that_does_not_fit_gets_the_first_micro_batch_that_does(monkeypatch, mentions):
    def rule(settings):
        if settings.get("train.micro_batch", 64) > 16:
            return OUT_OF_MEMORY
        return 50.0 if "kernels" in settings else 60.0

    machine = Machine(monkeypatch, rule)
    result = search(machine, AXES)
    assert machine.tried[:4] == [
        {},
        {"train.micro_batch": 32},
        {"train.micro_batch": 16},
        {"train.micro_batch": 16, "kernels": "reference"},
    ]
    assert result.best.settings == {"train.micro_batch": 16}
    assert re.search(mentions(2, 6, "memory"), "\n".join(tune.lines(result)))
    with pytest.raises(UserError, match=mentions("memory", "train.batch_size")):
        search(Machine(monkeypatch, lambda settings: OUT_OF_MEMORY), AXES)


def test_settings_without_time_are_reported(monkeypatch, mentions):
    machine = Machine(monkeypatch, lambda settings: 100.0)
    result = search(machine, AXES, budget=25.0)
    assert machine.tried == [{}, {"kernels": "reference"}]
    assert machine.limits == [25.0, 15.0]
    assert {"train.micro_batch": 128} in result.untried and {"attention": "sdpa_flash"} in result.untried
    assert re.search(mentions("attention=sdpa_flash", "--budget"), "\n".join(tune.lines(result)))
    # No candidate may use up the time of the others.
    machine = Machine(monkeypatch, lambda settings: 100.0)
    search(machine, AXES, budget=1000.0)
    assert machine.limits[0] == 1000.0 and set(machine.limits[1:]) == {tune.PATIENCE * 10}


def test_failures_are_reported_and_do_not_end_the_search(monkeypatch, mentions):
    rule = {"sdpa_flash": FAILED, "sdpa_cudnn": OUT_OF_TIME}
    machine = Machine(monkeypatch, lambda settings: rule.get(settings.get("attention"), 100.0))
    result = search(machine, AXES[3:])
    assert result.best is result.recipe
    text = "\n".join(tune.lines(result))
    for tokens in (("attention=sdpa_flash", "it broke"), ("attention=sdpa_cudnn", OUT_OF_TIME), ("recipe", "100.0")):
        assert re.search(mentions(*tokens), text), tokens
    with pytest.raises(UserError, match="it broke"):
        search(Machine(monkeypatch, lambda settings: FAILED), AXES)
    with pytest.raises(UserError, match=mentions("--budget", 9)):
        search(Machine(monkeypatch, lambda settings: OUT_OF_TIME), AXES, budget=9.0)


def test_what_is_counted_may_be_molecules(monkeypatch, tmp_path):
    machine, messages = Machine(monkeypatch, lambda settings: 100.0), []
    result = tune.search(AXES[1:2], machine, 1000.0, ALONE, messages.append, "molecules/s")
    text = "\n".join([*messages, *tune.lines(result, "molecules/s")])
    assert "100.0 molecules/s" in text and "images" not in text
    row = {
        "date": "d",
        "gpus": 1,
        "card": "c",
        "torch": "2",
        "cuda": "",
        "triton": "3",
        "commit": "c",
        **result.best.row,
    }
    best = replace(result.best, row=row)
    tuned_file.write(tmp_path / "tuned.yaml", tune.TuneResult([best], best), "unite-fast tune x", "molecules/s")
    assert "100.0 molecules/s" in (tmp_path / "tuned.yaml").read_text()


def test_settings_tried_on_each_kind_of_machine(monkeypatch):
    monkeypatch.setattr(tune, "usable_cores", lambda: 8)
    config = load_config("imagenet256_b")
    names = [(axis.key, axis.values) for axis in tune.axes(config, cuda=True, world=8, fixed=set())]
    assert ("train.micro_batch", (128,)) in names and ("parallel.reshard_after_forward", (False,)) in names
    assert ("train.micro_batch", (32, 16, 8, 4, 2, 1)) in names and ("kernels", ("reference",)) in names
    assert "train.threads" not in dict(names)
    assert {key for key, _ in names} <= set(TUNABLE)
    assert {"sdpa_cudnn", "sdpa_flash", "sdpa_efficient"} == set(dict(names)["attention"])
    assert "train.cuda_graph" not in dict(names)
    one = dict((axis.key, axis.values) for axis in tune.axes(config, cuda=True, world=1, fixed=set()))
    assert one["train.cuda_graph"] == (True,)
    exact = load_config("imagenet256_b", ("train.deterministic=true", "attention=sdpa_flash"))
    assert {"sdpa", "sdpa_efficient"} == set(
        next(axis.values for axis in tune.axes(exact, cuda=True, world=1, fixed=set()) if axis.key == "attention")
    )
    cpu = dict((axis.key, axis.values) for axis in tune.axes(config, cuda=False, world=1, fixed={"kernels"}))
    assert cpu == {"train.compile": (False,), "train.threads": (8, 4, 1)}


def test_write_and_read_the_file(tmp_path, mentions):
    settings = {"kernels": "reference", "train.compile": False, "train.micro_batch": 32, "train.threads": 2}
    row = {"date": "d", "gpus": 1, "card": "c: #1", "torch": "t", "cuda": "", "triton": "", "commit": "1", "step_ms": 1}
    trial = Trial(settings, OK, 1.0, row | {"images_per_s": 5.0, "memory_gb": 1.0})
    path = tmp_path / "new" / "tuned.yaml"
    tuned_file.check(path)
    tuned_file.write(path, tune.TuneResult([trial, replace(trial, settings={})], trial), "unite-fast tune 'a: b'")
    assert path.read_text().startswith("# unite-fast tune")
    config = load_config("digits", ("train.threads=3",), str(path))
    assert (config.kernels, config.train.compile, config.train.micro_batch) == ("reference", False, 32)
    assert config.train.threads == 3
    with pytest.raises(UserError, match=mentions("--out", tmp_path)):
        tuned_file.check(tmp_path)


@pytest.mark.parametrize(
    ("status", "err", "expected"),
    [
        (2, "step 3\nerror: out of memory: CUDA out of memory. Tried to; a smaller batch", (OUT_OF_MEMORY, "")),
        (1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory.\n", (OUT_OF_MEMORY, "")),
        (2, "first step\nerror: attention: no such\n", (FAILED, "attention: no such")),
        (1, "Traceback\nValueError: odd\n", (FAILED, "ValueError: odd")),
        (-9, "", (FAILED, "killed by SIGKILL, perhaps out of memory")),
        (3, "", (FAILED, "exit status 3")),
    ],
)
def test_reasons_of_a_failed_process(status, err, expected):
    assert candidate.explain(status, err) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(1024, 64, 1, 256), (1024, 64, 8, 1024), (96, 0, 1, 96), (1024, 512, 1, 512), (1000, 100, 1, 200), (8, 2, 2, 8)],
)
def test_a_timed_step_has_few_micro_batches(batch, micro, world, expected):
    """At most 256 images per process, in whole micro-batches, and at least one micro-batch."""
    config = load_config("digits", (f"train.batch_size={batch}", f"train.micro_batch={micro}"))
    assert timed_batch(config, world) == expected


def test_the_recipe_and_foreign_files_are_not_replaced(tmp_path, mentions):
    recipe, notes = tmp_path / "mine.yaml", tmp_path / "notes.yaml"
    recipe.write_text("# unite-fast tune x\nname: mine\n")
    notes.write_text("# my notes\n")
    with pytest.raises(UserError, match=mentions(recipe, "reads")):
        tuned_file.check(recipe, str(recipe))
    with pytest.raises(UserError, match=mentions(notes, "in the way")):
        tuned_file.check(notes, "digits")
    tuned_file.check(recipe, "digits")
