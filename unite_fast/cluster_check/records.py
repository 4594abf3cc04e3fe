"""What was found about the hosts, in one place."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Finding(NamedTuple):
    kind: str
    """error or warning."""
    text: str


@dataclass
class Host:
    """What was found about a host; an empty dict was not measured. The keys are those of the functions that measure."""

    label: str
    ranks: list[int]
    facts: dict = field(default_factory=dict)
    devices: list[dict] = field(default_factory=list)
    folder: dict = field(default_factory=dict)
    clock: dict = field(default_factory=dict)
    link: dict = field(default_factory=dict)
    disk: dict = field(default_factory=dict)
    loaders: list[dict] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    """Local addresses of the first rank's connections."""

    @property
    def images_per_s(self) -> float:
        return sum(loader["rate"] for loader in self.loaders)


@dataclass
class Cluster:
    """The hosts, rank 0's first, and what was measured over all of them."""

    hosts: list[Host]
    recipe: str
    run_folder: str
    backend: str
    gradient_bytes: float
    state_bytes: float
    joined: bool = False
    all_reduce: list[dict] = field(default_factory=list)

    @property
    def world(self) -> int:
        return sum(len(host.ranks) for host in self.hosts)

    @property
    def several(self) -> bool:
        return len(self.hosts) > 1

    @property
    def gradient_seconds(self) -> float:
        """Seconds of one all-reduce of the gradients: between two sizes that were timed in proportion, above the
        largest at its speed; 0: unknown."""
        seconds, before, there = 0.0, 0, self.gradient_bytes
        for row in self.all_reduce:
            speed = (row["seconds"] - seconds) / (row["bytes"] - before)
            if row["bytes"] >= there:
                return seconds + max(speed, 0.0) * (there - before)
            seconds, before = row["seconds"], row["bytes"]
        return seconds * there / before if before else 0.0


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
