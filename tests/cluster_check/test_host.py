"""Facts of this machine."""

import json
import resource
import socket

import torch

from unite_fast.cluster_check.host import host_facts, rank_facts


def test_facts(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("HOME_TOKEN", "secret")
    facts = host_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["name"] == socket.gethostname()
    assert facts["descriptors"]["soft"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert facts["software"]["torch"] == torch.__version__
    assert facts["environment"]["NCCL_SOCKET_IFNAME"] == "eth7" and "HOME_TOKEN" not in facts["environment"]
    assert facts["master"]["name"] == "localhost" and facts["master"]["addresses"]
    assert facts["cores"] > 0 and facts["memory"] > 2**28


def test_devices(monkeypatch):
    assert rank_facts("cpu")["device"] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = rank_facts("cuda")
    assert missing["device"] == "" and "cuda" in missing["device_error"]
