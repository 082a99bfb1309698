"""Run folder: a file in it is complete or absent, because a draft is renamed into place.

    RUN/config.toml       written first; from then on another configuration is refused
    RUN/shards/*.parquet  scores of finished windows of the pool; gone when the run is complete
    RUN/manifest.json     written last; it marks the run as complete

Choices made here:
- a shard has the checksum of its contents in its name, so both appear at once; a shard with a
  wrong checksum counts as absent;
- a run that goes on under other versions of the libraries that make tokens is refused: half of its
  rows would be other tokens;
- a draft is always a new file, so no symbolic link is written through.
"""

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
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption, BadRow, DiskTrouble, RunMismatch
from prism_select.run.options import Mark, marked, to_toml
from prism_select.run.tensor_files import write_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FILES",
    "SHARD",
    "TOKEN_LIBRARIES",
    "Run",
    "Store",
    "bad_rows_of",
    "finite",
    "json_line",
    "libraries",
]

FILES = (
    "config.toml",
    "manifest.json",
    "pairs.parquet",
    "direction.safetensors",
    "scores.parquet",
    "selected.jsonl",
)
# What `overwrite` removes, in this order: config.toml goes last, because it marks a run's folder.
REMOVED = (
    *(name for name in FILES if name != "config.toml"),
    "selected.parquet",
    "removed.jsonl",
    "removed.parquet",
    "quarantine.jsonl",
    "report.html",
    "comparison.html",
    "shards",
    "adapter",
    "checkpoints",
    "evaluation",
    "config.toml",
)
TOKEN_LIBRARIES = ("transformers", "tokenizers")
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
        """Raises RunMismatch when the folder holds another run, and names the first difference. A
        folder with anything but a run in it is refused even with `overwrite`."""
        with self._disk():
            present = self._usable()
            earlier = self._earlier() if "config.toml" in present else {}
        is_run = "command" in earlier or all(
            name == "shards" or name.endswith(".part") for name in present
        )
        if not is_run:
            raise RunMismatch(
                f"{self.path} holds {present[0]} and no run; give an empty or new folder as --out"
            )
        if config.overwrite or not earlier:
            return
        defaults = {field.name: field.default for field in fields(config)}
        before = {**defaults, **earlier}
        after = {**defaults, **_flat(self._config_text(config, inputs))}
        # a model may have moved: its contents are compared, not its path; what is complete stays
        # so under other libraries
        free = (
            marked(type(config), Mark.MENDABLE)
            | {"model"}
            | ({"libraries"} if self.complete else set())
        )
        for name in ["command", *sorted((before.keys() | after.keys()) - free)]:
            if before.get(name) != after.get(name):
                was, here = _excerpts(_shown(before.get(name)), _shown(after.get(name)))
                raise RunMismatch(
                    f"{self.path} belongs to another run: {name} was {was} there and is {here} "
                    "here; use another --out, or --overwrite to start it afresh"
                )

    def with_first_day(self, config: ScoreConfig) -> ScoreConfig:
        """The config with the template date of the run that is in the folder, unless it has one."""
        if config.template_date or config.overwrite:
            return config
        with self._disk():
            if not (self.path / "config.toml").is_file():
                return config
            return replace(config, template_date=self._earlier().get("template_date"))

    def _usable(self) -> list[str]:
        """Names of the files in the folder. Raises BadOption when the path is not a folder, or when
        a symbolic link would carry files elsewhere, and OSError when it cannot be written."""
        nearest = next(
            path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path)
        )
        if nearest.is_symlink() and nearest == self.path:
            raise BadOption(
                f"--out {self.path}: a symbolic link; give the folder that it points to"
            )
        if not nearest.is_dir():
            raise BadOption(f"--out {self.path}: {nearest} is a file; give a folder")
        present = sorted(self.path.iterdir()) if nearest == self.path else []
        if linked := [path for path in present if path.is_symlink()]:
            raise BadOption(
                f"--out {self.path}: {linked[0].name} in it is a symbolic link; give another folder"
            )
        for folder in (nearest, self.shards):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                code = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
                raise OSError(code, os.strerror(code))
        return [path.name for path in present]

    def _earlier(self) -> Mapping[str, Any]:
        """Options and fingerprints in the folder's config.toml; empty when it is not a run's."""
        try:
            return _flat((self.path / "config.toml").read_text(encoding="utf-8"))
        except ValueError:  # neither UTF-8 nor TOML
            return {}

    def begin(self, config: ScoreConfig, inputs: Mapping[str, str]) -> None:
        """Makes the folder, and with `overwrite` removes an earlier run first. `inputs` are
        fingerprints by name."""
        with self._disk():
            if config.overwrite:
                for path in (self.path / name for name in REMOVED):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)
            self.shards.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.toml").exists():
            self.write("config.toml", self._config_text(config, inputs).encode())

    def make(self) -> None:
        with self._disk():
            self.path.mkdir(parents=True, exist_ok=True)

    def _config_text(self, config: ScoreConfig, inputs: Mapping[str, str]) -> str:
        prints = {"command": config.command, "libraries": libraries()}
        prints |= {f"{name} contents": value for name, value in inputs.items()}
        lines = [f"{json.dumps(name)} = {json.dumps(value)}\n" for name, value in prints.items()]
        options = to_toml(replace(config, overwrite=False))
        return f"{options}\n[fingerprints]\n{''.join(lines)}"

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
        """A draft to fill, renamed at the end of the block; an error leaves no file behind."""
        path = self.path / name
        draft = path.with_name(path.name + ".part")
        try:
            with self._disk():
                draft.unlink(missing_ok=True)
                with draft.open("xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def move_in(self, name: str, folder: Path) -> None:
        """Moves a folder from elsewhere, complete or not at all."""
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
        """NaN and infinity become null."""
        text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
        self.write(name, text.encode() + b"\n")

    def write_shard(self, number: int, table: pa.Table, kind: str = "") -> Path:
        """Each `kind` of shard has its own numbers; without a kind, windows of scores.parquet."""
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
        with self.writing(name) as file:
            write_tensors(file, tensors, metadata)

    def table_of(self, name: str, mark: str) -> pa.Table | None:
        """The table, if its metadata has this mark under `of`; else None."""
        if not (self.path / name).exists():
            return None
        table = pq.read_table(self.path / name)
        return table if (table.schema.metadata or {}).get(b"of") == mark.encode() else None

    def json_of(self, name: str, mark: str) -> dict[str, Any] | None:
        """The values, if they have this mark under `of`; else None."""
        path = self.path / name
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return values if values.get("of") == mark else None

    def present_shards(self, kind: str = "") -> dict[int, Path]:
        """Paths of the shards of a kind by number; the files are not read."""
        paths = sorted(self.shards.glob(f"{kind}{'[0-9]' * 8}-*.parquet"))
        return {int(path.name.partition("-")[0].removeprefix(kind)): path for path in paths}

    def sound_shards(self, kind: str = "") -> tuple[dict[int, Path], list[int]]:
        """The intact shards by number, and the numbers of damaged ones. Removes damaged shards and
        the drafts of a killed process."""
        present = self.present_shards(kind)
        with self._disk():
            for draft in self.shards.glob("*.part"):
                draft.unlink(missing_ok=True)
            damaged = [
                number
                for number, path in present.items()
                if _checksum(path.read_bytes()) not in path.name
            ]
            for number in damaged:
                present.pop(number).unlink()
        return present, damaged

    def drop_shards(self) -> None:
        shutil.rmtree(self.shards, ignore_errors=True)


class Run:
    """A complete run folder; each file is read when its property is used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def scores(self) -> pa.Table:
        """One row per row of the pool; the columns are described in the docs under "The run
        folder"."""
        return pq.read_table(self.path / "scores.parquet")

    def columns(self, *names: str) -> pa.Table:
        """These columns of the scores, if the run has them."""
        file = self.path / "scores.parquet"
        present = pq.read_schema(file).names
        return pq.read_table(file, columns=[n for n in dict.fromkeys(names) if n in present])

    @property
    def pairs(self) -> pa.Table:
        return pq.read_table(self.path / "pairs.parquet")

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "manifest.json").read_text(encoding="utf-8")))

    @property
    def selected(self) -> Iterator[dict[str, Any]]:
        """The selected rows, unchanged from the pool."""
        return self._rows("selected")

    @property
    def removed(self) -> Iterator[dict[str, Any]]:
        return self._rows("removed")

    @property
    def quarantine(self) -> Iterator[dict[str, Any]]:
        """Rows without a score: file, line, reason, raw."""
        return self._rows("quarantine")

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Of a file of JSON lines, or of Parquet."""
        if (table := self.path / f"{name}.parquet").exists():
            for batch in pq.ParquetFile(table).iter_batches(batch_size=256):
                yield from batch.to_pylist()
            return
        with (self.path / f"{name}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def finite(value: Any) -> Any:
    """The value for JSON: keys are texts, and NaN and infinity are null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def libraries() -> str:
    """The versions of the libraries that make tokens of a text."""
    return ", ".join(f"{name} {version(name)}" for name in TOKEN_LIBRARIES)


def bad_rows_of(shard: Path) -> list[BadRow]:
    """The rows of a shard without a score."""
    table = pq.ParquetFile(shard).read(
        ["file", "line", "reason"], use_threads=False
    )  # no thread for so little
    bad = table.filter(table["reason"].is_valid()).to_pylist()
    return [BadRow(row["file"], row["line"], row["reason"], "mend or remove it") for row in bad]


def json_line(row: Mapping[str, object]) -> bytes:
    """One line; lone surrogates are escaped, since UTF-8 cannot hold them."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _flat(text: str) -> Mapping[str, Any]:
    """Options and fingerprints of a config.toml side by side."""
    values = tomllib.loads(text)
    prints = values.pop("fingerprints", {})
    return {**prints, **values} if isinstance(prints, dict) else values


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, default=str, ensure_ascii=False)


def _excerpts(*texts: str) -> list[str]:
    """Long texts, cut around their first difference."""
    start = max(0, len(os.path.commonprefix(texts)) - 20)
    start = 0 if max(map(len, texts)) <= 60 else start
    shown = ["…" * (start > 0) + text[start:] for text in texts]
    return [text if len(text) <= 60 else text[:59] + "…" for text in shown]
