"""torchrun's agent: its process, and the names of launches."""

import os
import signal
import time

import pytest

from unite_fast.distributed import agent
from unite_fast.distributed.agent import agent_process, end_agent, launch_name


@pytest.fixture
def torchrun_run(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")


def test_a_launch_without_a_name_is_identified_by_its_parent_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_name().endswith(f"-{os.getppid()}")


def test_without_torchrun_there_is_no_agent(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert agent_process() == 0
    end_agent()


def test_the_agent_is_the_nearest_ancestor_that_is_no_child_of_torchrun(torchrun_run, monkeypatch):
    assert agent_process() == os.getppid()
    # Scripts between torchrun and this process have its variables.
    chain = {os.getppid(): 40, 40: 30, 30: 1}
    monkeypatch.setattr(agent, "_has_run_id", lambda process: process != 30)
    monkeypatch.setattr(agent, "_parent", chain.__getitem__)
    assert agent_process() == 30


def test_variables_and_parent_of_a_process_are_read_from_proc():
    assert agent._parent(os.getpid()) == os.getppid()
    assert not agent._has_run_id(os.getpid())
    assert agent._parent(2**30) == 0


@pytest.mark.parametrize(("count", "ends"), [("1", True), ("3", False)])
def test_the_agent_is_ended_while_it_would_restart(torchrun_run, monkeypatch, count, ends):
    """In a fork whose parent is the agent."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            end_agent()
            os._exit(0)
        time.sleep(1 if ends else 0.3)
        os._exit(9)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (-signal.SIGTERM if ends else 9)
