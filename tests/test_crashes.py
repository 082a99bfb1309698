"""Whatever stops a run, nothing is lost and nothing is wrong: the same command ends with the same
scores."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Outcome, jsonl, prism

from prism_select.commands import steps
from prism_select.run.folder import Store
from prism_select.scoring import shards

ROWS = 23
WINDOW = 5
SMALL = f"""
import sys
from prism_select.cli import app
from prism_select.scoring import shards
shards.WINDOW = {WINDOW}
app.main(sys.argv[1:])
"""
GO_ON = "prism: interrupted; the same command goes on where it stopped\n"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WINDOW", WINDOW)


class Desk:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.out = folder, folder / "run"
        rows = [
            {"prompt": f"Question {row}?", "completion": f"Answer {row}"} for row in range(ROWS)
        ]
        self.pool = Path(jsonl(folder / "pool.jsonl", rows))
        pairs = [{"prompt": "Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"}] * 2
        self.words = ["--model", str(model), "--target", jsonl(folder / "pairs.jsonl", pairs)]

    def call(
        self, command: str = "score", out: Path | None = None, pool: Path | None = None
    ) -> Outcome:
        return prism(command, *self.words, "--pool", pool or self.pool, "--out", out or self.out)

    @property
    def shards(self) -> list[str]:
        return sorted(path.name[:8] for path in (self.out / "shards").iterdir())


@pytest.fixture
def desk(tmp_path: Path, plain_model: Path) -> Desk:
    return Desk(tmp_path, plain_model)


def scores(out: Path) -> pa.Table:
    return pq.read_table(out / "scores.parquet")


@contextmanager
def between(number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Just before shard `number` is written, something happens. Gives the numbers of the shards
    written."""
    written, write = list[int](), Store.write_shard

    def watched(store: Store, at: int, table: pa.Table, kind: str) -> Path:
        if at == number:
            act()
        place = write(store, at, table, kind)
        written.append(at)
        return place

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write_shard", watched)
        yield written


def stop() -> None:
    raise KeyboardInterrupt


def stopped(desk: Desk, number: int) -> None:
    with between(number, stop):
        assert desk.call().code == 130


@pytest.mark.parametrize("damage", ["a bit", "its end", "everything", "gone"])
def test_a_damaged_shard_is_found_and_scored_again(desk: Desk, damage: str) -> None:
    assert desk.call(out=desk.folder / "whole").code == 0
    stopped(desk, 3)
    shard = next((desk.out / "shards").glob("00000001-*"))
    content = shard.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    shard.write_bytes({"a bit": flipped, "its end": content[:-1]}.get(damage, b""))
    if damage == "gone":
        shard.unlink()
    with between(-1, stop) as written:
        outcome = desk.call()
    assert outcome.code == 0 and written == [1, 3, 4]
    assert ("damaged on the disk and are scored again: 1" in outcome.out) == (damage != "gone")
    assert scores(desk.out).equals(scores(desk.folder / "whole"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_process_with_130_and_one_line_and_loses_no_shard(
    desk: Desk, name: str
) -> None:
    assert desk.call(out=desk.folder / "whole").code == 0
    many = Path(jsonl(desk.folder / "many.jsonl", [desk.pool.read_text().splitlines()[0]] * 3000))
    words = ["score", *desk.words, "--pool", str(many), "--out", str(desk.out)]
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SMALL, *words], **pipes) as process:
        until = time.monotonic() + 240
        while len(list(desk.out.glob("shards/*.parquet"))) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        said = process.communicate(timeout=240)[1]
    assert process.returncode == 130 and said == GO_ON
    left = desk.shards
    assert 2 <= len(left) < 600 and left == [f"{number:08d}" for number in range(len(left))]
    outcome = subprocess.run(
        [sys.executable, "-c", SMALL, *words], capture_output=True, text=True, check=True
    )
    assert f"{len(left)} shards of {WINDOW} rows are there already" in outcome.stdout
    assert scores(desk.out).num_rows == 3000


def test_a_device_that_is_full_while_scoring_is_one_line_and_the_run_goes_on_when_there_is_room(
    desk: Desk,
) -> None:
    opening = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **named: Any) -> Any:
        full = path.match("00000002-*.part")
        return open("/dev/full", "wb") if full else opening(path, mode, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opened)
        outcome = desk.call()
    assert outcome.code == 2
    assert (
        outcome.err
        == f"prism: {desk.out}: no space left; free some and run the same command again\n"
    )
    assert desk.shards == ["00000000", "00000001"]
    with between(-1, stop) as written:
        assert desk.call().code == 0
    assert written == [2, 3, 4]


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system of its own, where one may be mounted."""
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", *options, "none", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_file_system_that_fills_up_while_scoring_leaves_a_run_that_goes_on(desk: Desk) -> None:
    with mounted(desk.folder / "disk", "-o", "size=1m") as disk:
        out, ballast = disk / "run", disk / "ballast"

        def fill() -> None:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(b"x" * 4096) == 4096:
                    pass

        with between(3, fill):
            outcome = desk.call(out=out)
        assert outcome.code == 2
        assert (
            outcome.err
            == f"prism: {out}: no space left; free some and run the same command again\n"
        )
        assert sorted(path.name[:8] for path in (out / "shards").iterdir()) == [
            f"{n:08d}" for n in range(3)
        ]
        ballast.unlink()
        with between(-1, stop) as written:
            assert desk.call(out=out).code == 0
        assert written == [3, 4] and scores(out).num_rows == ROWS


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Root may write everywhere but on a file system that is mounted for reading."""
    if os.geteuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    path = str(folder)
    outcome = subprocess.run(["mount", "--bind", path, path], capture_output=True)
    if outcome.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", path], check=True)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_pool_that_cannot_be_written_is_enough(desk: Desk) -> None:
    shelf = desk.folder / "shelf"
    shelf.mkdir()
    pool = Path(shutil.move(desk.pool, shelf))
    with read_only(shelf):
        assert desk.call("select", pool=pool).code == 0
    assert [path.name for path in shelf.iterdir()] == ["pool.jsonl"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    if begun:
        stopped(desk, 2)
    else:
        desk.out.mkdir()
    before = sorted(desk.out.rglob("*"))
    monkeypatch.setattr(steps, "load_model", lambda *_: stop())
    with read_only(desk.out):
        outcome = desk.call()
    assert outcome.code == 2 and outcome.err.startswith(f"prism: {desk.out}: cannot be written (")
    assert outcome.err.endswith("); give another --out\n") and sorted(desk.out.rglob("*")) == before


def test_a_pool_that_grows_while_it_is_scored_is_noticed_and_its_rows_are_not_kept(
    desk: Desk,
) -> None:
    def grow() -> None:
        with desk.pool.open("a") as file:
            file.write('{"prompt": "late", "completion": "row"}\n')

    with between(2, grow):
        outcome = desk.call()
    assert outcome.code == 2 and outcome.err == (
        f"prism: {desk.pool}: changed while the run was reading it; start afresh with --overwrite, "
        "on files that stay as they are\n"
    )
    assert (
        desk.shards == [f"{number:08d}" for number in range(3)]
        and not (desk.out / "manifest.json").exists()
    )
    outcome = desk.call()
    assert outcome.code == 2 and "belongs to another run: pool contents was" in outcome.err


def test_a_pool_whose_contents_change_behind_its_size_and_time_is_noticed_in_the_end(
    desk: Desk,
) -> None:
    def swap() -> None:
        times = desk.pool.stat()
        content = desk.pool.read_bytes()
        with desk.pool.open("r+b") as file:
            file.write(content.replace(b"Question 1?", b"question 1?"))
        os.utime(desk.pool, ns=(times.st_atime_ns, times.st_mtime_ns))

    with between(4, swap):
        outcome = desk.call()
    assert outcome.code == 2 and "changed while the run was reading it" in outcome.err
    assert not (desk.out / "shards").exists() and not (desk.out / "manifest.json").exists()


@pytest.mark.parametrize("left", [0, 10])
def test_a_pool_that_shrinks_while_rows_are_copied_is_noticed(desk: Desk, left: int) -> None:
    lines = desk.pool.read_text().splitlines(keepends=True)
    writing = Store.writing

    def shrink(store: Store, name: str) -> Any:
        if name == "selected.jsonl":
            desk.pool.write_text("".join(lines[:left]))
        return writing(store, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "writing", shrink)
        outcome = desk.call("select")
    assert outcome.code == 2 and "changed while the run was reading it" in outcome.err
    assert not (desk.out / "selected.jsonl").exists() and not (desk.out / "manifest.json").exists()


def test_what_a_killed_process_left_half_written_is_cleared(desk: Desk) -> None:
    stopped(desk, 2)
    (desk.out / "shards" / "00000002-feed.parquet.part").write_bytes(b"half")
    (desk.out / "scores.parquet.part").write_bytes(b"half")
    assert desk.call().code == 0
    assert not list(desk.out.rglob("*.part"))
    assert json.loads((desk.out / "manifest.json").read_text())["counts"]["scored"] == ROWS


def test_a_run_that_began_with_overwrite_goes_on_without_it(desk: Desk, tmp_path: Path) -> None:
    assert desk.call().code == 0
    words = [*desk.words, "--pool", desk.pool, "--out", desk.out]
    with between(2, stop):
        stopped = prism("score", *words, "--overwrite")
    assert stopped.code == 130
    assert (
        stopped.err
        == "prism: interrupted; the same command, without --overwrite, goes on where it stopped\n"
    )
    assert len(desk.shards) == 2
    with between(99, stop) as written:
        assert desk.call().code == 0
    assert written == [2, 3, 4]


def test_a_folder_that_was_half_cleared_for_a_new_start_is_still_a_runs(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert desk.call().code == 0
    words = [*desk.words, "--pool", desk.pool, "--out", desk.out, "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: stop())
        assert prism("score", *words).code == 130
    assert prism("score", *words).code == 0
