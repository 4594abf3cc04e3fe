"""What a run checks before it builds its model; more in test_cuda_graph.py and test_attention_precision.py."""

import os
import re

import pytest
import torch

from unite_fast.data_pipeline import choose_loader
from unite_fast.distributed import hosts
from unite_fast.distributed.launch import join_training
from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.distributed.strategy import UNSHARDED
from unite_fast.errors import UserError
from unite_fast.recipes import load_config
from unite_fast.training.setup import (
    check_cuda_graph,
    choose_attention,
    data_lines,
    open_training_data,
    process_lines,
    start_values,
    use_device_settings,
)


def test_data_of_another_number_of_classes_are_refused(mentions):
    assert len(open_training_data(load_config("digits"))) == 1437
    with pytest.raises(UserError, match=mentions("model.num_classes", 10, 11)):
        open_training_data(load_config("digits", ("model.num_classes=11",)))


def test_threads_are_those_of_the_settings():
    before = torch.get_num_threads()
    try:
        use_device_settings(load_config("digits", ("train.threads=2",)), torch.device("cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_run_in_float32_measures_no_attention():
    assert choose_attention(load_config("digits"), torch.device("cpu"), None, None) == ""


def test_a_graph_needs_cuda(mentions):
    check_cuda_graph(load_config("digits"), torch.device("cpu"), UNSHARDED)
    with pytest.raises(UserError, match=mentions("train.cuda_graph", "cpu")):
        check_cuda_graph(load_config("digits", ("train.cuda_graph=true",)), torch.device("cpu"), UNSHARDED)


def test_a_run_says_what_it_trains_on(mentions):
    config = load_config("digits")
    source = open_training_data(config)
    choice = choose_loader(config.data.loader, source, torch.device("cpu"))
    (line,) = data_lines(config, source, choice, "")
    assert re.search(mentions(1437, "images", 1500, 66.81), line)
    assert list(data_lines(config, source, choice, "grew")) == [line, "data: grew"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_on_several_machines_says_which_and_whether_one_can_be_replaced(monkeypatch, kept):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(kept))
    monkeypatch.setattr(hosts, "_hosts", ["a", "a", "b", "b"])
    config = load_config("digits")
    assert list(process_lines(config, UNSHARDED, ALONE)) == []
    processes, machines, *warning = process_lines(config, UNSHARDED, Ranks(0, 4, 0, 2))
    assert re.match(r"4 processes of 16 images\b", processes)
    assert machines == "machines: a, b"
    assert bool(warning) == kept


def _start_of_rank(settings: tuple[str, ...], resume: bool) -> str:
    main = os.environ["RANK"] == "0"
    config = load_config("digits", () if main else settings)
    try:
        with join_training("cpu", 30, start_values(config, {"--resume": resume and not main})):
            return ""
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("settings", "resume", "tokens"),
    [
        (("schedule.lr=1",), False, ("schedule.lr", "1.0", "rank 1")),
        (("train.steps=3",), False, ("train.steps", 3, "rank 1")),
        ((), True, ("--resume", True, "rank 1")),
        (("train.threads=1", "data.workers=1", "data.path=elsewhere", "train.out=elsewhere"), False, ()),
    ],
)
def test_ranks_that_were_started_in_another_way_are_refused(ranks, mentions, settings, resume, tokens):
    for message in ranks(2, _start_of_rank, settings, resume):
        assert re.search(mentions(*tokens), message) and bool(message) == bool(tokens)
