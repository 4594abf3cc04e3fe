"""The tests of tests/gpu as parts: one line per test, with its error relative to the tolerance."""

from pathlib import Path

import pytest

from gpu_parts.context import Context

ROOT = Path(__file__).parents[2]


def ops(c: Context) -> None:
    run(c, "test_ops.py")


def linears_draws(c: Context) -> None:
    run(c, "test_linear.py", "test_float8.py", "test_draws.py")


def compiled(c: Context) -> None:
    run(c, "test_compiled.py", only="not lpips" if c.tiny else "")


def training(c: Context) -> None:
    # tests/training covers the other tests on a CPU.
    run(c, "test_training.py", only="ordinary_step" if c.tiny else "")


class Reporter:
    """Writes a result line for each test."""

    def __init__(self, context: Context):
        self.context, self.passed = context, 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.failed:
            self.context.say(name, ok=False, when=report.when, error=report.longreprtext[-700:])
        elif report.skipped:
            self.context.say(name, skipped=str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else "")[:200])
        elif report.when == "call":
            self.passed += 1
            facts = {key.replace(" ", "_"): value for key, value in report.user_properties}
            self.context.say(name, ok=True, seconds=round(report.duration, 2), **facts)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.context.say(report.nodeid, ok=False, when="collect", error=report.longreprtext[-700:])


def run(c: Context, *files: str, only: str = "") -> None:
    reporter = Reporter(c)
    arguments = [str(ROOT / "tests/gpu" / name) for name in files]
    arguments += ["-m", "gpu", "--gpu-device", c.device.type, "-q", "--tb=short", "-p", "no:cacheprovider", "-k", only]
    arguments += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    status = pytest.main(arguments, plugins=[reporter])
    # Failed tests have their own lines; report errors that stop the whole run.
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not reporter.passed:
        c.say("pytest", ok=False, error=f"ended with status {int(status)}, {reporter.passed} tests passed")
