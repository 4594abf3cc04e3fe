"""Networks that fail for a while, or are slow, and jobs whose number of hosts changes.

`pytest tests/cluster --cluster` runs them; see test_faults.py.
"""

import time

import pytest

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]


@pytest.mark.parametrize(("host", "seconds"), [(2, 10), (2, 30), (1, 30)])
def test_an_outage_of_the_network_ends_as_if_undisturbed(
    make_hosts, make_job, undisturbed, assert_same_run, table, host, seconds
):
    """A short one is waited for; after a longer one, torchrun starts the ranks again."""
    job = make_job(make_hosts(2))
    job.start(1, 2)
    job.wait(lambda: job.step() >= 13, "step 13")
    old, begun = job.ranks(), time.monotonic()
    row = {"fault": f"outage of {seconds} s on node{host}", "phase": "step", "at step": job.step()}
    table.append(row)
    job.hosts.link(host, up=False)
    time.sleep(seconds)
    job.hosts.link(host, up=True)
    job.wait(lambda: job.step() > row["at step"] + 1 or job.finished(), "a new row")
    row["trains again"] = round(time.monotonic() - begun, 1)
    row["restarts"] = sum(command.printed().count("steps ") for command in job.commands) - 1
    row["line"] = " / ".join(job.errors())
    job.wait_until_ended()
    row["statuses"] = job.statuses()
    assert job.finished(), job.printed()
    assert_same_run(job.folder, undisturbed(2))
    row["same run"] = "yes"
    assert job.statuses() == [0, 0], job.printed()
    if seconds < 20:
        assert not job.errors() and set(old) == {0, 1}


def test_a_slow_network_is_slow_and_no_failure(make_hosts, make_job, undisturbed, assert_same_run, table):
    """100 ms each way, and one packet of twenty is lost."""
    steps = "train.steps=4"
    job = make_job(make_hosts(2, delay=0.1, loss=0.05), steps)
    begun = time.monotonic()
    job.start(1, 2)
    job.wait_until_ended(limit=900)
    table.append(
        {"fault": "100 ms, 5 % loss", "ended": round(time.monotonic() - begun, 1), "line": job.printed()[-3000:]}
    )
    assert job.statuses() == [0, 0], job.printed()
    assert "network: " in job.printed(), "most of a step is spent there"
    assert_same_run(job.folder, undisturbed(2, steps))


def test_a_job_of_one_or_two_hosts(make_hosts, make_job, table):
    """torchrun --nnodes 1:2: a host leaves for good, and another comes. The batch is split anew; the run goes on from
    its checkpoint."""
    job = make_job(make_hosts(2), nodes="1:2")
    job.start(1, 2)
    job.wait(lambda: job.step() >= 13, "step 13")
    row, begun = {"fault": "--nnodes 1:2, a host leaves", "at step": job.step()}, time.monotonic()
    table.append(row)
    job.hosts.power_off(2)
    job.wait(lambda: len(job.starts()) > 1, "a start with one host")
    row["trains again"] = round(time.monotonic() - begun, 1)
    begun = time.monotonic()
    job.start(job.hosts.add())
    job.wait(lambda: len(job.starts()) > 2 or job.ended(1), "a start with the new host")
    table.append(
        {
            "fault": "--nnodes 1:2, a host comes",
            "at step": job.step(),
            "trains again": round(time.monotonic() - begun, 1),
        }
    )
    job.wait_until_ended(1)
    table[-1]["line"] = " / ".join(job.errors())
    assert job.finished(), job.printed()
