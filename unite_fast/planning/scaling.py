"""Hours by number of GPUs: of the recipe's batch, and of a batch that grows with the GPUs."""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd

from unite_fast.config import Config
from unite_fast.planning.assumptions import Cluster
from unite_fast.planning.gpus import GPU
from unite_fast.planning.predict import Plan, make_plan

LEAST_IMAGES = 8
"""Images per GPU and step, below which optimizer, communication and launches take most of a step."""
LEAST_SAVING = 0.1
"""Hours that twice as many GPUs must save, as a share; else they stop falling."""
MOST_NODES = 128


@dataclass(frozen=True)
class Scale:
    """Plans for 1, 2, 4, ... nodes."""

    plans: list[Plan]

    @property
    def best(self) -> tuple[int, int]:
        """GPUs beyond which hours stop falling, at the fast and the slow end; 0: more than the plans have."""
        return self._best(0), self._best(1)

    def _best(self, end: int) -> int:
        for plan, doubled in pairwise(self.plans):
            if doubled.hours[end] > (1 - LEAST_SAVING) * plan.hours[end]:
                return plan.cluster.gpus
        return 0


def by_nodes(config: Config, gpu: GPU, gpus_per_node: int, grow: bool = False) -> Scale:
    """Plans for 1, 2, 4, ... nodes.

    Args:
        grow: each GPU gets at least `LEAST_IMAGES` images; epochs stay. Otherwise the numbers of nodes end where the
            batch cannot be divided.
    """
    clusters = [Cluster(gpu, 2**k, gpus_per_node) for k in range(MOST_NODES.bit_length())]
    if grow:
        return Scale([make_plan(grown(config, cluster.gpus), cluster) for cluster in clusters])
    clusters = [cluster for cluster in clusters if config.train.batch_size % cluster.gpus == 0]
    return Scale([make_plan(config, cluster) for cluster in clusters])


def grown(config: Config, gpus: int) -> Config:
    """The recipe with at least `LEAST_IMAGES` per GPU, and as many images in all."""
    train = config.train
    batch = gpus * max(LEAST_IMAGES, -(-train.batch_size // gpus))
    # Counted in steps of the old batch, so that Config makes the same number of images of it.
    schedule = replace(config.schedule, unit=train.batch_size, steps=train.steps)
    micro = gcd(batch // gpus, train.micro_batch) if train.micro_batch else 0
    return replace(config, schedule=schedule, train=replace(train, batch_size=batch, steps=0, micro_batch=micro))
