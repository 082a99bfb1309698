"""Cluster: actors of Ray score the windows of a pool, each with a model of its own.

    leader    reads the pool, gives each actor that is free a window, and writes the tables that come back as shards
    actor     makes its scorer once, from the options and the directions, and turns windows into tables

    an actor takes    what it is told; or a GPU and a processor; or where there are no GPUs c processors: the most with
                      which as many actors as are told find room, but no more than the smallest
                      machine has
    actors            as many as are told, or as find room

Choices made here: Ray restarts an actor that dies, sends its window again and waits for machines;
nothing of the kind is done here. One window is with an actor at a time, and none with one that has
not come up yet, so memory grows with the actors and not with the pool, and a cluster that is
smaller than hoped for only takes longer. Tables come in any order. Where this process has joined a
Ray already, that one is used, and left running."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from prism_select.data.records import Raw
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption, PeerLost, PrismError
from prism_select.run.progress import Progress, Silent, Task
from prism_select.scoring.processes import is_single_process
from prism_select.scoring.scorer import Scorer, TokenCounts, Window

__all__ = ["ActorPool", "hired"]

WORDS = {
    "CPU": "num_cpus",
    "GPU": "num_gpus",
    "memory": "memory",
}  # Ray's own; others are resources by their names


class ActorPool(TokenCounts):
    """`size` actors, who come when there is work. Raises BadOption where none could."""

    patience = 60.0  # seconds in which nothing comes, until that is told; doubled each time

    def __init__(self, config: ScoreConfig, progress: Progress) -> None:
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.needs, self.hands, self.progress = needs_of(config, machines), list[Any](), progress
        room = sum(
            int(min(each.get(name, 0) / n for name, n in self.needs.items()) + 1e-6)
            for each in machines
        )
        self.size = config.actors or room
        grows = config.actors and config.ray_address
        if not grows and not 0 < self.size <= room:
            most = {name: max(each.get(name, 0) for each in machines) for name in self.needs}
            asked = f" and not for {config.actors}" if config.actors else ""
            raise BadOption(
                f"--runtime ray: there is room for {room} actors of {in_words(self.needs)}{asked}, with "
                f"{in_words(most)} in one machine at most; ask for less with --actor-resources or --actors, or name a "
                "cluster that grows with --ray-address, and --actors"
            )
        self.config = replace(
            config,
            model=os.path.abspath(config.model) if os.path.exists(config.model) else config.model,
            adapter=config.adapter and os.path.abspath(config.adapter),
            out=config.out and os.path.abspath(config.out),
            device="auto" if "GPU" in self.needs else "cpu",
        )
        short = f", {room} of which find room as the cluster is now" if room < self.size else ""
        progress.say(f"Ray: {self.size} actors of {in_words(self.needs)}{short}")

    def at_work(self, make: Callable[[], Scorer]) -> "ActorPool":
        """With `make` where every actor finds it, also after a restart."""
        import ray

        known = {
            word: self.needs.get(name, 0)
            for name, word in WORDS.items()
            if name in ("CPU", *self.needs)
        }
        others = {name: value for name, value in self.needs.items() if name not in WORDS}
        hand = ray.remote(_Hand).options(
            **known, resources=others, max_restarts=-1, max_task_retries=-1
        )
        self.box = [ray.put(make)]  # in a list it goes as it is: Ray fetches it when asked to
        self.hands = [hand.remote() for _ in range(self.size)]
        return self

    def tables(
        self, windows: Iterable[Window], task: Task
    ) -> Iterator[tuple[Window, pa.Table | None]]:
        """Each window, with its table where it is wanted; these come as they are done. Raises what
        an actor raises."""
        from ray.util import ActorPool as RayPool

        pool, given = RayPool(self.hands), dict[int, Window]()
        for _ in self.hands:
            pool.submit(lambda hand, _: hand.load.remote(self.box), None)
        for window in windows:
            if not window.wanted:
                yield window, None
                continue
            while not pool.has_free():
                yield from self._done(pool, given, task)
            given[window.number] = window
            pool.submit(lambda hand, window: hand.score.remote(self.box, window), _bare(window))
        while given:
            yield from self._done(pool, given, task)

    def _done(
        self, pool: Any, given: dict[int, Window], task: Task
    ) -> Iterator[tuple[Window, pa.Table]]:
        """The next window that is done; none where it is an actor that has come up."""
        found = self._next(pool)
        if found is not None:
            number, table, sums = found
            window, self.sums = (
                given.pop(number),
                [a + b for a, b in zip(self.sums, sums, strict=True)],
            )
            task.advance(len(window.rows), sums[1])
            yield window, table

    def _next(self, pool: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        while True:
            try:
                return pool.get_next_unordered(timeout=self.patience)
            except RayTaskError as error:
                raise error.cause from (None if isinstance(error.cause, PrismError) else error)
            except RayActorError as error:
                told = " ".join(str(error).split())[:300]
                raise PeerLost(
                    f"Ray gave an actor up: {told}; the same command goes on where it stopped"
                ) from error
            except TimeoutError:
                self.progress.say(
                    f"nothing came from the actors for {self.patience:.0f} s: a model is loaded, a window is long, or "
                    f"Ray finds no room for {in_words(self.needs)}"
                )
                self.patience *= 2

    def dismiss(self) -> None:
        """Whatever they are at."""
        import ray

        for hand in self.hands:
            ray.kill(hand)


class _Hand:
    """An actor. Its scorer is made when first asked for: what is wrong with it is then told as any
    other error."""

    scorer: Scorer | None = None

    def load(self, box: Sequence[Any]) -> None:
        self._scorer(box)

    def score(self, box: Sequence[Any], window: Window) -> tuple[int, pa.Table, tuple[int, ...]]:
        """With the sums of this window alone, since Ray may ask for one twice."""
        scorer = self._scorer(box)
        scorer.sums = (0, 0, 0, 0)
        with Silent().task("", None) as nothing:
            return window.number, scorer.table(window.places, window.rows, nothing), scorer.sums

    def _scorer(self, box: Sequence[Any]) -> Scorer:
        import ray

        if self.scorer is None:
            self.scorer = ray.get(box[0])()
        return self.scorer


def needs_of(config: ScoreConfig, machines: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """What an actor takes, by Ray's names."""
    if config.resources:
        return config.resources
    if config.device != "cpu" and any(each.get("GPU", 0) >= 1 for each in machines):
        return {"GPU": 1, "CPU": 1}
    cores = [int(each["CPU"]) for each in machines if each.get("CPU", 0) >= 1]
    enough = (
        c
        for c in range(1, min(cores, default=0) + 1)
        if sum(n // c for n in cores) >= config.actors
    )
    return {"CPU": max(enough, default=1)}


def in_words(needs: Mapping[str, float]) -> str:
    return ",".join(f"{name}={value:g}" for name, value in needs.items())


def _bare(window: Window) -> Window:
    """Without what no score needs: the rows as they came."""
    return replace(
        window, rows=[(Raw(raw.file, raw.line, "", None), example) for raw, example in window.rows]
    )


@contextmanager
def hired(config: ScoreConfig, progress: Progress) -> Iterator[ActorPool | None]:
    """A crew for as long as the block takes, where Ray is asked for. Raises BadOption without Ray,
    under torchrun, and where no cluster answers."""
    if config.runtime != "ray":
        yield None
        return
    if not is_single_process():
        raise BadOption(
            "--runtime ray: Ray starts processes of its own; start this one without torchrun"
        )
    os.environ.setdefault(
        "RAY_DEDUP_LOGS_SKIP_REGEX", "."
    )  # it would print among our lines what its log has too
    try:
        import ray
    except ImportError:
        raise BadOption(
            "--runtime ray: Ray is not installed; pip install 'prism-select[ray]'"
        ) from None
    ours = not ray.is_initialized()
    crew: ActorPool | None = None
    try:
        if ours:
            _start(config.ray_address)
        yield (crew := ActorPool(config, progress))
    finally:
        if ours:
            with _mute():
                ray.shutdown()  # the actors go with it
        elif crew:
            crew.dismiss()


@contextmanager
def _mute() -> Iterator[None]:
    """Nothing gets to standard error: Ray's parts in C++ write there what fails while they end."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _start(address: str) -> None:
    """Joins a cluster, or starts one on this machine, in silence. A polite kill keeps the answer
    that it had: Ray's own would end this process as if it had failed."""
    import ray
    from ray.exceptions import RayError

    named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    if named:
        _refuse_silence(named)
    polite = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
    except SystemExit:
        raise KeyboardInterrupt from None
    except (ConnectionError, RuntimeError, RayError) as error:
        why = " ".join(str(error).split())[:300]
        option = f"--ray-address {address}" if address else "--runtime ray"
        raise BadOption(
            f"{option}: {why}; check that a cluster of the same Ray runs there, and set RAY_AUTH_MODE=token in the "
            "environment if it asks for a token"
        ) from None
    finally:
        if polite and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, polite)


def _refuse_silence(address: str) -> None:
    """Raises BadOption where nothing listens: Ray would wait for it, aloud."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError, ValueError) as error:
        why = (
            "not host:port"
            if isinstance(error, ValueError | OverflowError)
            else error.strerror or error
        )
        raise BadOption(
            f"--ray-address {address}: {why}; give host:port of the cluster's head (6379 if nothing else was said), "
            "auto on one of its machines, or leave it out to start one here"
        ) from None
