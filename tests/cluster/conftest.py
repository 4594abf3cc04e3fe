"""Tests over several hosts; see tests/cluster/test_faults.py."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def load(name: str):
    """A module of this folder, which is no package."""
    known = f"tests_cluster_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, HERE / f"{name}.py")
        assert spec and spec.loader
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    reason = load("hosts").why_missing() if here else ""
    for item in here:
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"hosts of a cluster: {reason}"))
        elif "long" in item.keywords and not config.getoption("cluster"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run it with --cluster"))


@pytest.fixture
def make_hosts(tmp_path: Path) -> Iterator[Callable]:
    """Makes the hosts of a cluster: `make_hosts(2)`; see `Hosts`."""
    made = []

    def make(count: int, **options):
        made.append(load("hosts").Hosts(count, tmp_path / f"hosts{len(made)}", **options))
        return made[-1]

    yield make
    for hosts in made:
        hosts.close()


STEPS = 60
EVERY = (
    "train.log_every=1",
    "train.checkpoint_every=10",
    "train.evaluate_every=20",
    "evaluation.count=3000",
    f"train.steps={STEPS}",
)
TIMEOUT = 60.0
"""parallel.timeout of the jobs, in seconds."""


@pytest.fixture(scope="session")
def settings(tiny_run: tuple[str, ...]) -> tuple[str, ...]:
    """Arguments of `unite-fast train`, without the run folder."""
    return ("digits", *tiny_run, *EVERY, f"parallel.timeout={TIMEOUT}")


def _train_here(arguments: list[str]) -> None:
    from unite_fast.recipes import load_config
    from unite_fast.training.trainer import train

    train(load_config(arguments[0], arguments[1:]))


@pytest.fixture(scope="session")
def undisturbed(ranks, settings, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run of `world` ranks on one machine, to the end: `undisturbed(2)`. Each is trained once."""
    known: dict[tuple, Path] = {}

    def run(world: int, *more: str, nodes: int = 1) -> Path:
        if (world, more) not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            ranks(world, _train_here, [*settings, *more, f"train.out={folder}"], nodes=nodes)
            known[world, more] = folder
        return known[world, more]

    return run


@pytest.fixture
def make_job(settings, tmp_path: Path) -> Callable:
    """`make_job(hosts, *more)`: training in `tmp_path / "shared" / "run"`; see `Job`."""
    folder = tmp_path / "shared" / "run"
    folder.parent.mkdir()

    def make(hosts, *more: str, **options):
        arguments = ["train", *settings, *more, f"train.out={folder}", "--resume"]
        return load("jobs").Job(hosts, folder, arguments, **options)

    return make


ROWS = pytest.StashKey[list]()


@pytest.fixture
def table(pytestconfig) -> Iterator[list[dict]]:
    """Rows of measured seconds, printed at the end and, with --cluster-table=FILE, written as JSON after each test."""
    rows = pytestconfig.stash.setdefault(ROWS, [])
    yield rows
    if file := pytestconfig.getoption("cluster_table"):
        Path(file).write_text(json.dumps(rows, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        terminalreporter.section("seconds")
        terminalreporter.line(f"| {' | '.join(columns)} |")
        terminalreporter.line(f"|{'---|' * len(columns)}")
        for row in rows:
            terminalreporter.line(f"| {' | '.join(str(row.get(column, '')) for column in columns)} |")
