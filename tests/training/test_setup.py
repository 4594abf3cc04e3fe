"""What a run checks before it builds its model; more in test_cuda_graph.py and test_attention_precision.py."""

import os
import re

import pytest
import torch

from unite_fast.distributed.launch import join_training
from unite_fast.distributed.strategy import UNSHARDED
from unite_fast.errors import UserError
from unite_fast.recipes import load_config
from unite_fast.training.setup import (
    check_cuda_graph,
    choose_attention,
    open_training_data,
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
