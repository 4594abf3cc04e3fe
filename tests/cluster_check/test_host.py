"""Facts of this machine."""

import json
import re
import resource
import socket

import torch

from unite_fast.cluster_check.host import host_facts, package_digest, rank_facts


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


def test_the_digest_is_that_of_the_files(tmp_path, monkeypatch):
    import unite_fast

    before = package_digest()
    assert re.fullmatch("[0-9a-f]{12}", before) and package_digest() == before
    (tmp_path / "more.py").write_text("")
    monkeypatch.setattr(unite_fast, "__path__", [*unite_fast.__path__, str(tmp_path)])
    added = package_digest()
    (tmp_path / "more.py").write_text("changed = True")
    assert len({before, added, package_digest()}) == 3
