"""Shared by all tests: one thread, a tiny UNITE, ways to run commands, and no GPU tests without a CUDA device."""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    # Without a GPU, the Triton kernels run in Triton's interpreter. Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from unite_fast.cli import main
from unite_fast.config import Config, ModelConfig
from unite_fast.data_pipeline.open_source import _KINDS
from unite_fast.kernels import backend, fused_op, matmul
from unite_fast.model.unite import UNITE
from unite_fast.objective import StepDraws, draw_step
from unite_fast.randomness import NoiseKeys, Philox
from unite_fast.recipes import from_tree
from unite_fast.training import attention_precision
from unite_fast.utils import files

# Build servers set these; typer then colours its help even in a pipe.
for variable in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS"):
    os.environ.pop(variable, None)

# Sizes that could be swapped differ, so that a swap fails.
TINY = {
    "name": "tiny",
    "model": {
        "image_size": 8,
        "patch_size": 4,
        "latent_channels": 6,
        "num_classes": 5,
        "encoder": {"width": 32, "depth": 3, "heads": 4, "in_context_tokens": 3, "in_context_start": 1},
        "decoder": {"width": 24, "depth": 2, "heads": 3, "mlp_width": 40, "embed_width": 20},
    },
    "schedule": {"lr": 1e-3, "lr_2": 5e-4, "reference_batch": 0, "warmup_steps": 2, "hold_until": 3, "decay_until": 9},
    "train": {"batch_size": 6, "steps": 10, "precision": "float32", "compile": False, "device": "cpu"},
}

# The digits recipe at a size at which a run of 20 steps takes about a second. It sets everything that tests rely on, so
# that the recipe can change.
TINY_RUN = (
    "model.latent_channels=4",
    "model.encoder.width=16",
    "model.encoder.depth=2",
    "model.encoder.heads=2",
    "model.encoder.in_context_start=1",
    "model.decoder.width=16",
    "model.decoder.depth=1",
    "model.decoder.heads=1",
    "model.decoder.mlp_width=16",
    "model.decoder.embed_width=16",
    "objective.flow_weight=1",
    "schedule.lr=2.5e-3",
    "schedule.warmup_steps=3",
    "train.batch_size=8",
    "train.steps=20",
    "train.log_every=5",
    "train.checkpoint_every=10",
    "train.picture_every=0",
    "train.device=cpu",
    "train.threads=1",
    "sampling.solver=euler",
    "sampling.steps=2",
    "sampling.guidance=1",
    "sampling.interval=[0,1]",
)


# The same for molecules: those of tests/data.
TINY_MOLECULES = (
    f"data.path={Path(__file__).parent / 'data' / 'qm9_200.npz'}",
    "molecules.heavy=0",
    "molecules.group=8",
    "model.encoder.width=16",
    "model.encoder.depth=2",
    "model.encoder.heads=2",
    "model.decoder.width=16",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
    "model.decoder.mlp_width=16",
    "model.decoder.embed_width=16",
    "objective.flow_weight=0.01",
    "schedule.warmup_steps=3",
    "train.batch_size=16",
    "train.steps=12",
    "train.log_every=1",
    "train.checkpoint_every=4",
    "train.picture_every=0",
    "train.device=cpu",
    "train.threads=1",
    "sampling.solver=euler",
    "sampling.steps=2",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tests/gpu")
    group.addoption("--gpu-device", default="cuda", choices=("cuda", "cpu"), help="cpu: run tests/gpu on the CPU")
    group = parser.getgroup("tests/test_torchrun.py and tests/test_kill.py")
    group.addoption("--kills", type=int, default=2, help="how often a process is killed (default 2)")
    group.addoption("--torchrun", action="store_true", help="start runs with the command torchrun, not only its agent")
    group = parser.getgroup("tests/cluster")
    group.addoption("--cluster", action="store_true", help="all faults, phases and differences of hosts (an hour)")
    group.addoption("--cluster-table", metavar="FILE", help="write the measured seconds to this file, as JSON")
    group = parser.getgroup("tests/training/test_parallelize.py")
    group.addoption("--every-strategy", action="store_true", help="compare the losses of all strategies")


def pytest_configure() -> None:
    # Float sums are split alike on every machine, and parallel tests do not compete: on a busy two-core machine, two
    # threads that wait for each other took 17 times the CPU time of one (1.7 s for a tiny training step).
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # At its first backward pass autograd counts devices, and it refuses a later fork if there are any. Fake tensors
        # show a torch built for CUDA a device, so run a backward pass before them.
        torch.ones(1, requires_grad=True).sum().backward()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here")
    on_cpu = Path(__file__).with_name("gpu") if config.getoption("gpu_device") == "cpu" else None
    for item in items:
        if "gpu" in item.keywords and on_cpu not in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def triton_interpreter_rounds() -> None:
    """Triton's interpreter (3.9) truncates float32 to bfloat16, and rounding to e4m3 it loses carries and NaN. Round to
    nearest, as a GPU does."""
    if not backend.interpreted() or backend.why_missing("triton"):
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(numbers, source, target, mode):
        if (source.name, target.name) == ("fp32", "bf16"):
            return torch.tensor(numbers).bfloat16().view(torch.uint16).numpy()
        if (source.name, target.name) == ("fp32", "fp8e4nv"):
            return torch.tensor(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(numbers, source, target, mode)

    interpreter._convert_float = rounding


@pytest.fixture(scope="session")
def drawn_arithmetic() -> Callable[[int], contextlib.AbstractContextManager]:
    """`with drawn_arithmetic(seed):` draws summation orders and roundings; see tests/drawn_arithmetic.py."""
    spec = importlib.util.spec_from_file_location("drawn_arithmetic", Path(__file__).with_name("drawn_arithmetic.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DrawnArithmetic


@pytest.fixture(autouse=True)
def attention_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's bits do not depend on the noise of a measurement."""
    monkeypatch.setattr(attention_precision, "seconds", lambda shape, name: 1.0)


@pytest.fixture(autouse=True)
def choices_of_backends_end_with_the_test() -> Iterator[None]:
    """A run chooses them for the whole process."""
    yield
    backend.use("auto")
    backend.use_attention("sdpa", torch.device("cpu"))


@pytest.fixture(params=[True, False], ids=["bfloat16-matmuls", "float32-matmuls"])
def bfloat16_matmuls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU has bfloat16 matmuls. Runs the test both ways, on any CPU."""
    monkeypatch.setattr(matmul, "bfloat16_instructions", lambda: request.param)
    return request.param


class Casts(TorchDispatchMode):
    """Counts how often each weight, or a cast of it, is cast: (name of the weight, from dtype, to dtype) -> number."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        # By address. Copies share one storage. Each is kept alive, so that its address is not reused.
        self.weights = {weight.data_ptr(): (name, weight) for name, weight in model.named_parameters()}
        self.counts: Counter[tuple[str, torch.dtype, torch.dtype]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.add(args[0], out)
        elif function is torch.ops.aten._foreach_copy_.default:
            for copy, weight in zip(*args[:2], strict=True):
                self.add(weight, copy)
        return out

    def add(self, weight: torch.Tensor, copy: torch.Tensor) -> None:
        if weight.dtype != copy.dtype and weight.data_ptr() in self.weights:
            name, _ = self.weights[weight.data_ptr()]
            self.counts[name, weight.dtype, copy.dtype] += 1
            self.weights[copy.data_ptr()] = name, copy


@pytest.fixture
def count_casts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter]:
    """Counts the casts of a model's weights while a function runs; see `Casts`."""
    # Else each op is one operator, in which the mode does not see the casts.
    monkeypatch.setattr(fused_op, "needs_dispatcher", lambda x: False)

    def count(model: torch.nn.Module, run: Callable[[], object]) -> Counter:
        with Casts(model) as casts:
            run()
        return casts.counts

    return count


@pytest.fixture
def tiny_config() -> Config:
    """All parts of UNITE, at a size at which a step takes milliseconds."""
    return from_tree(Config, TINY)


@pytest.fixture(scope="session")
def draws_at() -> Callable[..., StepDraws]:
    """Makes the draws of a step, for samples at given positions of the global batch."""

    def draw(config: Config, positions: torch.Tensor, seed: int = 9, step: int = 3) -> StepDraws:
        latents = (config.model.latent_tokens, config.model.latent_channels)
        return draw_step(config.objective, Philox(seed, step, positions), latents)

    return draw


@pytest.fixture
def draws(draws_at, tiny_config: Config) -> StepDraws:
    """The draws for the batch of `tiny_config`."""
    return draws_at(tiny_config, torch.arange(tiny_config.train.batch_size))


@pytest.fixture(scope="session")
def with_numbers() -> Callable[[StepDraws, tuple[int, int]], StepDraws]:
    """Returns the same draws with noise tensors in place of keys; the latents are (N, C)."""

    def draw(draws: StepDraws, latents: tuple[int, int]) -> StepDraws:
        def noise(keys: NoiseKeys, count: int) -> torch.Tensor:
            return torch.stack([keys.philox.normal(keys.stream, latents, draw) for draw in range(count)])

        return dataclasses.replace(
            draws,
            decoder_noise=noise(draws.decoder_noise, 1)[0],
            flow_noise=noise(draws.flow_noise, len(draws.flow_time)),
        )

    return draw


def disturbed_model(config: ModelConfig) -> UNITE:
    model = UNITE.create(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def make_model() -> Callable[[ModelConfig], UNITE]:
    """Makes a model and adds N(0, 0.1) to its parameters: modulation, gates and output start at zero, which would hide
    mistakes."""
    return disturbed_model


@pytest.fixture
def tiny_model(make_model: Callable[[ModelConfig], UNITE], tiny_config: Config) -> UNITE:
    return make_model(tiny_config.model)


@pytest.fixture
def forget_registered_sources() -> Iterator[None]:
    """Removes the data sources that a test registers."""
    before = dict(_KINDS)
    yield
    _KINDS.clear()
    _KINDS.update(before)


@pytest.fixture(scope="session")
def tiny_run() -> tuple[str, ...]:
    """Arguments of `unite-fast train` for a tiny run; later settings override them."""
    return TINY_RUN


@pytest.fixture(scope="session")
def tiny_molecules() -> tuple[str, ...]:
    """Arguments of `unite-fast train` after `qm9_tiny` for a tiny run; later settings override them."""
    return TINY_MOLECULES


@pytest.fixture(scope="session")
def molecule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of molecules, not trained. Tests do not change it."""
    from unite_fast.checkpoint.model_file import save_model
    from unite_fast.data_pipeline.molecules.of_config import molecules_of
    from unite_fast.recipes import load_config

    config = load_config("qm9_tiny", TINY_MOLECULES)
    model = disturbed_model(config.model)
    model.size_counts.copy_(torch.tensor(molecules_of(config, "train").class_counts()))
    path = tmp_path_factory.mktemp("molecules") / "model.safetensors"
    save_model(path, config, 7, model.state_dict())
    return path


def pattern_of(*tokens: object) -> str:
    """A pattern that matches a text if one line contains every token as a whole word, in any order."""
    return "".join(rf"(?=.*(?<![\w-]){re.escape(str(token))}(?!\w))" for token in tokens)


@pytest.fixture(scope="session")
def mentions() -> Callable[..., str]:
    """`match=mentions("optim.eps", -1)`: a line of the message has key and value, in any wording."""
    return pattern_of


@dataclass
class Ended:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str

    def error(self, *tokens: object, status: int = 2) -> str:
        """Check for a user's mistake: status 2, and one line on stderr with every token. Returns the line."""
        assert self.status == status, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert re.search(pattern_of(*tokens), lines[0]), (tokens, lines[0])
        return lines[0].removeprefix("error: ")


@pytest.fixture
def command(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs `unite-fast ARGUMENTS` in this process."""

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["unite-fast", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as ending:
            status = ending.code or 0
        return Ended(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run. Tests do not change it."""
    from unite_fast.recipes import load_config
    from unite_fast.training.trainer import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    train(load_config("digits", (*TINY_RUN, f"train.out={folder}")))
    return folder


class Process:
    """A command in its own process."""

    def __init__(self, server: subprocess.Popen, arguments: tuple, folder: Path):
        self.server, self.output = server, folder / "output.txt"
        request = {"args": [str(part) for part in arguments], "folder": str(folder), "output": str(self.output)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.ended = False

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the end; returns the exit status, or minus the signal that ended it."""
        status = int(self.server.stdout.readline())
        self.ended = True
        return status

    def printed(self) -> str:
        return self.output.read_text()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[subprocess.Popen]:
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fork_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},  # as on a desktop; LANG=C is more lenient
    )
    assert server.stdout.readline() == "ready\n"
    yield server
    server.stdin.close()
    server.wait()


@pytest.fixture
def process(fork_server: subprocess.Popen, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts `unite-fast ARGUMENTS` as a process in `tmp_path`; one at a time."""
    started: list[Process] = []

    def start(*arguments: object) -> Process:
        started.append(Process(fork_server, arguments, tmp_path))
        return started[-1]

    yield start
    # A failed test leaves its process running.
    for left in started:
        if not left.ended:
            with contextlib.suppress(ProcessLookupError):
                left.signal(signal.SIGKILL)
            left.wait()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: no file can be made durable."""

    def flush(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "flush", flush)


@pytest.fixture
def free_port() -> int:
    return find_free_port()


def find_free_port() -> int:
    """A port below those that Linux gives to outgoing connections, one of which could take it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("localhost", port))
            return port


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list]:
    """Runs function(*arguments) in `world` processes with torchrun's environment variables, as if on `nodes` machines.
    Returns the results, rank 0 first."""

    def run(world: int, function: Callable, *arguments: object, nodes: int = 1, timeout: float = 120) -> list:
        port = find_free_port()
        fork = multiprocessing.get_context("fork")
        started = []
        for rank in range(world):
            here, there = fork.Pipe(duplex=False)
            environment = {
                "RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_RANK": rank % (world // nodes),
                "LOCAL_WORLD_SIZE": world // nodes,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            process = fork.Process(target=_rank_main, args=(there, environment, function, arguments), daemon=True)
            process.start()
            there.close()
            started.append((process, here))
        results, failures = [], []
        end = time.monotonic() + timeout
        for rank, (_, here) in enumerate(started):
            ok, result = (False, "no result before the timeout")
            with contextlib.suppress(EOFError):
                if here.poll(max(end - time.monotonic(), 0)):
                    ok, result = here.recv()
            results.append(result)
            if not ok:
                failures.append(f"rank {rank}: {result}")
        for process, _ in started:
            process.kill() if failures else process.join(30)
        assert not failures, "\n".join(failures)
        return results

    return run


def _rank_main(pipe, environment: dict, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "the condition did not hold within a minute"
            time.sleep(0.002)

    return wait


@pytest.fixture
def checkpoint_warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings about damaged checkpoints."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "unite_fast.checkpoint"]


@pytest.fixture(scope="session")
def rewrite() -> Callable[[Path, Callable], None]:
    """Changes a run's newest checkpoint."""
    from unite_fast.checkpoint.manager import Checkpoints
    from unite_fast.checkpoint.reader import load_checkpoint

    def run(folder: Path, change: Callable) -> None:
        saved = load_checkpoint(folder)
        change(saved)
        checkpoints = Checkpoints(folder / "checkpoints", keep_every=1)
        checkpoints.save(saved.step, saved.config, saved.progress, saved.tensors)
        checkpoints.close()

    return run


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """Checks that the latest checkpoints and the training metrics of two runs are equal bit for bit."""
    from unite_fast.checkpoint.reader import load_checkpoint
    from unite_fast.training.metrics import training_metrics
    from unite_fast.utils.rows import read_rows

    def compare(one: Path, other: Path) -> None:
        a, b = load_checkpoint(one), load_checkpoint(other)
        assert a.step == b.step
        assert a.progress == b.progress
        assert a.tensors.keys() == b.tensors.keys()
        assert any(name.startswith("optim.") for name in a.tensors)
        assert [name for name, value in a.tensors.items() if not torch.equal(value, b.tensors[name])] == []
        rows = [[training_metrics(row) for row in read_rows(folder / "metrics.jsonl")] for folder in (one, other)]
        assert rows[0] == rows[1]

    return compare
