"""Remote: files of an object store or a web server, by their addresses.

    s3://bucket/pool.jsonl     gs://bucket/folder/     az://container/*.parquet     https://host/pool.jsonl

Any protocol that fsspec knows; folders and globs where a path says all, as in object stores.

Choices made here: a file is copied to a temporary folder when it is first read, and stays there as
long as the process does; so it is read as often as needed, at the speed of a disk, and cannot
change while it is. Credentials are where the protocol's own package looks for them."""

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


_SECRET = re.compile(
    r"^((?!github)[^/]*//)[^/]*:[^/]*@|^(http[^?]*)\?.*", re.IGNORECASE
)  # user:password@, ?key


_GLOB = re.compile(r"[*?\[]")


def is_remote(file: str) -> bool:
    return _ADDRESS.match(file) is not None


def addresses(pattern: str) -> list[str]:
    """Files that it reaches: itself, all below a folder but hidden ones, or what a glob finds.
    Raises BadFile."""
    with _asked(pattern):
        system, path = _system(pattern)
        if system.isfile(path):
            return [pattern]
        found = system.glob(path) if (special := _GLOB.search(path)) else system.find(path)
        if not found:
            system.info(path)  # says why, where nothing can be reached
        start = path[: special.start()] if special else path
        found = [
            name for name in found if "/." not in name.removeprefix(start) and system.isfile(name)
        ]
        shown = [str(system.unstrip_protocol(name)) for name in found]
    stem = _GLOB.split(pattern.partition("://")[2].strip("/"))[0]
    if "::" in pattern or not all(
        name.partition("://")[2].lstrip("/").startswith(stem) for name in shown
    ):
        raise BadFile(
            pattern,
            None,
            "a folder or a pattern of a protocol whose paths do not say all",
            "name its files",
        )
    return shown


@cache
def local(file: str) -> str:
    """The place of a file on this machine; of an address, that of its copy. Raises BadFile."""
    if not is_remote(file):
        return file
    with _asked(file):
        system, path = _system(file)
        place = f"{_folder().name}/{len(_copies)}-{path.rstrip('/').rpartition('/')[2]}"
        system.get_file(path, place)
        _copies.append(file)
    return place


_copies: list[str] = []


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="prism-remote-")


def _system(address: str) -> tuple[Any, str]:
    """Raises BadFile for one with a password or key in it, which would stand in the run folder."""
    from fsspec.core import url_to_fs

    if _SECRET.search(address):
        what, shown = (
            "an address with a key in it, which would stand in the run folder",
            _SECRET.sub(r"\1\2…", address),
        )
        raise BadFile(shown, None, what, "download the file, or give its plain address")
    system, path = url_to_fs(address)
    return system, str(path)


@contextmanager
def _asked(address: str) -> Iterator[None]:
    try:
        yield
    except BadFile:
        raise
    except FileNotFoundError as error:
        what = "nothing there" + (
            f" ({' '.join(str(error.__cause__).split())[:300]})" if error.__cause__ else ""
        )
        raise BadFile(address, None, what, "check the address and the network") from None
    except Exception as error:  # every protocol has its own, and its own ways to fail
        if getattr(error, "errno", None) == errno.ENOSPC:
            what = f"no room for a copy in {tempfile.gettempdir()}"
            raise BadFile(address, None, what, "set TMPDIR to a folder with room") from None
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadFile(
            address, None, f"cannot be reached: {what}", "check the address, access and network"
        ) from None
