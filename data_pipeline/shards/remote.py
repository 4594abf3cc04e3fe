"""Remote shard sets: each shard is fetched when first needed, then cached and read like a local one."""

import fcntl
import hashlib
import logging
import os
import re
import shlex
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.data_pipeline.shards.manifest import MANIFEST, Shard, index_path, read_manifest
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.errors import UserError, one_line
from unite_fast.randomness import permutation
from unite_fast.utils.files import home_path, writing

CACHE_VARIABLE = "UNITE_FAST_CACHE"
_log = logging.getLogger("unite_fast.data")
_ANNOUNCED: set[str] = set()
"""Commands that this process has printed."""
_TRIES = 4
_FETCHES_AT_ONCE = 8
_CURRENT = 10.0
"""Seconds for which a fetched manifest counts as current: the processes of a machine start together."""
_MOST_MANIFEST_BYTES = 2**28
_MOST_INDEX_BYTES = 200
"""For the header, and for each sample; a line has about 80."""
# Give up on a connection that transfers next to nothing for a minute, and try again.
_CURL = "pipe:curl --fail --silent --show-error --location --connect-timeout 30 --speed-limit 1000 --speed-time 60 "


def is_remote(path: str) -> bool:
    return path.startswith(("pipe:", "https://", "http://"))


class RemoteShardSource(ShardSource):
    """A set at an address: https://HOST/FOLDER, or pipe:COMMAND, a command that writes file {} to its stdout.

    Fetched files are cached in a folder per address below $UNITE_FAST_CACHE (default ~/.cache/unite_fast), which all
    processes of a machine share.
    """

    def __init__(self, address: str, image_size: int):
        """
        Raises:
            UserError: see ShardSource; or a file cannot be fetched.
        """
        if address.startswith("pipe:") and "{}" not in address:
            raise UserError(f"the address {address} has no {{}}: write {{}} in place of the file name")
        self.address = address
        if address.startswith("pipe:") and address not in _ANNOUNCED:
            _ANNOUNCED.add(address)
            _log.warning("the data come from a command: %r", address.removeprefix("pipe:"))
        self._fetcher: threading.Thread | None = None
        cache = home_path(os.environ.get(CACHE_VARIABLE) or "~/.cache/unite_fast")
        folder = self._folder_now(cache / hashlib.sha256(address.encode()).hexdigest()[:16])
        shards = read_manifest(folder / MANIFEST).shards
        with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
            list(pool.map(lambda shard: self._fetch_index(folder, shard), shards))
        super().__init__(folder, image_size)

    def _folder_now(self, first: Path) -> Path:
        """The cache folder of the set as it is at the address now: its manifest is fetched at each start. A set that
        changed gets a folder of its own, because another process may still read the old one.

        Args:
            first: the folder of the first version; those of others have its name and a hash of their manifest.

        Raises:
            UserError: the manifest cannot be fetched, and none is cached.
        """
        with writing(first):
            first.mkdir(parents=True, exist_ok=True)
        with writing(first), _locked(first / "now.lock"):
            others = first.parent.glob(f"{first.name}-*/{MANIFEST}")
            known = [path for path in (first / MANIFEST, *others) if path.exists()]
            newest = max(known, key=lambda path: path.stat().st_mtime, default=None)
            if newest and time.time() - newest.stat().st_mtime < _CURRENT:
                return newest.parent
            fetched = first / "now" / MANIFEST
            fetched.parent.mkdir(exist_ok=True)
            reason = self._fetch_manifest(fetched, tries=1 if newest else _TRIES)
            if reason and newest is None:
                raise UserError(f"cannot fetch {MANIFEST} from {self.address} ({_TRIES} tries): {reason}")
            if newest and reason:
                _log.warning("cannot fetch %s from %s (%s): using the cached set", MANIFEST, self.address, reason)
                return newest.parent
            content = fetched.read_bytes()
            for path in known:
                if path.read_bytes() == content:
                    os.utime(path)
                    return path.parent
            if known:
                _log.warning("the set at %s changed since it was cached: fetching it again", self.address)
                first = first.with_name(f"{first.name}-{hashlib.sha256(content).hexdigest()[:16]}")
                first.mkdir(exist_ok=True)
            os.replace(fetched, first / MANIFEST)
            return first

    def _fetch_manifest(self, target: Path, tries: int) -> str | None:
        """Fetch the manifest; returns why that failed, or None. A page that says "not found" or "log in" may arrive in
        its place, and must not replace a cached one."""
        if reason := self._fetch(target, _MOST_MANIFEST_BYTES, tries=tries):
            return reason
        try:
            read_manifest(target)
        except UserError as error:
            target.unlink()
            return f"what arrived is not the manifest of a set ({error})"
        return None

    def _fetch_index(self, folder: Path, shard: Shard) -> None:
        self.fetch(index_path(folder / shard.name), _MOST_INDEX_BYTES * (1 + shard.samples))

    def check_shard(self, path: Path, shard: Shard) -> None:
        if path.exists():
            super().check_shard(path, shard)

    def shard_path(self, number: int) -> Path:
        path = super().shard_path(number)
        shard = self.manifest.shards[number]
        self.fetch(path, shard.bytes, shard)
        return path

    def order(self, seed: int, epoch: int) -> Tensor:
        """Shard by shard, shards and samples within a shard shuffled, so that few shards are needed at a time."""
        samples = permutation(seed, epoch, len(self))
        shards = permutation(seed, epoch, len(self.manifest.shards))
        if self._fetcher is None:
            self._fetcher = threading.Thread(
                target=self._fetch_ahead, args=(torch.argsort(shards).tolist(),), daemon=True
            )
            self._fetcher.start()
        # `shards` is the rank of each shard; a stable sort by rank keeps the samples within a shard shuffled.
        return samples[torch.argsort(shards[torch.from_numpy(self.shard_of)[samples]], stable=True)]

    def _fetch_ahead(self, numbers: list[int]) -> None:
        """Fetch the shards in the order of the run's first epoch. A failure here is silent: the shard is fetched again
        when it is needed, and a failure then is reported."""
        with suppress(UserError):
            for number in numbers:
                self.shard_path(number)

    def fetch(self, target: Path, most: int, shard: Shard | None = None) -> None:
        """Fetch a file unless it exists. Only one process fetches it; the others wait.

        Args:
            most: bytes that the file may have.
            shard: its entry in the manifest, with which it must agree.

        Raises:
            UserError: every try failed, or gave a file that differs from the manifest.
        """
        if target.exists():
            return
        with writing(target), _locked(target.with_name(target.name + ".lock")):
            if target.exists():
                return
            if reason := self._fetch(target, most, shard):
                raise UserError(f"cannot fetch {target.name} from {self.address} ({_TRIES} tries): {reason}")

    def _fetch(self, target: Path, most: int, shard: Shard | None = None, tries: int = _TRIES) -> str | None:
        """Fetch a file; returns why every try failed, or None."""
        reason = None
        for attempt in range(tries):
            if attempt:
                time.sleep(2**attempt / 2)
            reason = self._fetch_once(target, most, shard)
            if reason is None:
                return None
        return reason

    def _fetch_once(self, target: Path, most: int, shard: Shard | None) -> str | None:
        """Try to fetch a file; returns why that failed, or None."""
        from webdataset.gopen import gopen

        partial = target.with_name(target.name + ".partial")
        digest = hashlib.sha256()
        with open(partial, "wb") as out:
            try:
                with gopen(self._command(target.name)) as stream:
                    while chunk := stream.read(2**20):
                        digest.update(chunk)
                        out.write(chunk)
                        if out.tell() > most:
                            # Ending the transfer may be an error too, but this one says more.
                            raise ValueError
            except (OSError, ValueError) as error:
                if out.tell() > most:
                    return f"it has more than {most:,} bytes"
                # An error of the disk has an errno, one of the command has none.
                if getattr(error, "errno", None) is not None:
                    raise
                return _reason_of_command(str(error))
            size = out.tell()
        if shard is not None and size != shard.bytes:
            return f"it has {size} bytes, the manifest says {shard.bytes}"
        if shard is not None and digest.hexdigest() != shard.sha256:
            return f"its hash is {digest.hexdigest()}, the manifest says {shard.sha256}"
        os.replace(partial, target)
        return None

    def _command(self, name: str) -> str:
        if self.address.startswith("pipe:"):
            return self.address.replace("{}", name)
        # Also of what the server redirects to: an encrypted transfer stays one.
        protocols = "=https" if self.address.startswith("https:") else "=http,https"
        return f"{_CURL}--proto {protocols} " + shlex.quote(f"{self.address.rstrip('/')}/{name}")


def _reason_of_command(message: str) -> str:
    """webdataset's error, without the command and its arguments."""
    status = re.search(r": exit (-?\d+) ", message)
    name = "curl" if "curl " in message[:20] else "the command"
    return f"{name} ended with status {status[1]}; see what it printed" if status else one_line(message)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Unlock explicitly: a process forked meanwhile keeps the file open.
            fcntl.flock(file, fcntl.LOCK_UN)
