"""Ray actors: they score the windows of a pool, each with a model of its own.

    this process    reads the pool, gives each free actor a window, and writes the tables that come
                    back as shards
    an actor        makes its scorer once, from the options and the directions, and turns windows
                    into tables

    resources of an actor   those of --runtime; without them a GPU and a CPU; without GPUs as many
                            CPUs as let the requested number of actors find room, and at most those
                            of the smallest machine
    number of actors        that of --runtime; without it as many as find room

Choices made here:
- Ray restarts an actor that dies, sends its window again and waits for machines;
- an actor has one window at a time, and none before it has started, so memory grows with the
  actors and not with the pool;
- a cluster that is smaller than planned only takes longer;
- tables come in any order;
- a Ray that this process has joined already is used, and stays running.
"""

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
from prism_select.run.config import RuntimeOptions, ScoreConfig
from prism_select.run.errors import BadOption, PeerLost, PrismError
from prism_select.run.progress import Progress, Silent, Task
from prism_select.scoring.processes import is_single_process
from prism_select.scoring.scorer import Scorer, TokenCounts, Window

__all__ = ["ActorPool", "actor_pool"]

# Ray's own words; other resources go by their names.
WORDS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
Resources = Mapping[str, float]


class ActorPool(TokenCounts):
    """`size` actors. Raises BadOption where there is no room for them, and none will come."""

    patience = 60.0  # seconds without a table, until that is reported; doubled each time

    def __init__(self, config: ScoreConfig, progress: Progress) -> None:
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.resources = resources_of(config, config.device, machines)
        self.actors, self.progress = list[Any](), progress
        room = sum(
            int(min(machine.get(name, 0) / n for name, n in self.resources.items()) + 1e-6)
            for machine in machines
        )
        self.size = config.actors or room
        grows = config.actors and config.ray_address
        if not grows and not 0 < self.size <= room:
            largest = {name: max(m.get(name, 0) for m in machines) for name in self.resources}
            number = f" and not for {config.actors}" if config.actors else ""
            raise BadOption(
                f"--runtime ray: there is room for {room} actors of {in_words(self.resources)}"
                f"{number}, with {in_words(largest)} in one machine at most; ask for less, as in "
                "--runtime ray:actors=1,CPU=1, or name a cluster that grows, as in --runtime "
                "ray:address=HOST:PORT,actors=4"
            )
        model = str(config.model)
        self.config = replace(
            config,
            model=os.path.abspath(model) if os.path.exists(model) else model,
            adapter=config.adapter and os.path.abspath(config.adapter),
            out=config.out and os.path.abspath(config.out),
            device="auto" if "GPU" in self.resources else "cpu",
            device_map=config.device_map if "GPU" in self.resources else "none",
        )
        short = f", {room} of which find room as the cluster is now" if room < self.size else ""
        progress.say(f"Ray: {self.size} actors of {in_words(self.resources)}{short}")

    def start(self, make_scorer: Callable[[], Scorer]) -> "ActorPool":
        """Starts the actors, in place of earlier ones; each calls `make_scorer`, also after a
        restart."""
        import ray

        self.kill()
        options = {
            word: self.resources.get(name, 0)
            for name, word in WORDS.items()
            if name in ("CPU", *self.resources)
        }
        custom = {name: value for name, value in self.resources.items() if name not in WORDS}
        actor = ray.remote(_Actor).options(
            **options, resources=custom, max_restarts=-1, max_task_retries=-1
        )
        self.box = [ray.put(make_scorer)]  # in a list it stays a reference, fetched when needed
        self.actors = [actor.remote() for _ in range(self.size)]
        return self

    def tables(
        self, windows: Iterable[Window], task: Task
    ) -> Iterator[tuple[Window, pa.Table | None]]:
        """Each window, with its table where it is to be scored, as they are finished. Raises what
        an actor raises."""
        from ray.util import ActorPool as RayPool

        pool, pending = RayPool(self.actors), dict[int, Window]()
        for _ in self.actors:
            pool.submit(lambda actor, _: actor.load.remote(self.box), None)
        for window in windows:
            if not window.to_score:
                yield window, None
                continue
            while not pool.has_free():
                yield from self._finished(pool, pending, task)
            pending[window.number] = window
            pool.submit(lambda actor, w: actor.score.remote(self.box, w), _without_text(window))
        while pending:
            yield from self._finished(pool, pending, task)

    def _finished(
        self, pool: Any, pending: dict[int, Window], task: Task
    ) -> Iterator[tuple[Window, pa.Table]]:
        """The next finished window; none where an actor has only started."""
        result = self._next(pool)
        if result is not None:
            number, table, sums = result
            window = pending.pop(number)
            self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
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
                reason = " ".join(str(error).split())[:300]
                raise PeerLost(
                    f"Ray gave an actor up: {reason}; the same command goes on where it stopped"
                ) from error
            except TimeoutError:
                self.progress.say(
                    f"nothing came from the actors for {self.patience:.0f} s: a model is loaded, a "
                    f"window is long, or Ray finds no room for {in_words(self.resources)}"
                )
                self.patience *= 2

    def kill(self) -> None:
        """Ends the actors at once."""
        import ray

        for actor in self.actors:
            ray.kill(actor)


class _Actor:
    """Makes its scorer when first needed, so that a problem with it is reported as any error is."""

    scorer: Scorer | None = None

    def load(self, box: Sequence[Any]) -> None:
        self._scorer(box)

    def score(self, box: Sequence[Any], window: Window) -> tuple[int, pa.Table, tuple[int, ...]]:
        """Number and table, and the sums of this window alone: Ray may ask for a window twice."""
        scorer = self._scorer(box)
        scorer.sums = (0, 0, 0, 0)
        with Silent().task("", None) as task:
            return window.number, scorer.table(window, task), scorer.sums

    def _scorer(self, box: Sequence[Any]) -> Scorer:
        import ray

        if self.scorer is None:
            self.scorer = ray.get(box[0])()
        return self.scorer


def resources_of(
    options: RuntimeOptions, device: str, machines: Sequence[Resources]
) -> Mapping[str, float]:
    """Resources of one actor, by Ray's names."""
    if options.resources:
        return options.resources
    if device != "cpu" and any(machine.get("GPU", 0) >= 1 for machine in machines):
        return {"GPU": 1, "CPU": 1}
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    fitting = (
        n
        for n in range(1, min(cores, default=0) + 1)
        if sum(count // n for count in cores) >= (options.actors or 0)
    )
    return {"CPU": max(fitting, default=1)}


def in_words(resources: Resources) -> str:
    return ",".join(f"{name}={value:g}" for name, value in resources.items())


def _without_text(window: Window) -> Window:
    """A window without what no score needs: the rows as they came."""
    rows = [(Raw(raw.file, raw.line, "", None), example) for raw, example in window.rows]
    return replace(window, rows=rows)


@contextmanager
def actor_pool(config: ScoreConfig, progress: Progress) -> Iterator[ActorPool | None]:
    """Actors for the length of the block with --runtime ray, else None. Raises BadOption without
    Ray, under torchrun, and where no cluster answers."""
    if not config.uses_ray:
        yield None
        return
    if not is_single_process():
        raise BadOption(
            "--runtime ray: Ray starts processes of its own; start this one without torchrun"
        )
    # Without it Ray prints among our lines what its log has too.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError:
        raise BadOption(
            "--runtime ray: Ray is not installed; pip install 'prism-select[ray]'"
        ) from None
    starts = not ray.is_initialized()
    pool: ActorPool | None = None
    try:
        if starts:
            _start_ray(config.ray_address)
        yield (pool := ActorPool(config, progress))
    finally:
        if starts:
            with _muted():
                ray.shutdown()  # the actors go with it
        elif pool:
            pool.kill()


@contextmanager
def _muted() -> Iterator[None]:
    """Discards standard error: Ray's C++ processes write there what fails while they end."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _start_ray(address: str | None) -> None:
    """Joins a cluster, or starts one on this machine. SIGTERM keeps the handler that it had: with
    Ray's own this process would end as if it had failed."""
    import ray
    from ray.exceptions import RayError

    named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    if named:
        _refuse_unreachable(named)
    handler = signal.getsignal(signal.SIGTERM)
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
        reason = " ".join(str(error).split())[:300]
        option = f"--runtime ray:address={address}" if address else "--runtime ray"
        raise BadOption(
            f"{option}: {reason}; check that a cluster of the same Ray runs there, and set "
            "RAY_AUTH_MODE=token in the environment if it asks for a token"
        ) from None
    finally:
        if handler and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _refuse_unreachable(address: str) -> None:
    """Raises BadOption where nothing listens: Ray would wait for it, and print."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError, ValueError) as error:
        reason = (
            "not host:port"
            if isinstance(error, ValueError | OverflowError)
            else error.strerror or error
        )
        raise BadOption(
            f"--runtime ray:address={address}: {reason}; give host:port of the cluster's head "
            "(6379 if nothing else was said), auto on one of its machines, or leave it out to "
            "start one here"
        ) from None
