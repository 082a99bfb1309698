"""Actors of Ray score as one process does, whatever becomes of them."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import Outcome, jsonl, prism

from prism_select.commands import pipeline, scoring_steps
from prism_select.run.config import RuntimeOptions
from prism_select.run.errors import Unreachable
from prism_select.run.folder import Store
from prism_select.scoring import shards
from prism_select.scoring.ray_actors import _muted, resources_of
from prism_select.scoring.scorer import Window

ROWS, WINDOW = 48, 5
APART = f"""
import sys
from prism_select.cli import app
from prism_select.scoring import shards
shards.WINDOW = {WINDOW}
app.main(sys.argv[1:])
"""
RAY = ("--runtime", "ray:actors=2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a small one that this process has joined."""
    polite = signal.getsignal(signal.SIGTERM)
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
    )
    signal.signal(signal.SIGTERM, polite)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


class Desk:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.out, self.single = folder, folder / "run", folder / "single"
        rows: list[dict[str, object]] = [
            {"prompt": f"Question {row}?", "completion": f"Answer {row}"} for row in range(ROWS)
        ]
        rows[17], rows[21] = (
            {"prompt": "nothing"},
            rows[20],
        )  # a bad one, and one that repeats another
        pairs = [{"prompt": "Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"}] * 2
        pool, target = jsonl(folder / "pool.jsonl", rows), jsonl(folder / "pairs.jsonl", pairs)
        self.words = ["--model", str(model), "--pool", pool, "--target", target, "--max-bad", "5%"]

    def score(self, *words: object) -> Outcome:
        return prism("score", *self.words, "--out", self.out, *words)

    def matches(self) -> bool:
        """Whether the run has the scores of a single process."""
        assert prism("score", *self.words, "--out", self.single).code == 0
        return alike(self.out, self.single)


def alike(run: Path, single: Path) -> bool:
    ours, theirs = (pq.read_table(out / "scores.parquet") for out in (run, single))
    assert ours.schema == theirs.schema and ours.num_rows == ROWS
    for name in ours.column_names:
        if ours.schema.field(name).type != "double":
            assert ours[name].equals(theirs[name])
            continue
        a, b = (np.asarray(table[name].to_numpy(), dtype=np.float64) for table in (ours, theirs))
        if not np.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True):
            return False
    return True


@pytest.fixture
def desk(tmp_path: Path, plain_model: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(shards, "WINDOW", WINDOW)
    return Desk(tmp_path, plain_model)


def test_two_actors_give_the_files_of_one_process(cluster: str, desk: Desk) -> None:
    single, both = desk.folder / "single", desk.folder / "both"
    for out, words in ((single, ()), (both, RAY)):
        outcome = prism("select", *desk.words, "--budget", "20%", "--out", out, *words)
        assert outcome.code == 0 and not outcome.err, outcome.err
    assert "Ray: 2 actors of CPU=1" in outcome.out and "1 rows repeat another" in outcome.out
    assert alike(both, single) and {path.name for path in both.iterdir()} == {
        path.name for path in single.iterdir()
    }
    for name in ("selected.jsonl", "quarantine.jsonl", "direction.safetensors", "pairs.parquet"):
        assert (both / name).read_bytes() == (single / name).read_bytes()
    ours, theirs = (json.loads((out / "manifest.json").read_text()) for out in (both, single))
    assert ours["counts"] == theirs["counts"] and ours["padding"] == theirs["padding"]
    assert ours["actual"]["tokens"] == theirs["actual"]["tokens"]
    again = prism("select", *desk.words, "--budget", "20%", "--out", both, *RAY)
    assert again.code == 0 and "is complete already" in again.out


def made(change: Callable[[Any], None]) -> Callable[..., Any]:
    """A maker of scorers that are changed where an actor makes them."""
    real = scoring_steps.make_scorer

    def make(*arguments: Any) -> Any:
        scorer = real(*arguments)
        change(scorer)
        return scorer

    return make


def test_an_actor_that_is_killed_in_the_middle_loses_nothing(
    cluster: str, desk: Desk, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    alive = desk.folder / "alive"
    alive.touch()

    def mortal(scorer: Any) -> None:
        table = scorer.table

        def dies_once(window: Window, task: Any) -> Any:
            if window.number == 4 and alive.exists():
                alive.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return table(window, task)

        scorer.table = dies_once

    written, write = list[int](), Store.write_shard

    def counted(store: Store, number: int, table: pa.Table, kind: str) -> Path:
        written.append(number)
        return write(store, number, table, kind)

    ahead, windows = list[int](), shards.windows_of

    def watched(*arguments: Any) -> Iterator[Window]:
        for window in windows(*arguments):
            ahead.append(window.number - len(written))
            yield window

    monkeypatch.setattr(shards, "windows_of", watched)
    monkeypatch.setattr(pipeline, "make_scorer", made(mortal))
    monkeypatch.setattr(Store, "write_shard", counted)
    outcome = desk.score(*RAY)
    assert outcome.code == 0 and not outcome.err, outcome.err
    assert not alive.exists() and sorted(written) == list(range(10))
    assert max(ahead) == 2  # no more of the pool is in memory than two actors have, and the next
    assert capfd.readouterr().err == ""
    assert desk.matches()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            Unreachable("reverse", ["a.b"], "never called"),
            2,
            "prism: engine reverse cannot reach a.b: never called;",
        ),
        (
            ArithmeticError("seven"),
            1,
            "prism: a defect of prism: ArithmeticError: seven; add --debug",
        ),
    ],
)
def test_what_goes_wrong_in_an_actor_is_the_line_that_it_would_be_here(
    cluster: str,
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    message: str,
) -> None:
    def fails(_: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "make_scorer", made(fails))
    outcome = desk.score("--runtime", "ray:actors=1")
    assert outcome.code == code and outcome.err.startswith(message) and outcome.err.count("\n") == 1


def test_a_run_that_is_stopped_goes_on_with_another_runtime(
    cluster: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Store.write_shard

    def stops(store: Store, number: int, table: pa.Table, kind: str) -> Path:
        if len(store.present_shards()) == 3:
            raise KeyboardInterrupt
        return write(store, number, table, kind)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_shard", stops)
        outcome = desk.score(*RAY)
    assert (
        outcome.code == 130
        and outcome.err == "prism: interrupted; the same command goes on where it stopped\n"
    )
    outcome = desk.score("--dry-run", *RAY)
    assert outcome.code == 0 and "for the whole run" in outcome.out
    outcome = desk.score()
    assert outcome.code == 0 and f"3 shards of {WINDOW} rows are there already" in outcome.out
    assert desk.matches()


def test_actors_score_with_an_adapter_of_the_run_and_find_a_folder_by_its_relative_name(
    cluster: str, desk: Desk, plain_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_model.parent)
    desk.words[1] = plain_model.name
    assert prism("score", *desk.words, "--warmup", "20%", "--out", desk.single).code == 0
    assert desk.score("--warmup", "20%", *RAY).code == 0
    assert alike(desk.out, desk.single)


def test_an_actor_that_finds_no_room_holds_nothing_up(cluster: str, desk: Desk) -> None:
    outcome = desk.score("--runtime", f"ray:address={cluster},actors=2,CPU=2")
    assert (
        outcome.code == 0
        and "Ray: 2 actors of CPU=2, 1 of which find room as the cluster is now" in outcome.out
    )
    assert desk.matches()


def apart(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APART, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(result: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Waits for a result that is true."""
    end = time.monotonic() + 240
    while not (value := result()) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    return value


def title(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:  # it ended since it was listed, or nobody has waited for it yet
        return ""


def actors(begins: str = "ray::_Actor") -> list[psutil.Process]:
    """Processes of the cluster that this one started."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if title(process).startswith(begins)
    ]


def test_a_cluster_of_its_own_is_silent_and_goes_with_the_run(desk: Desk) -> None:
    with apart("score", *desk.words, "--out", desk.out, "--runtime", "ray:actors=1") as process:
        assert until(lambda: list(desk.out.glob("shards/*.parquet")), process)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=240)
    assert (
        process.returncode == 130
        and err == "prism: interrupted; the same command goes on where it stopped\n"
    )
    assert (
        "(raylet)" not in out
        and len(started) > 2
        and not psutil.wait_procs(started, timeout=120)[1]
    )


def test_what_is_written_while_ray_ends_is_no_line_of_ours(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with _muted():
        os.write(2, b"Failed to push error to driver\n")
    os.write(2, b"prism: interrupted\n")
    assert capfd.readouterr().err == "prism: interrupted\n"


def test_another_s_cluster_stays_and_a_lost_actor_is_no_word_in_the_output(
    cluster: str, desk: Desk
) -> None:
    with apart(
        "score",
        *desk.words,
        "--out",
        desk.out,
        "--runtime",
        f"ray:address={cluster},actors=2",
        "--json",
    ) as process:
        lost = until(lambda: actors("ray::_Actor."), process)  # at work
        lost[0].kill()
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "Ray: 2 actors of CPU=1" in err and "(raylet)" not in err
    assert json.loads(out)["counts"]["read"] == ROWS
    assert ray.nodes()[0]["Alive"] and not psutil.wait_procs(actors(), timeout=120)[1]
    assert desk.matches()


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        *(
            (runtime, f"{runtime}: unknown; try local, ray or ray:actors=4,GPU=1")
            for runtime in ("spark", "Ray", "rays:actors=2", "local:actors=2", "actors=2")
        ),
        *(
            (f"ray:{words}", f"ray:{words}: not NAME=NUMBER above 0; try ray:actors=4,GPU=1,CPU=4")
            for words in ("actors=-1", "actors=0", "CPU", "CPU=no", "CPU=0", "GPU=nan", "address=")
        ),
    ],
)
def test_a_runtime_that_cannot_be_is_refused(desk: Desk, runtime: str, message: str) -> None:
    outcome = desk.score("--runtime", runtime)
    assert outcome.code == 2 and outcome.err == f"prism: --runtime {message}\n"
    assert not desk.out.exists()


def test_settings_of_ray_follow_its_name() -> None:
    options = RuntimeOptions(runtime="ray:address=[::1]:6379, actors=4,GPU=0.5")
    assert options.uses_ray and options.ray_address == "[::1]:6379" and options.actors == 4
    assert options.resources == {"GPU": 0.5}
    for runtime in ("ray", "ray:", "local"):
        options = RuntimeOptions(runtime=runtime)
        assert options.uses_ray == (runtime != "local") and not options.resources
        assert options.ray_address is None and options.actors is None


def test_an_address_where_no_cluster_answers_is_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        silent = f"127.0.0.1:{free.getsockname()[1]}"
        outcome = desk.score("--runtime", f"ray:address={silent}")
    assert outcome.code == 2 and outcome.err.startswith(
        f"prism: --runtime ray:address={silent}: Connection refused; give host:port"
    )
    for odd in ("here", "127.0.0.1", "host:port", "http://host:8265/"):
        outcome = desk.score("--runtime", f"ray:address={odd}")
        assert outcome.code == 2 and outcome.err.startswith(
            f"prism: --runtime ray:address={odd}: not host:port; give host:port"
        )


def test_without_ray_and_under_torchrun_the_runtime_is_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        outcome = desk.score("--runtime", "ray")
    assert outcome.code == 2
    assert (
        outcome.err
        == "prism: --runtime ray: Ray is not installed; pip install 'prism-select[ray]'\n"
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("RANK", "0")
    outcome = desk.score("--runtime", "ray")
    assert outcome.code == 2
    assert (
        outcome.err
        == "prism: --runtime ray: Ray starts processes of its own; start this one without "
        "torchrun\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "CPU=3,magic=1",
            "0 actors of CPU=3,magic=1, with CPU=2,magic=0 in one machine at most; ask for less",
        ),
        (
            "actors=3,CPU=1",
            "2 actors of CPU=1 and not for 3, with CPU=2 in one machine at most; ask for less",
        ),
    ],
)
def test_actors_for_which_there_will_be_no_room_are_refused(
    cluster: str, desk: Desk, words: str, message: str
) -> None:
    outcome = desk.score("--runtime", f"ray:{words}")
    assert outcome.code == 2 and outcome.err.startswith(
        f"prism: --runtime ray: there is room for {message}"
    )


@pytest.mark.parametrize(
    ("machines", "device", "runtime", "resources"),
    [
        ([{"CPU": 8}], "auto", "ray", {"CPU": 8}),
        ([{"CPU": 8}], "auto", "ray:actors=3", {"CPU": 2}),
        ([{"CPU": 8}], "auto", "ray:actors=9", {"CPU": 1}),
        ([{"CPU": 8}, {"CPU": 6}, {}], "auto", "ray", {"CPU": 6}),
        ([{"CPU": 8}, {"CPU": 6}], "auto", "ray:actors=3", {"CPU": 4}),
        ([], "auto", "ray:actors=3", {"CPU": 1}),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], "auto", "ray", {"CPU": 1, "GPU": 1}),
        ([{"CPU": 8, "GPU": 2}], "cpu", "ray", {"CPU": 8}),
        ([{"CPU": 8, "GPU": 2}], "auto", "ray:GPU=0.5, tpu = 1", {"GPU": 0.5, "tpu": 1}),
    ],
)
def test_an_actor_takes_a_gpu_or_an_even_share_of_a_machine(
    machines: list[dict[str, float]],
    device: str,
    runtime: str,
    resources: dict[str, float],
) -> None:
    assert resources_of(RuntimeOptions(runtime=runtime), device, machines) == resources
