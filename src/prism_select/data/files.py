"""Files: what a user names → files → rows as they came, one at a time.

    find_files   patterns → files   folders, globs, addresses and hub names; each file once
    read_rows    a file → its rows  with file and line; a bad row has the reason
    read_texts   a file → texts     the same rows as bytes, for copying
    rows_at      a file → some rows the others are not parsed where the format allows that

Choices made here:
- one row is held at a time (of a table, one small batch), whatever the size of the file;
- the ending decides how a file is read; a .json file by its first character;
- a folder of `save_to_disk` gives the files that its state.json names, and a folder with several
  splits is refused; a file that is named itself is read, whatever it is called;
- a pointer of Git LFS is refused: its rows are elsewhere;
- rows of files have their line; rows of a table (parquet, hub) have their number, rows of an
  object in memory their index from 0.
"""

import glob
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence, Set
from functools import cache

from prism_select.data.csv_rows import csv_rows
from prism_select.data.json_rows import json_array, json_lines, json_row_of_line
from prism_select.data.object_rows import is_typed, object_rows, object_rows_at
from prism_select.data.records import Raw, is_text
from prism_select.data.remote import addresses, is_remote, local
from prism_select.data.streams import (
    CHUNK_BYTES,
    DAMAGED_ADVICE,
    bounded_row,
    numbered_lines,
    open_stream,
    reading,
)
from prism_select.data.table_rows import (
    arrow_file_rows,
    arrow_file_rows_at,
    hub_rows,
    parquet_rows,
    parquet_rows_at,
)
from prism_select.run.errors import BadFile
from prism_select.run.objects import MEMORY, is_object

__all__ = [
    "SUPPORTED_ENDING",
    "files_without_rows",
    "find_files",
    "is_table",
    "names_of",
    "read_rows",
    "read_texts",
    "readable",
    "rows_at",
]

SUPPORTED_ENDING = re.compile(
    r"\.(?:(jsonl|json|csv)(?:\.(?:gz|zst))?|(parquet|arrow))$", re.IGNORECASE
)
SAVED = ("state.json", "dataset_info.json")  # beside the rows of a data set on the disk
METADATA = {*SAVED, "dataset_infos.json", "dataset_dict.json"}
_ADVICE = (
    "supported are .jsonl, .json and .csv (also with .gz or .zst), .parquet, .arrow and "
    "hub:NAME[:split]"
)
_POINTERS = {  # how a file begins that stands for another one
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS: git lfs pull",
    b"/annex/objects/": "a pointer of git-annex: git annex get .",
}
_SHARD = re.compile(r"(?:data-[0-9]{5}-of-[0-9]{5}|dataset)\.arrow")
_TABLES = {
    "hub": hub_rows,
    "parquet": parquet_rows,
    "arrow": arrow_file_rows,
    "object": object_rows,
}
_TABLES_AT = {
    "parquet": parquet_rows_at,
    "arrow": arrow_file_rows_at,
    "object": object_rows_at,
}


def find_files(patterns: Sequence[str]) -> list[str]:
    """The files of all patterns, each once, in the order of the patterns and sorted within one.

    A folder gives its supported files at any depth, but no hidden ones, and no metadata of a data
    set. Raises BadFile for a pattern that reaches nothing, a folder with several splits, an ending
    that is not supported and a file that cannot be read."""
    files: dict[str, str] = {}
    for pattern in patterns:
        named = pattern.startswith("hub:") or is_object(pattern)
        for file in [pattern] if named else _matches(pattern):
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def files_without_rows(patterns: Sequence[str]) -> list[str]:
    """The files of folders and globs that `find_files` passes over."""
    unread = list[str]()
    for pattern in patterns:
        if not pattern.startswith("hub:") and not is_object(pattern):
            listed = _listed(pattern)
            unread += sorted(listed - _with_rows(listed, pattern))
    return unread


def _matches(pattern: str) -> list[str]:
    listed = _listed(pattern)
    _refuse_splits(pattern, listed)
    usable = sorted(_with_rows(listed, pattern))
    if is_remote(pattern):
        if usable:
            return usable
        raise BadFile(
            pattern, None, "no file there, or none with an ending that can be read", _ADVICE
        )
    if not usable:
        raise BadFile(pattern, None, "no file here has an ending that can be read", _ADVICE)
    return [readable(file) for file in usable]


def _listed(pattern: str) -> set[str]:
    """All files of a pattern, readable or not. Raises BadFile where nothing is there."""
    if is_remote(pattern):
        return set(addresses(pattern))
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    if not paths:
        raise BadFile(
            pattern, None, "no such file or folder, and no file matches", "check the path"
        )
    files: set[str] = set()
    for path in paths:
        inside = os.path.join(glob.escape(path), "**", "*")
        files.update(glob.glob(inside, recursive=True) if os.path.isdir(path) else [path])
    return {file for file in files if os.path.isfile(file)}


def _with_rows(listed: Set[str], pattern: str) -> set[str]:
    """The files of a pattern that can be read, without the metadata of data sets and the caches
    beside them; these count only where the pattern is their name."""
    usable = {file for file in listed if SUPPORTED_ENDING.search(file)}
    if listed == {pattern}:
        return usable
    saved = {folder: _data_files(folder) for folder in _saved_folders(listed)}
    return {
        file
        for file in usable
        if (name := _name(file)) not in METADATA
        and (_folder(file) not in saved or name in saved[_folder(file)])
    }


def _saved_folders(listed: Set[str]) -> set[str]:
    """The folders among the files that `save_to_disk` of datasets wrote."""
    folders = ({_folder(file) for file in listed if _name(file) == name} for name in SAVED)
    return set.intersection(*folders)


def _data_files(folder: str) -> Set[str]:
    """The names of the files with the rows of a data set on the disk."""
    file = f"{folder}/state.json"
    try:
        with open(local(file), encoding="utf-8") as stream:
            state = json.load(stream)
        if state.get("_indices_data_files"):
            what, advice = "its rows are in the order of another file", "save it again"
            raise BadFile(folder, None, what, f"{advice} with datasets, by flatten_indices()")
        return {entry["filename"] for entry in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"not the state of a data set: {error}"
        raise BadFile(file, None, what, "save the data set again") from None


def _refuse_splits(pattern: str, listed: Set[str]) -> None:
    """Raises BadFile for a DatasetDict of more than one split."""
    saved = _saved_folders(listed)
    for file in sorted(listed):
        if _name(file) != "dataset_dict.json":
            continue
        splits = sorted(folder for folder in saved if _folder(folder) == _folder(file))
        if len(splits) > 1:
            names = ", ".join(map(_name, splits))
            what = f"a DatasetDict with the splits {names}"
            raise BadFile(pattern, None, what, f"give one of them, {splits[0]} say")


def _name(file: str) -> str:
    return file.rpartition("/")[2]


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


@cache
def names_of(file: str) -> tuple[str, str]:
    """The name of a file in the ids of its rows, and the source of rows without one."""
    if file.startswith("hub:"):
        name = os.path.basename(file.removeprefix("hub:").rstrip("/"))
        return name, name.partition(":")[0]
    name = os.path.basename(file.removeprefix(MEMORY).rstrip("/"))
    if _SHARD.fullmatch(name):  # of save_to_disk: the folder has the data set's name
        folder = os.path.dirname(file if is_remote(file) else os.path.abspath(file))
        above = os.path.dirname(folder)
        split = os.path.exists(f"{above}/dataset_dict.json")
        return name, os.path.basename(above if split else folder) or name
    return name, SUPPORTED_ENDING.sub("", name)


def is_table(file: str) -> bool:
    """Whether all rows of a file have the same columns, at any depth: null where one has none."""
    return is_typed(file) if is_object(file) else _kind_by_name(file) in ("hub", "parquet", "arrow")


def readable(file: str) -> str:
    """`file` itself. Raises BadFile if it cannot be read."""
    if is_object(file):
        return file
    if is_remote(file):
        local(file)
        return file
    if not os.path.isfile(file):
        raise BadFile(file, None, "no such file", "check the path")
    if not os.access(file, os.R_OK):
        raise BadFile(file, None, "permission denied", "make the file readable, or leave it out")
    if not is_text(file):
        raise BadFile(file, None, "its name is not UTF-8", "rename it")
    return file


def read_rows(file: str) -> Iterator[Raw]:
    """The rows of one file of `find_files`, without blank lines. Raises BadFile, after the rows
    before it, where the file cannot be read any further."""
    kind = _kind(file)
    if tables := _TABLES.get(kind):
        yield from (bounded_row(raw) for raw in tables(file))
        return
    rows = {"lines": json_lines, "csv": csv_rows, "array": json_array}[kind]
    with open_stream(file) as stream:
        yield from rows(file, stream)


def rows_at(file: str, positions: Collection[int]) -> Iterator[tuple[int, Raw]]:
    """The rows of `read_rows` at these positions, counted from 0, each with its position, in order.
    Raises BadFile as `read_rows` does."""
    selected, count, kind = set(positions), max(positions, default=-1) + 1, _kind(file)
    if read := _TABLES_AT.get(kind):
        for position, raw in read(file, sorted(selected)):
            yield position, bounded_row(raw)
    elif kind == "lines":
        with open_stream(file) as stream:
            lines = zip(range(count), numbered_lines(file, stream), strict=False)
            for position, (number, line, long) in lines:
                if position in selected:
                    yield position, long or json_row_of_line(file, number, line)
    else:
        for position, raw in zip(range(count), read_rows(file), strict=False):
            if position in selected:
                yield position, raw


def _kind(file: str) -> str:
    """hub, object, lines, array, csv, parquet or arrow. Raises BadFile for a file without rows."""
    kind = _kind_by_name(file)
    if kind in ("object", "hub"):
        return kind
    _refuse_pointer(file)
    if kind != "json":
        return "lines" if kind == "jsonl" else kind
    with open_stream(file) as stream:
        while (head := stream.read(CHUNK_BYTES)).isspace():
            pass
    first = head.lstrip()[:1]
    if first not in (b"[", b"{", b""):
        advice = "a .json file starts with [ or {"
        raise BadFile(file, None, "neither a JSON array nor JSON lines", advice)
    return "array" if first == b"[" else "lines"


@cache
def _kind_by_name(file: str) -> str:
    """object, hub, json, jsonl, csv, parquet or arrow."""
    if is_object(file):
        return "object"
    if file.startswith("hub:"):
        return "hub"
    ending = SUPPORTED_ENDING.search(file)
    if ending is None:
        raise BadFile(file, None, "its ending is not supported", _ADVICE)
    return (ending[1] or ending[2]).lower()


def _refuse_pointer(file: str) -> None:
    """Raises BadFile for a small file of Git that stands for a large one."""
    with reading(file, OSError, DAMAGED_ADVICE), open(local(file), "rb") as stream:
        head = stream.read(64)
    for start, what in _POINTERS.items():
        if head.startswith(start):
            what, _, command = what.partition(": ")
            raise BadFile(file, None, f"{what}, without rows", f"get the file itself: {command}")


def read_texts(file: str) -> Iterator[tuple[int, bytes]]:
    """Line and text of each row of `read_rows`. JSON lines are not parsed, which saves most of the
    time."""
    if _kind(file) != "lines":
        for raw in read_rows(file):
            yield raw.line, raw.text.encode("utf-8", "backslashreplace")
        return
    with open_stream(file) as stream:
        for number, line, long in numbered_lines(file, stream):
            yield number, long.text.encode() if long else line
