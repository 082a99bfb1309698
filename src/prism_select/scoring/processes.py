"""World: one process, or several that torchrun started together; one of a single process has
nothing to send.

    rank 0    reads, finds the direction, checks the engine, tells the others, scores its part, chooses and writes
    rank r    hears what there is to do, and scores the shards r, r + N, r + 2N, …

Choices made here: what is sent is small and goes over gloo, on a CPU and on GPUs alike; every
process reads the whole pool and writes its own shards, so the pool and the run folder must be where
all can reach them; when one stops, the others stop too, and what is scored by then stays."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from prism_select.run.errors import PeerLost

__all__ = ["ProcessGroup", "is_main_process", "is_single_process", "process_group"]

Value = TypeVar("Value")


PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class ProcessGroup:
    rank: int = 0
    size: int = 1
    local: int = 0  # which of the processes of this machine

    def has(self, number: int) -> bool:
        return number % self.size == self.rank

    def broadcast(self, value: Value) -> Value:
        """From rank 0 to all others, where `hear` returns it."""
        if self.size > 1:
            self._broadcast([value])
        return value

    def receive(self) -> Any:
        box = [None]
        self._broadcast(box)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """The values of all, by rank, once all are here."""
        if self.size == 1:
            return [value]
        from torch import distributed

        box: list[Any] = [None] * self.size
        with _together():
            distributed.all_gather_object(box, value)
        return box

    def _broadcast(self, box: list[Any]) -> None:
        from torch import distributed

        with _together():
            distributed.broadcast_object_list(box, src=0)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(
            "another process of this run stopped; the same command goes on where it stopped"
        ) from error


def is_single_process() -> bool:
    """Whether torchrun did not start this process."""
    return "TORCHELASTIC_RUN_ID" not in os.environ


def is_main_process() -> bool:
    """Whether this is the process that prints."""
    return is_single_process() or os.environ["RANK"] == "0"


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Raises PeerLost from its methods when another process is gone."""
    if is_single_process():
        yield ProcessGroup()
        return
    from torch import distributed

    with _together():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield ProcessGroup(
            distributed.get_rank(), distributed.get_world_size(), int(os.environ["LOCAL_RANK"])
        )
    finally:
        distributed.destroy_process_group()
