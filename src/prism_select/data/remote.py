"""Remote: files of an object store or a web server, by their addresses.

    s3://bucket/pool.jsonl   gs://bucket/folder/   az://container/*.parquet   https://host/pool.jsonl

Choices made here:
- any protocol that fsspec has; folders and globs only where a path alone names a file, as in object
  stores;
- a file is copied to a temporary folder when it is first read, and remains until the process ends:
  it is read at the speed of a disk, and cannot change meanwhile;
- credentials are where the protocol's own package looks for them, never in an address.
"""

import errno
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from prism_select.run.errors import BadFile

__all__ = ["addresses", "is_remote", "local"]

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SECRET = re.compile(  # user:password@, ?key
    r"^((?!github)[^/]*//)[^/]*:[^/]*@|^(http[^?]*)\?.*", re.IGNORECASE
)
_GLOB = re.compile(r"[*?\[]")


def is_remote(file: str) -> bool:
    return _ADDRESS.match(file) is not None


def addresses(pattern: str) -> list[str]:
    """The files of an address: itself, all below a folder but hidden ones, or the matches of a
    glob. Raises BadFile."""
    with _reaching(pattern):
        system, path = _system(pattern)
        if system.isfile(path):
            return [pattern]
        paths = system.glob(path) if (special := _GLOB.search(path)) else system.find(path)
        if not paths:
            system.info(path)  # raises the reason where nothing can be reached
        start = path[: special.start()] if special else path
        files = [
            str(system.unstrip_protocol(name))
            for name in paths
            if "/." not in name.removeprefix(start) and system.isfile(name)
        ]
    stem = _GLOB.split(pattern.partition("://")[2].strip("/"))[0]
    tails = (file.partition("://")[2].lstrip("/") for file in files)
    if "::" in pattern or not all(tail.startswith(stem) for tail in tails):
        what = "a folder or a pattern of a protocol whose paths do not say all"
        raise BadFile(pattern, None, what, "name its files")
    return files


@cache
def local(file: str) -> str:
    """The path of a file on this machine: of an address, that of its copy. Raises BadFile."""
    if not is_remote(file):
        return file
    with _reaching(file):
        system, path = _system(file)
        copy = f"{_folder().name}/{len(_copies)}-{path.rstrip('/').rpartition('/')[2]}"
        system.get_file(path, copy)
        _copies.append(file)
    return copy


_copies: list[str] = []


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="prism-remote-")


def _system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it. Raises BadFile for an address with a
    password or key, which the run folder would keep."""
    from fsspec.core import url_to_fs

    if _SECRET.search(address):
        hidden = _SECRET.sub(r"\1\2…", address)
        what = "an address with a key in it, which would stand in the run folder"
        raise BadFile(hidden, None, what, "download the file, or give its plain address")
    system, path = url_to_fs(address)
    return system, str(path)


@contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Raises BadFile for whatever fails in the block: each protocol has errors of its own."""
    try:
        yield
    except BadFile:
        raise
    except FileNotFoundError as error:
        cause = " ".join(str(error.__cause__).split())[:300]
        what = "nothing there" + (f" ({cause})" if error.__cause__ else "")
        raise BadFile(address, None, what, "check the address and the network") from None
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            what = f"no room for a copy in {tempfile.gettempdir()}"
            raise BadFile(address, None, what, "set TMPDIR to a folder with room") from None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "check the address, access and network"
        raise BadFile(address, None, f"cannot be reached: {reason}", advice) from None
