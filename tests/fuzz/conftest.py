"""Feed readers and commands with damaged, crafted and absurd input, and watch what they do.

    python -m pytest tests/fuzz -q                    # a short run, part of the test suite
    python -m pytest tests/fuzz -q --inputs 400       # 400 inputs per test, a long run by hand

Each input is either right (accepted with an unchanged meaning, or refused in one line), or a fault: a traceback, more
than 20 s, an accepted change that alters results, a program or connection that is started, a pickle that is read, or a
file that is written outside the folder of the test. Hypothesis finds and shrinks the inputs.
"""

import contextlib
import copy
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from unite_fast.data_pipeline import UnreadableSample
from unite_fast.errors import UserError

SECONDS = 20.0
SHORT = 12
"""Inputs per test in the test suite."""
MARK = "mark-of-a-command"
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "pty.spawn",
    "socket.connect",
    "pickle.find_class",
)
WORKERS = ("concurrent.futures.", "multiprocessing.", "unite_fast.")
"""Modules whose objects worker processes of our own send."""
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")

NASTY = [
    *(None, True, False, "", " ", "0", "-1", "x", "nan", "inf", "1e999", "1_0", "\u0661", "0x10", "010", "2024-13-45"),
    *(0, -1, 1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 10**12, 10**30, 0.5, -0.0, 1e-300, 1e300),
    *("/etc/passwd", "/dev/zero", "../../x", "~", "a\nb", "\x1b[31m", "\u202e", "\ud800", "\0", "a" * 300),
    *(f"pipe:touch {MARK}; cat {{}}", f"$(touch {MARK})", "https://127.0.0.1:9/x", "file:///etc/passwd", "s3://x/y"),
    *([], {}, [[]], [1, 2], {"a": 1}, [None], {"": {}}, [[[[[[[[1]]]]]]]]),
]
"""Values that some program once took for something else."""

tried: Counter[tuple[str, str]] = Counter()
"""(name, "accepted" or "refused") -> inputs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("tests/fuzz").addoption("--inputs", type=int, default=SHORT, help="inputs per test of tests/fuzz")


def pytest_terminal_summary(terminalreporter) -> None:
    if tried:
        terminalreporter.write_line("inputs of tests/fuzz: tried, accepted with an unchanged meaning, refused")
        for name in sorted({name for name, _ in tried}):
            accepted, refused = tried[name, "accepted"], tried[name, "refused"]
            terminalreporter.write_line(f"  {name:28} {accepted + refused:6} {accepted:6} {refused:6}")
        terminalreporter.write_line(f"  {'all':28} {sum(tried.values()):6}")


class Watch:
    """What the code under test may not do, by Python's audit events; while `folder` is set."""

    folder: Path | None = None
    faults: list[str]

    def __init__(self):
        self.faults = []
        sys.addaudithook(self.event)

    def event(self, name: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if name == "pickle.find_class" and arguments[0].startswith(WORKERS):
            return
        if name in STARTS:
            self.faults.append(f"{name} {arguments[:2]!r}"[:200])
        elif name == "open" and isinstance(arguments[0], (str, bytes)):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                self.written(name, arguments[0])
        elif name in CHANGES:
            paths = arguments[:2] if name in ("os.rename", "os.link") else arguments[-2:-1] or arguments[:1]
            for path in paths if name != "os.symlink" else arguments[1:2]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self.written(name, path)

    def written(self, event: str, path) -> None:
        folder, text = self.folder, os.path.abspath(os.fsdecode(path))
        assert folder is not None
        self.folder = None  # realpath raises events of its own
        inside = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
        self.folder = folder
        if "/.hypothesis" in inside:
            return
        if not inside.startswith((f"{folder}/", "/dev/null", "/dev/shm/", "/proc/self/")) and inside != str(folder):
            self.faults.append(f"{event} {text!r}"[:200])


class Hang(BaseException):
    """An input took too long. Not an Exception, so that no handler swallows it."""


class Fuzz:
    """Calls a function with many inputs and counts how they end."""

    def __init__(self, inputs: int, watch: Watch, base: Path):
        self.inputs, self.watch, self.base = inputs, watch, base

    def __call__(self, name: str, one: Callable[[Callable, Path], None]) -> None:
        """
        Args:
            one: called as one(draw, folder). `draw` takes a Hypothesis strategy; `folder` is new, and the current one.
                It returns if the input was accepted, after comparing what was read; it raises a UserError or an
                UnreadableSample if the input was refused.
        """

        @settings(
            max_examples=self.inputs,
            deadline=None,
            database=None,
            derandomize=self.inputs <= SHORT,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def run(data) -> None:
            with tempfile.TemporaryDirectory(dir=self.base) as place:
                folder = Path(place) / "here"
                folder.mkdir()
                with self.guarded(folder):
                    try:
                        one(data.draw, folder)
                        outcome = "accepted"
                    except (UserError, UnreadableSample) as error:
                        outcome = "refused"
                        line = str(error)
                assert not list(Path(place).rglob(MARK)), "a command ran"
                if outcome == "refused":
                    assert line.isprintable(), line
                    assert len(line) < 2000, line
                tried[name, outcome] += 1

        run()

    @contextlib.contextmanager
    def guarded(self, folder: Path) -> Iterator[None]:
        def stop(*_) -> None:
            raise Hang(f"more than {SECONDS} s")

        before, temporary = os.getcwd(), tempfile.tempdir
        self.watch.faults.clear()
        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        os.chdir(folder)
        tempfile.tempdir = str(folder)
        self.watch.folder = folder.resolve().parent
        try:
            yield
        finally:
            self.watch.folder = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
            os.chdir(before)
            tempfile.tempdir = temporary
        assert not self.watch.faults, self.watch.faults

    def damaged(self, original: bytes, header: int = 400) -> st.SearchStrategy[bytes]:
        """The bytes with one to four edits, half of them in the first `header` bytes."""
        place = st.one_of(st.integers(0, min(header, len(original)) - 1), st.integers(0, len(original) - 1))
        kinds = st.sampled_from(["flip", "set", "insert", "delete", "cut", "zero", "copy"])
        edit = st.tuples(kinds, place, st.integers(0, 255), st.integers(1, 64))
        return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edited(original, edits))

    def absurd(self) -> st.SearchStrategy:
        return st.sampled_from(NASTY)

    def value(self) -> st.SearchStrategy:
        """A value that JSON or YAML can hold."""
        return st.one_of(
            st.sampled_from(NASTY), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
        )

    def changed_tree(self, tree) -> st.SearchStrategy:
        """JSON with one to three entries replaced, deleted or doubled."""
        edit = st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "replace", "delete", "add"]), self.value())
        return st.lists(edit, min_size=1, max_size=3).map(lambda edits: _changed(tree, edits))


def _edited(original: bytes, edits: list) -> bytes:
    text = bytearray(original)
    for kind, place, value, length in edits:
        place = min(place, max(0, len(text) - 1))
        if not text:
            break
        if kind == "flip":
            text[place] ^= 1 << (value % 8)
        elif kind == "set":
            text[place] = value
        elif kind == "insert":
            text[place:place] = bytes([value]) * length
        elif kind == "delete":
            del text[place : place + length]
        elif kind == "cut":
            del text[place:]
        elif kind == "zero":
            text[place : place + length] = bytes(len(text[place : place + length]))
        else:
            text[place:place] = text[place : place + length]
    return bytes(text)


def _changed(tree, edits: list):
    tree = json.loads(json.dumps(tree))
    for number, kind, value in edits:
        value = copy.deepcopy(value)
        places = [*_places(tree)]
        if not places:
            break
        parent, key = places[number % len(places)]
        if kind == "replace":
            parent[key] = value
        elif kind == "delete":
            del parent[key]
        elif isinstance(parent, dict):
            parent[str(value)] = value
        else:
            parent.append(value)
    return tree


def _places(tree, depth: int = 0) -> Iterator[tuple]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        if depth < 8:
            yield from _places(value, depth + 1)


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, watch: Watch, tmp_path: Path) -> Fuzz:
    return Fuzz(request.config.getoption("inputs"), watch, tmp_path)


@pytest.fixture
def slow_inputs(request: pytest.FixtureRequest) -> None:
    """More time for a test with many inputs."""
    request.node.add_marker(pytest.mark.timeout(0 if request.config.getoption("inputs") > SHORT else 300))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
