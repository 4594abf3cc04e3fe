"""Shard sets elsewhere: fetched one shard at a time when first needed, kept, and from then on read like local ones."""

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
from unite_fast.errors import UserError
from unite_fast.randomness import permutation
from unite_fast.utils.files import writing

CACHE_VARIABLE = "UNITE_FAST_CACHE"
_TRIES = 4
_FETCHES_AT_ONCE = 8
# A connection that stands still for a minute is given up and tried again, rather than waited for.
_CURL = "pipe:curl --fail --silent --show-error --location --connect-timeout 30 --speed-limit 1 --speed-time 60 "


def is_remote(path: str) -> bool:
    return path.startswith(("pipe:", "https://", "http://"))


class RemoteShardSource(ShardSource):
    """A set behind an address: https://HOST/FOLDER, or pipe:COMMAND with {} for the name of the file it writes out.

    What is fetched stays in a folder named for the address, below that named by the environment variable
    UNITE_FAST_CACHE (default: ~/.cache/unite_fast); all processes of a machine share it.
    """

    def __init__(self, address: str, image_size: int):
        """
        Raises:
            UserError: as ShardSource, or something cannot be fetched.
        """
        if address.startswith("pipe:") and "{}" not in address:
            raise UserError(f"the address {address} has no {{}}: write it where the name of a shard's file shall stand")
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
        """Shard after shard, both these and the samples within each shuffled, so that few are needed at a time."""
        place = permutation(seed, epoch, len(self))
        turn = permutation(seed, epoch, len(self.manifest.shards))
        if self._fetcher is None:
            self._fetcher = threading.Thread(
                target=self._fetch_ahead, args=(torch.argsort(turn).tolist(),), daemon=True
            )
            self._fetcher.start()
        return place[torch.argsort(turn[torch.from_numpy(self.shard_of)[place]], stable=True)]

    def _fetch_ahead(self, numbers: list[int]) -> None:
        """Fetch the shards in the order in which the first epoch of a run needs them. What fails here fails again, and
        is reported, when the shard is needed."""
        with suppress(UserError):
            for number in numbers:
                self.shard_path(number)

    def fetch(self, target: Path, shard: Shard | None = None) -> None:
        """Fetch a file unless it is there; one process at a time, the others wait for it.

        Raises:
            UserError: it cannot be had, or it is not what the manifest says, several times over.
        """
        if target.exists():
            return
        with writing(target), _locked(target.with_name(target.name + ".lock")):
            for attempt in range(_TRIES):
                if target.exists():
                    return
                if attempt:
                    time.sleep(2**attempt / 2)
                reason = self._fetch_once(target, shard)
            if reason:
                raise UserError(f"cannot fetch {target.name} from {self.address} ({_TRIES} tries): {reason}")

    def _fetch_once(self, target: Path, shard: Shard | None) -> str | None:
        """What went wrong, if anything did."""
        import webdataset

        partial = target.with_name(target.name + ".partial")
        digest = hashlib.sha256()
        with open(partial, "wb") as out:
            try:
                with webdataset.gopen(self._command(target.name)) as stream:
                    while chunk := stream.read(2**20):
                        digest.update(chunk)
                        out.write(chunk)
            except (OSError, ValueError) as error:  # of the command: what the disk refuses has an errno
                if getattr(error, "errno", None) is not None:
                    raise
                return " ".join(str(error).split())
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
            # Closing alone would not do where a process was forked meanwhile: it has the file open, too.
            fcntl.flock(file, fcntl.LOCK_UN)
