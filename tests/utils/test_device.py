"""The device, and PyTorch's numerics: float32 without TF32, deterministic algorithms."""

import os

import pytest
import torch

from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.recipes import from_tree, load_config
from unite_fast.training.trainer import Trainer
from unite_fast.utils import device
from unite_fast.utils.device import (
    CUBLAS_WORKSPACE,
    check_float8,
    choose_device,
    exact_float32,
    host_memory,
    use_numerics,
)


def tf32() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(autouse=True)
def restore_numerics(monkeypatch):
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    before, fill = tf32(), torch.utils.deterministic.fill_uninitialized_memory
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
    os.environ.pop(CUBLAS_WORKSPACE, None)


@pytest.mark.parametrize(
    ("precision", "rounded"), [("float32", (False, False)), ("bfloat16", (True, True)), ("float8", (True, True))]
)
def test_float32_is_not_tf32(precision, rounded):
    use_numerics(precision, deterministic=False)
    assert tf32() == rounded
    assert not torch.are_deterministic_algorithms_enabled() and CUBLAS_WORKSPACE not in os.environ


def test_a_container_has_the_memory_that_it_is_granted(monkeypatch):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for text, memory in (("1000\n", 1000), ("max\n", whole), (f"{2**63}\n", whole)):
        monkeypatch.setattr(device.Path, "read_text", lambda path, text=text: text)
        assert host_memory() == memory


def test_deterministic_is_strict_and_configures_cublas():
    use_numerics("bfloat16", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    # With warn-only, flash attention keeps its nondeterministic algorithm.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    use_numerics("bfloat16", deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_exact_float32_ends_with_its_context():
    with exact_float32():
        assert tf32() == (False, False)
    assert tf32() == (True, True)
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert tf32() == (True, True)


def test_a_trainer_applies_its_settings(tiny_run, tmp_path):
    config = load_config("digits", (*tiny_run, f"train.out={tmp_path / 'run'}", "train.deterministic=true"))
    trainer = Trainer(config, False)
    try:
        assert tf32() == (False, False) and torch.are_deterministic_algorithms_enabled()
        trainer.step(trainer.read())  # every op of a step has a deterministic implementation
    finally:
        trainer.close()


@pytest.mark.parametrize("attention", ["flash_attn"])
def test_attention_that_cannot_be_deterministic_is_refused(attention, mentions):
    tree = {"attention": attention, "train": {"deterministic": True}}
    with pytest.raises(UserError, match=mentions("train.deterministic", f"attention={attention}", "attention=sdpa")):
        from_tree(Config, tree)
    assert from_tree(Config, tree | {"attention": "sdpa"}).train.deterministic


def test_choose_device(monkeypatch, mentions):
    assert choose_device("cpu").type == "cpu"
    for available in (False, True):
        monkeypatch.setattr(device.torch.cuda, "is_available", lambda available=available: available)
        assert choose_device("auto").type == ("cuda" if available else "cpu")
    assert choose_device("cuda").type == "cuda"
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=mentions("device", "cuda")):
        choose_device("cuda")
    with pytest.raises(UserError, match=mentions("device", "'gpu'", "auto", "cpu", "cuda")):
        choose_device("gpu")


@pytest.mark.parametrize(
    ("capability", "override", "tokens"),
    [
        ((8, 0), "train.steps=1", ("train.precision", "A card", "8.0", "8.9", "train.precision=bfloat16")),
        ((8, 9), "model.decoder.width=40", ("model.decoder.width", 40, 16)),
        ((9, 0), "model.decoder.mlp_width=200", ("model.decoder.mlp_width", 200, 16)),
        ((9, 0), "train.steps=1", None),
    ],
)
def test_float8_needs_a_gpu_that_has_it_and_multiples_of_16(capability, override, tokens, monkeypatch, mentions):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    model = load_config("digits", (override,)).model
    check_float8(model, torch.device("cpu"))  # emulates any width
    if tokens is None:
        check_float8(model, torch.device("cuda"))
        return
    with pytest.raises(UserError, match=mentions(*tokens)):
        check_float8(model, torch.device("cuda"))


def test_more_threads_than_any_machine_runs_are_refused():
    """PyTorch starts a million, and crashes."""
    before = torch.get_num_threads()
    for threads in (4097, 10**6, 2**40):
        with pytest.raises(UserError, match=rf"train\.threads is {threads}"):
            device.use_threads(threads)
    device.use_threads(0)
    assert torch.get_num_threads() == before
