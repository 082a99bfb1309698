"""Process group: one process, or several that torchrun started together.

    rank 0    reads, finds the direction, checks the engine, broadcasts the job, scores its windows,
              chooses and writes
    rank r    receives the job, and scores windows r, r + N, r + 2N, …

Choices made here:
- a group of one process has nothing to send, and takes the same path;
- little is sent, over gloo, on a CPU and on GPUs alike;
- every process reads the whole pool and writes its own shards, so all must reach the pool and the
  run folder;
- when one process stops, all stop, and finished shards stay.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from prism_select.run.errors import PeerLost

__all__ = ["ProcessGroup", "is_main_process", "is_single_process", "process_group"]

Value = TypeVar("Value")
TIMEOUT = timedelta(days=30)


@dataclass(frozen=True)
class ProcessGroup:
    """Methods raise PeerLost when another process is gone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine

    def has(self, number: int) -> bool:
        """Whether the window of this number is for this process."""
        return number % self.size == self.rank

    def broadcast(self, value: Value) -> Value:
        """Sends a value from rank 0 to the other ranks, which call `receive`."""
        if self.size > 1:
            self._broadcast([value])
        return value

    def receive(self) -> Any:
        box = [None]
        self._broadcast(box)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank; waits until all have called it."""
        if self.size == 1:
            return [value]
        from torch import distributed

        box: list[Any] = [None] * self.size
        with _with_peers():
            distributed.all_gather_object(box, value)
        return box

    def _broadcast(self, box: list[Any]) -> None:
        from torch import distributed

        with _with_peers():
            distributed.broadcast_object_list(box, src=0)


@contextmanager
def _with_peers() -> Iterator[None]:
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
    """The group that torchrun started, or a group of this process alone."""
    if is_single_process():
        yield ProcessGroup()
        return
    from torch import distributed

    with _with_peers():
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        rank, size = distributed.get_rank(), distributed.get_world_size()
        yield ProcessGroup(rank, size, int(os.environ["LOCAL_RANK"]))
    finally:
        distributed.destroy_process_group()
