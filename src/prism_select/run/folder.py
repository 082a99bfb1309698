"""Store: the run folder. A file is complete or absent: it is written beside its place and renamed
into it.

RUN/config.toml      first of all; another configuration is refused from then on
RUN/shards/*.parquet scores of finished windows of the pool; gone when the run is complete
RUN/manifest.json    last of all; a run folder that has one is complete

Choices made here: a shard carries the checksum of its contents in its name, so that both appear at
once; one that no longer agrees with its name counts as absent. A draft is made anew under its name,
so that no link is written through."""

import errno
import hashlib
import json
import math
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.run.config import MENDABLE, ScoreConfig
from prism_select.run.errors import BadOption, BadRow, DiskTrouble, RunMismatch
from prism_select.run.options import to_toml

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FILES", "SHARD", "Run", "Store", "bad_rows_of", "finite", "json_line"]

FILES = (
    "config.toml",
    "manifest.json",
    "pairs.parquet",
    "direction.safetensors",
    "scores.parquet",
    "selected.jsonl",
)


DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
}


SHARD = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("score", pa.float64()),
        ("score_per_token", pa.float64()),
        ("tokens", pa.int32()),
        ("length", pa.int32()),
        ("loglik", pa.float64()),
        ("score_chosen", pa.float64()),
        ("score_rejected", pa.float64()),
        ("truncated", pa.bool_()),
        ("reason", pa.string()),
    ]
)


class Store:
    """One run folder. Making the object touches nothing; `begin` does."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.shards = self.path / "shards"

    @property
    def complete(self) -> bool:
        return (self.path / "manifest.json").exists()

    def refuse_others(self, config: ScoreConfig, inputs: Mapping[str, str]) -> None:
        """Raises RunMismatch, naming what differs, when the folder holds another run; then `begin`
        may not follow. A folder with something else in it is refused even with `overwrite`."""
        with self._disk():
            present = self._usable()
            then = self._earlier() if "config.toml" in present else {}
        ours = "command" in then or all(
            name == "shards" or name.endswith(".part") for name in present
        )
        if not ours:
            raise RunMismatch(
                f"{self.path} holds {present[0]} and no run; give an empty or new folder as --out"
            )
        if config.overwrite or not then:
            return
        now = _flat(self._config_text(config, inputs))
        then = {
            **{f.name: f.default for f in fields(config) if f.name not in then},
            **then,
        }  # of an older version
        # of a model the contents are compared, wherever it lies
        for name in ["command", *sorted((then.keys() | now.keys()) - MENDABLE - {"model"})]:
            if then.get(name) != now.get(name):
                was, here = _apart(
                    *(
                        json.dumps(each.get(name), default=str, ensure_ascii=False)
                        for each in (then, now)
                    )
                )
                raise RunMismatch(
                    f"{self.path} belongs to another run: {name} was {was} there and is {here} here; use another "
                    "--out, or --overwrite to start it afresh"
                )

    def _usable(self) -> list[str]:
        """What is in the folder already. Raises BadOption where it is no folder, or a link stands
        in it or for it: what is written must end up where the user looks. Raises OSError where
        nothing may be written."""
        there = next(
            path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path)
        )
        if there.is_symlink() and there == self.path:
            raise BadOption(
                f"--out {self.path}: a symbolic link; give the folder that it points to"
            )
        if not there.is_dir():
            raise BadOption(f"--out {self.path}: {there} is a file; give a folder")
        present = sorted(self.path.iterdir()) if there == self.path else []
        if linked := [path for path in present if path.is_symlink()]:
            raise BadOption(
                f"--out {self.path}: {linked[0].name} in it is a symbolic link; give another folder"
            )
        for folder in (there, self.shards):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                code = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
                raise OSError(code, os.strerror(code))
        return [path.name for path in present]

    def _earlier(self) -> Mapping[str, Any]:
        """What the folder's config.toml says; nothing where it is no run's."""
        try:
            return _flat((self.path / "config.toml").read_text(encoding="utf-8"))
        except ValueError:  # neither UTF-8 nor TOML
            return {}

    def begin(self, config: ScoreConfig, inputs: Mapping[str, str]) -> None:
        """Makes the folder; with `overwrite` on, removes an earlier run first. `inputs` are
        fingerprints."""
        with self._disk():
            if config.overwrite and self.path.exists():
                for name in (  # config.toml goes last: it tells whose folder this is
                    *(name for name in FILES if name != "config.toml"),
                    "removed.jsonl",
                    "quarantine.jsonl",
                    "report.html",
                    "comparison.html",
                    "curvature.safetensors",
                    "layers.parquet",
                ):
                    (self.path / name).unlink(missing_ok=True)
                for name in ("shards", "adapter", "evaluation"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
                (self.path / "config.toml").unlink(missing_ok=True)
            self.shards.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.toml").exists():
            self.write("config.toml", self._config_text(config, inputs).encode())

    def make(self) -> None:
        with self._disk():
            self.path.mkdir(parents=True, exist_ok=True)

    def _config_text(self, config: ScoreConfig, inputs: Mapping[str, str]) -> str:
        prints = {
            "command": config.command,
            **{f"{name} contents": value for name, value in inputs.items()},
        }
        lines = [f"{json.dumps(name)} = {json.dumps(value)}" for name, value in prints.items()]
        return (
            to_toml(replace(config, overwrite=False))
            + "\n[fingerprints]\n"
            + "\n".join(lines)
            + "\n"
        )

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskTrouble(
                    f"{self.path}: no space left; free some and run the same command again"
                ) from error
            why = error.strerror or str(error)
            raise DiskTrouble(
                f"{self.path}: cannot be written ({why}); give another --out"
            ) from error

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A draft to fill, renamed into place at the end of the block; an error leaves nothing."""
        place = self.path / name
        draft = place.with_name(place.name + ".part")
        try:
            with self._disk():
                draft.unlink(missing_ok=True)
                with draft.open("xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(place)
        finally:
            draft.unlink(missing_ok=True)

    def move_in(self, name: str, folder: Path) -> None:
        """A folder from elsewhere, whole or not at all."""
        draft = self.path / f"{name}.part"
        with self._disk():
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(folder, draft)
            draft.replace(self.path / name)
        shutil.rmtree(folder)

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as file:
            file.write(content)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A number that is NaN or infinite, and so has no value, becomes null."""
        text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
        self.write(name, text.encode() + b"\n")

    def write_shard(self, number: int, table: pa.Table, kind: str = "") -> Path:
        """Those of a `kind` are numbered apart; without one they are windows of scores.parquet."""
        with pa.BufferOutputStream() as buffer:
            pq.write_table(table, buffer)
            content = buffer.getvalue().to_pybytes()
        name = f"shards/{kind}{number:08d}-{_checksum(content)}.parquet"
        self.write(name, content)
        return self.path / name

    def write_table(self, name: str, table: pa.Table) -> None:
        with self.writing(name) as file:
            pq.write_table(table, file)

    def write_tensors(
        self, name: str, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]
    ) -> None:
        """As safetensors.torch.save, which holds two more copies of all of them; the widest first,
        as it wants them."""
        import torch

        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        header, end = dict[str, Any]({"__metadata__": dict(metadata)}), 0
        for key, value in ordered:
            end, start = end + value.numel() * value.element_size(), end
            header[key] = {
                "dtype": DTYPES[str(value.dtype)],
                "shape": list(value.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with self.writing(name) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, value in ordered:
                file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def table_of(self, name: str, mark: str) -> pa.Table | None:
        """A table that was written with this mark as its metadata `of`; None for none, or another
        one."""
        if not (self.path / name).exists():
            return None
        table = pq.read_table(self.path / name)
        return table if (table.schema.metadata or {}).get(b"of") == mark.encode() else None

    def json_of(self, name: str, mark: str) -> dict[str, Any] | None:
        """Values that were written with this mark as their key `of`; None for none, or others."""
        place = self.path / name
        told = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
        return told if told.get("of") == mark else None

    def present_shards(self, kind: str = "") -> dict[int, Path]:
        """The shards of a kind that are there, by number, unread."""
        found = sorted(self.shards.glob(f"{kind}{'[0-9]' * 8}-*.parquet"))
        return {int(path.name.partition("-")[0].removeprefix(kind)): path for path in found}

    def sound_shards(self, kind: str = "") -> tuple[dict[int, Path], list[int]]:
        """The shards whose contents are as they were written, and the numbers of those that were
        not: they are removed. Drafts that a killed process left go too."""
        present = self.present_shards(kind)
        with self._disk():
            for draft in self.shards.glob("*.part"):
                draft.unlink(missing_ok=True)
            damaged = {
                n: path
                for n, path in present.items()
                if _checksum(path.read_bytes()) not in path.name
            }
            for path in damaged.values():
                path.unlink()
        return {number: path for number, path in present.items() if number not in damaged}, list(
            damaged
        )

    def drop_shards(self) -> None:
        shutil.rmtree(self.shards, ignore_errors=True)


class Run:
    """A complete run folder, read when asked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def scores(self) -> pa.Table:
        """One row per row of the pool; the columns are described in the docs under "The run
        folder"."""
        return pq.read_table(self.path / "scores.parquet")

    def columns(self, *names: str) -> pa.Table:
        """Those of the scores that are there."""
        there = pq.read_schema(self.path / "scores.parquet").names
        return pq.read_table(
            self.path / "scores.parquet", columns=[n for n in dict.fromkeys(names) if n in there]
        )

    @property
    def pairs(self) -> pa.Table:
        return pq.read_table(self.path / "pairs.parquet")

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "manifest.json").read_text(encoding="utf-8")))

    @property
    def selected(self) -> Iterator[dict[str, Any]]:
        """The kept rows, as they came."""
        return self._rows("selected.jsonl")

    @property
    def removed(self) -> Iterator[dict[str, Any]]:
        return self._rows("removed.jsonl")

    @property
    def quarantine(self) -> Iterator[dict[str, Any]]:
        """Rows that could not be scored: file, line, reason, raw."""
        return self._rows("quarantine.jsonl")

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        with (self.path / name).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def finite(value: Any) -> Any:
    """As JSON has it: names are texts, and a number that is NaN or infinite is null."""
    if isinstance(value, Mapping):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bad_rows_of(shard: Path) -> list[BadRow]:
    """The rows of a shard that have no score."""
    table = pq.ParquetFile(shard).read(
        ["file", "line", "reason"], use_threads=False
    )  # no thread for so little
    bad = table.filter(table["reason"].is_valid()).to_pylist()
    return [BadRow(row["file"], row["line"], row["reason"], "mend or remove it") for row in bad]


def json_line(row: Mapping[str, object]) -> bytes:
    """What no UTF-8 can say is escaped."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _flat(text: str) -> Mapping[str, Any]:
    """Options and fingerprints of a config.toml side by side."""
    values = tomllib.loads(text)
    prints = values.pop("fingerprints", {})
    return {**prints, **values} if isinstance(prints, dict) else values


def _apart(*texts: str) -> list[str]:
    """Texts cut to where they differ."""
    start = max(0, len(os.path.commonprefix(texts)) - 20)
    start = 0 if max(map(len, texts)) <= 60 else start
    shown = ["…" * (start > 0) + text[start:] for text in texts]
    return [text if len(text) <= 60 else text[:59] + "…" for text in shown]
