"""Remote shard sets: the samples of local ones, one fetch per file, retries, and failures."""

import functools
import http.server
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest
import torch

from unite_fast.data_pipeline import Loader, open_source
from unite_fast.data_pipeline.shards import remote
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.errors import UserError

SIZE = 32

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    return tmp_path / "cache"


def open_(address):
    return open_source("shards", address, SIZE, "train")


def logged(folder, log):
    """An address that logs the file names it is asked for."""
    return f"pipe:echo {{}} >> {log}; cat {folder}/{{}}"


def names_fetched(log: Path) -> list[str]:
    return sorted(log.read_text().split())


def test_the_same_samples_as_local(shards, tmp_path):
    local = ShardSource(shards("raw"), SIZE)
    source = open_(f"pipe:cat {shards('raw')}/{{}}")
    assert source.name(3) == local.name(3)
    for actual, expected in zip(source.read(range(41)), local.read(range(41)), strict=True):
        assert torch.equal(actual, expected)


def test_a_command_is_printed_once(shards, caplog):
    address = f"pipe:cat {shards('raw')}/{{}}; : \x1b[2J"
    open_(address)
    open_(address)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "unite_fast.data"]
    assert repr(address.removeprefix("pipe:")) in message and message.isprintable()


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files; the first `faults` requests for a shard end in the middle."""

    faults = 0

    def copyfile(self, source, outputfile):
        if Server.faults and self.path.endswith(".tar"):
            Server.faults -= 1
            outputfile.write(source.read(1000))
        else:
            super().copyfile(source, outputfile)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(shards):
    handler = functools.partial(Server, directory=str(shards("raw")))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_broken_transfer_is_tried_again(server, shards, monkeypatch):
    monkeypatch.setattr(Server, "faults", 3)
    images, _ = open_(server).read(range(41))
    assert Server.faults == 0
    assert torch.equal(images, ShardSource(shards("raw"), SIZE).read(range(41))[0])


def test_a_missing_file_is_one_error_line(server, mentions):
    with pytest.raises(UserError, match=mentions("dataset.json", f"{server}/nowhere", 4)) as caught:
        open_(f"{server}/nowhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_order_goes_shard_by_shard_and_each_is_fetched_once(shards, tmp_path, workers):
    log = tmp_path / "log"
    source = open_(logged(shards("original"), log))
    with Loader(source, 1, 5, workers) as loader:
        epochs = [[int(next(loader).ids) for _ in range(41)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(41))
        visited = [int(source.shard_of[index]) for index in epoch]
        runs = [shard for place, shard in enumerate(visited) if place == 0 or visited[place - 1] != shard]
        assert sorted(runs) == list(range(5)), "one run of each shard"
    assert len(set(map(tuple, epochs))) == 3
    shard_names = [name for name in names_fetched(log) if name.endswith(".tar")]
    assert shard_names == [f"shard-{number:05d}.tar" for number in range(5)]


def test_only_needed_shards_are_fetched(shards, tmp_path):
    log = tmp_path / "log"
    source = open_(logged(shards("raw"), log))
    assert not [name for name in names_fetched(log) if name.endswith(".tar")]
    source.read([0])
    assert len([name for name in names_fetched(log) if name.endswith(".tar")]) == 1


def test_shards_are_fetched_ahead_of_need(shards, tmp_path):
    log = tmp_path / "log"
    source = open_(logged(shards("raw"), log))
    with Loader(source, 1, 0) as loader:
        first = int(source.shard_of[int(next(loader).ids)])
        source._fetcher.join(20)
    shard_names = [name for name in log.read_text().split() if name.endswith(".tar")]
    assert len(shard_names) == 5 and shard_names[0] == f"shard-{first:05d}.tar"


def _read_all(address, done):
    open_(address).read(range(41))
    done.put(True)


def test_processes_of_a_machine_fetch_each_file_once(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_CURRENT", 1e9)  # on a busy machine they may start further apart
    log = tmp_path / "log"
    address = logged(shards("raw"), log)
    fork = multiprocessing.get_context("fork")
    done = fork.Queue()
    processes = [fork.Process(target=_read_all, args=(address, done)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(names_fetched(log)) == len(set(names_fetched(log))) == 11


def test_ranks_share_batches_and_resume(shards):
    source = open_(f"pipe:cat {shards('raw')}/{{}}")
    with Loader(source, 8, 1) as whole:
        expected = [next(whole).ids for _ in range(12)]
    ranks = [Loader(source, 8, 1, rank=rank, world=4) for rank in range(4)]
    for ids in expected[:5]:
        assert torch.equal(torch.cat([next(loader).ids for loader in ranks]), ids)
    halves = [Loader(source, 8, 1, rank=rank, world=2) for rank in range(2)]
    for loader in halves:
        loader.load_state_dict(ranks[0].state_dict())
    for ids in expected[5:]:
        assert torch.equal(torch.cat([next(loader).ids for loader in halves]), ids)


def test_a_shard_whose_hash_is_wrong_is_never_used(shards, tmp_path, cache):
    copy = shutil.copytree(shards("raw"), tmp_path / "copy")
    for path in copy.glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        path.write_bytes(data)
    source = open_(f"pipe:cat {copy}/{{}}")
    with pytest.raises(UserError, match=r"shard-\d+\.tar.*[0-9a-f]{40}.*[0-9a-f]{40}") as caught:
        source.read([0])
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob("*.tar"))


def test_a_command_that_fails_after_its_output_is_an_error(shards, mentions):
    with pytest.raises(UserError, match=mentions("dataset.json", "false")):
        open_(f"pipe:cat {shards('raw')}/{{}}; false")


def test_a_pipe_address_without_braces_is_refused(mentions):
    with pytest.raises(UserError, match=mentions("pipe:cat shard.tar", "{}")):
        open_("pipe:cat shard.tar")


def test_an_address_is_quoted(tmp_path, mentions):
    with pytest.raises(UserError, match=mentions("dataset.json", "127.0.0.1:9")):
        open_(f"http://127.0.0.1:9/'; touch {tmp_path}/harm; '")
    assert not (tmp_path / "harm").exists()


def test_a_set_that_changed_is_fetched_again(shards, tmp_path, monkeypatch, caplog):
    """Into a folder of its own: a run that still reads the old set is not disturbed."""
    monkeypatch.setattr(remote, "_CURRENT", 0.0)
    copy = shutil.copytree(shards("raw"), tmp_path / "copy")
    before = open_(f"pipe:cat {copy}/{{}}")
    expected = before.read([0, 1])[0]
    shutil.rmtree(copy)
    shutil.copytree(shards("cropped-jpeg"), copy)
    after = open_(f"pipe:cat {copy}/{{}}")
    assert "changed" in caplog.text
    assert after.manifest.format == "cropped-jpeg"
    after.read(range(41))
    assert torch.equal(before.read([0, 1])[0], expected)
    # Both versions stay cached.
    shutil.rmtree(copy)
    shutil.copytree(shards("raw"), copy)
    assert open_(f"pipe:cat {copy}/{{}}").folder == before.folder


def test_without_the_address_the_cached_set_is_used_and_said(shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "_CURRENT", 0.0)
    copy = shutil.copytree(shards("raw"), tmp_path / "copy")
    open_(f"pipe:cat {copy}/{{}}").read(range(41))
    copy.rename(tmp_path / "gone")
    assert len(open_(f"pipe:cat {copy}/{{}}").read(range(41))[0]) == 41
    assert "using the cached set" in caplog.text


def test_a_transfer_without_an_end_is_ended(monkeypatch, mentions, cache):
    monkeypatch.setattr(remote, "_MOST_MANIFEST_BYTES", 2**21)
    with pytest.raises(UserError, match=mentions("dataset.json", "2,097,152")):
        open_("pipe:cat /dev/zero; true {}")
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 2**23


def test_a_page_in_place_of_the_manifest_does_not_replace_the_cached_one(
    shards, tmp_path, monkeypatch, caplog, mentions
):
    monkeypatch.setattr(remote, "_CURRENT", 0.0)
    copy = shutil.copytree(shards("raw"), tmp_path / "copy")
    before = open_(f"pipe:cat {copy}/{{}}")
    (copy / "dataset.json").write_text("<html>log in</html>")
    after = open_(f"pipe:cat {copy}/{{}}")
    assert after.folder == before.folder and len(after) == 41
    assert "no JSON" in caplog.text or "not JSON" in caplog.text
    with pytest.raises(UserError, match=mentions("dataset.json", "JSON", 4)):
        open_(f"pipe:echo page; true {copy} {{}}")


def test_an_encrypted_address_stays_one_when_the_server_redirects():
    source = object.__new__(remote.RemoteShardSource)
    for address, protocols in (("https://x/y/", "=https"), ("http://x/y", "=http,https")):
        source.address = address
        command = source._command("dataset.json")
        assert f"--proto {protocols} " in command and command.endswith(f" {address.rstrip('/')}/dataset.json")


def test_a_failed_transfer_is_one_short_reason(server):
    with pytest.raises(UserError, match="curl ended with status 22") as caught:
        open_(f"{server}/nowhere")
    assert "shell" not in str(caught.value) and len(str(caught.value)) < 200
