"""Hosts that were started in different ways do not train together: each difference is refused at the start, on all
hosts, with host, key and values.

`pytest tests/cluster --cluster` runs all of them; see test_faults.py.
"""

import re
import time
from pathlib import Path

import pytest

SECONDS = 20.0
"""From the start of the last rank to the end of all torchruns, on an idle machine."""
PATIENCE = 3
"""Factor on it for a busy one."""

DIFFERENCES = {
    "seed": ("seed=1", "seed", 1, 0),
    "rate": ("schedule.lr=1e-3", "schedule.lr", 0.001, 0.0025),
    "batch": ("train.batch_size=16", "train.batch_size", 16, 8),
    "ema": ("optim.ema_decay=0.9", "optim.ema_decay", 0.9, 0.99),
    "checkpoints": ("train.checkpoint_every=7", "train.checkpoint_every", 7, 10),
    "steps": ("train.steps=300", "train.steps", 300, 60),
    "strategy": ("parallel.strategy=fsdp", "parallel.strategy", "fsdp", "ddp"),
    "kernels": ("kernels=reference", "kernels", "reference", "auto"),
}


def assert_refused(job, table: list[dict], what: str, *tokens: object) -> None:
    """All torchruns end without a restart, and each host prints one line with all tokens."""
    job.wait(lambda: len(job.ranks()) == 2 or job.ended(), "the ranks")
    begun = time.monotonic()
    job.wait(job.errors, f"an error about {what}")
    named = time.monotonic() - begun
    job.wait_until_ended()
    seconds = time.monotonic() - begun
    table.append({"difference": what, "named": round(named, 1), "ended": round(seconds, 1), "line": job.errors()[0]})
    for number in (1, 2):
        lines = job.errors(number)
        assert lines, job.printed()
        assert all(re.search(rf"(?<![\w-]){re.escape(str(token))}(?!\w)", lines[0]) for token in tokens), (
            tokens,
            lines,
        )
        assert len(lines) == 1, f"restarted: {lines}"
    assert all(job.statuses()), "torchrun's status"
    assert job.step() == 0 and not list(job.folder.glob("checkpoints/*")), "it trained"
    assert seconds < PATIENCE * SECONDS, seconds


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.long] * (what != "rate")) for what in DIFFERENCES]
)
def test_another_setting_is_refused(make_hosts, make_job, table, what):
    setting, key, here, there = DIFFERENCES[what]
    job = make_job(make_hosts(2), "parallel.strategy=ddp")
    job.start(1)
    job.start(2, more=(setting,))
    assert_refused(job, table, what, key, here, there, "node1", "node2")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_one_image_fewer_is_refused(make_hosts, make_job, table, tmp_path):
    from PIL import Image

    for host in (1, 2):
        for number in range(20 - (host == 2)):
            file = tmp_path / f"images{host}" / f"class{number % 10}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 2 * number, 3)).save(file)
    job = make_job(make_hosts(2), "data.source=folder")
    for host in (1, 2):
        job.start(host, more=(f"data.path={tmp_path / f'images{host}'}",))
    assert_refused(job, table, "one image fewer", "node2")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_another_code_is_refused(make_hosts, make_job, table, tmp_path):
    import unite_fast

    package = Path(unite_fast.__file__).parent
    changed = tmp_path / "schedule.py"
    original = package / "optim" / "ema.py"
    changed.write_text(original.read_text() + "\n# changed\n")
    hosts = make_hosts(2)
    hosts.mount_file(2, changed, original)
    job = make_job(hosts)
    job.start(1, 2)
    assert_refused(job, table, "code", "node1", "node2")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_another_torch_is_refused(make_hosts, make_job, table, tmp_path):
    import torch.version

    changed = tmp_path / "version.py"
    original = Path(torch.version.__file__)
    changed.write_text(original.read_text().replace(f"'{torch.__version__}'", "'2.99.0'"))
    hosts = make_hosts(2)
    hosts.mount_file(2, changed, original)
    job = make_job(hosts)
    job.start(1, 2)
    assert_refused(job, table, "torch", "torch", "2.99.0", "node1", "node2")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_resume_on_one_host_only_is_refused(make_hosts, make_job, table):
    job = make_job(make_hosts(2))
    job.start(1)
    job.arguments.remove("--resume")
    job.start(2)
    assert_refused(job, table, "--resume", "--resume", "node1", "node2")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_wrong_setting_on_one_host_ends_all(make_hosts, make_job, table):
    """The host that cannot read its command never joins; the other one does not wait for it."""
    job = make_job(make_hosts(2))
    job.start(1)
    job.start(2, more=("train.bacth_size=8",))
    assert_refused(job, table, "a misspelt setting", "train.bacth_size")
    assert re.search("node2", job.errors(1)[0])


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("without", [1, 2])
def test_a_run_folder_that_is_not_shared_is_refused(make_hosts, make_job, table, without):
    hosts = make_hosts(2)
    job = make_job(hosts)
    hosts.hide(without, job.folder.parent)
    job.start(1, 2)
    assert_refused(job, table, f"no shared folder on node{without}", "node1", "node2", "train.out")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("debian", [False, True], ids=["names", "debians-names"])
def test_three_hosts_train(make_hosts, make_job, undisturbed, assert_same_run, debian):
    hosts = make_hosts(3, debian_names=debian)
    job = make_job(hosts, "train.batch_size=12", nodes="3")
    job.start(1, 2, 3)
    job.wait_until_ended()
    assert job.statuses() == [0, 0, 0], job.printed()
    assert job.errors() == []
    assert_same_run(job.folder, undisturbed(3, "train.batch_size=12"))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_hosts_of_two_ranks_train_with_hsdp(make_hosts, make_job, undisturbed, assert_same_run):
    hosts = make_hosts(2, debian_names=True)
    job = make_job(hosts, "parallel.strategy=hsdp", per_host=2)
    job.start(1, 2)
    job.wait_until_ended()
    assert job.statuses() == [0, 0], job.printed()
    assert_same_run(job.folder, undisturbed(4, "parallel.strategy=hsdp", nodes=2))
