"""Remote shard sets: each shard is fetched when first needed, then cached and read like a local one."""

import fcntl
import hashlib
import os
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
from unite_fast.data_pipeline.source import one_line
from unite_fast.errors import UserError
from unite_fast.randomness import permutation
from unite_fast.utils.files import writing

CACHE_VARIABLE = "UNITE_FAST_CACHE"
_TRIES = 4
_FETCHES_AT_ONCE = 8
# Give up on a connection that transfers nothing for a minute, and try again.
_CURL = "pipe:curl --fail --silent --show-error --location --connect-timeout 30 --speed-limit 1 --speed-time 60 "


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
        self._fetcher: threading.Thread | None = None
        cache = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/unite_fast").expanduser()
        folder = cache / hashlib.sha256(address.encode()).hexdigest()[:16]
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.fetch(folder / MANIFEST)
        indices = [index_path(folder / shard.name) for shard in read_manifest(folder / MANIFEST).shards]
        with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
            list(pool.map(self.fetch, indices))
        super().__init__(folder, image_size)

    def check_shard(self, path: Path, shard: Shard) -> None:
        if path.exists():
            super().check_shard(path, shard)

    def shard_path(self, number: int) -> Path:
        path = super().shard_path(number)
        self.fetch(path, self.manifest.shards[number])
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

    def fetch(self, target: Path, shard: Shard | None = None) -> None:
        """Fetch a file unless it exists. Only one process fetches it; the others wait.

        Raises:
            UserError: every try failed, or gave a file that differs from the manifest.
        """
        if target.exists():
            return
        reason: str | None = None
        with writing(target), _locked(target.with_name(target.name + ".lock")):
            for attempt in range(_TRIES):
                if target.exists():
                    return
                if attempt:
                    time.sleep(2**attempt / 2)
                reason = self._fetch_once(target, shard)
                if reason is None:
                    return
            raise UserError(f"cannot fetch {target.name} from {self.address} ({_TRIES} tries): {reason}")

    def _fetch_once(self, target: Path, shard: Shard | None) -> str | None:
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
            except (OSError, ValueError) as error:
                # An error of the disk has an errno, one of the command has none.
                if getattr(error, "errno", None) is not None:
                    raise
                return one_line(str(error))
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
        return _CURL + shlex.quote(f"{self.address.rstrip('/')}/{name}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Unlock explicitly: a process forked meanwhile keeps the file open.
            fcntl.flock(file, fcntl.LOCK_UN)
