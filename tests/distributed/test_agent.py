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


@pytest.mark.parametrize(
    ("words", "variable", "place"),
    [
        (["torchrun", "--rdzv-endpoint", "node1:29500", "-m", "unite_fast"], "", ("node1", 29500)),
        (["torchrun", "--rdzv_endpoint=[fd00::1]:29500"], "", ("fd00::1", 29500)),
        (["torchrun", "--rdzv-endpoint=node1"], "other:1", ("node1", 29400)),
        (["torchrun"], "node1:29500", ("node1", 29500)),
        (["torchrun"], "[fd00::1]", ("fd00::1", 29400)),
        (["torchrun", "--rdzv-endpoint", "localhost:0"], "", None),
        (["torchrun", "--rdzv-endpoint", "node1:99999"], "", None),
        (["torchrun", "--rdzv-endpoint", "a:b:c"], "", None),
        (["torchrun", "--rdzv-endpoint"], "", None),
        (["torchrun"], "", None),
    ],
)
def test_the_place_where_torchruns_meet(monkeypatch, words, variable, place):
    files = {"cmdline": words, "environ": ["HOME=/root", *[f"PET_RDZV_ENDPOINT={variable}"] * bool(variable)]}
    monkeypatch.setattr(agent, "_read", lambda process, name: "\0".join([*files[name], ""]).encode())
    assert agent._meeting_place(7) == place


@pytest.mark.parametrize("answers", ["at once", "later", "never"])
def test_a_torchrun_whose_meeting_place_stays_silent_is_killed(
    torchrun_run, second_machine, monkeypatch, capfd, answers
):
    """In a fork whose parent is the agent. It is killed although it ignores SIGTERM."""
    monkeypatch.setattr(agent, "_meeting_place", lambda process: ("node1", 29400))
    limits = {"at once": 0, "later": agent.CUT_OFF, "never": float("inf")}
    monkeypatch.setattr(agent, "answers_within", lambda host, port, seconds: seconds >= limits[answers])
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            agent.end_agent_if_cut_off()
            os._exit(0)
        time.sleep(5 if answers == "never" else 1)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (-signal.SIGKILL if answers == "never" else 9)
    assert ("node1" in capfd.readouterr().err) == (answers != "at once")


def test_a_process_whose_torchrun_has_ended_is_an_orphan(torchrun_run, monkeypatch):
    monkeypatch.setattr(agent, "agent_process", lambda: 1)
    # In a container torchrun, or another launcher with PyTorch, may be the first process.
    for maps, orphan in ((b"/sbin/init", True), (b"/lib/libtorch_cpu.so", False), (b"", True)):
        monkeypatch.setattr(agent, "_read", lambda process, name, maps=maps: maps)
        assert agent.is_orphan() == orphan
    # Any other process may be a launcher of another kind.
    monkeypatch.setattr(agent, "agent_process", lambda: 7)
    assert not agent.is_orphan()


def test_only_a_process_that_has_loaded_pytorch_is_ended_as_the_agent(torchrun_run, monkeypatch):
    """A subreaper, such as a user's systemd, takes the place of a torchrun that has ended."""
    killed = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append(process))
    for maps in (b"/usr/lib/systemd/systemd", b"/lib/libtorch_cpu.so"):
        monkeypatch.setattr(agent, "_read", lambda process, name, maps=maps: maps if name == "maps" else b"")
        end_agent()
    assert killed == [os.getppid()]
