"""Starting and joining a group of ranks: devices, rendezvous after a restart, names of launches."""

import pytest
import torch

from unite_fast.distributed.launch import join_training
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError


def test_more_processes_than_cuda_devices_is_an_error(monkeypatch, mentions):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(UserError, match=mentions("2 processes", "1 CUDA")),
        join_training("cuda", 1),
    ):
        pass


def test_one_process_joins_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with join_training("cpu", 1) as (ranks, device, _):
        assert (ranks, device) == (Ranks(), torch.device("cpu"))
        assert ranks.main and not torch.distributed.is_initialized()
        assert ranks.gather("all") == ["all"]
