"""Names and versions of files, and writing them atomically."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = [
    "digest",
    "output_path",
    "printable",
    "replacing",
    "stats",
    "stem",
    "write_atomically",
]


def stats(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size in bytes and modification time in ns of each file."""
    return [(str(f), s.st_size, s.st_mtime_ns) for f, s in ((f, f.stat()) for f in files)]


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file; several processes may do so at the same time."""
    with replacing(path, shared=True) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def digest(text: object) -> str:
    """A hash in place of an identifier; empty for an empty one."""
    text = str(text or "").strip()
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16] if text else ""


def printable(text: object) -> str:
    """Text for tables, logs and messages: bytes of a file name that are no UTF-8 become `\\xfc` and the like."""
    return str(text).encode(errors="surrogateescape").decode(errors="backslashreplace")


NIFTI_SUFFIX = re.compile(r"\.(nii|hdr|img)(\.gz)?$", re.I)
NIFTI_NAME = re.compile(r"\.nii(\.gz)?$", re.I)


def stem(name: str) -> str:
    """A file name without the suffixes of NIfTI."""
    return NIFTI_SUFFIX.sub("", name)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, shared: bool = False) -> Iterator[Path]:
    """A temporary path to write to, which then replaces the file: a kill leaves the old file or the new one.

    Args:
        path: of the file; its folder is created.
        shared: several processes may write it at the same time, each to a temporary path of its own.

    Raises:
        OSError: on a full disk, naming the file, the room and what is safe.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch raises a RuntimeError of its own
        if not isinstance(cause, OSError) or cause.filename:
            raise
        raise _no_room(path, cause) from error
    finally:
        part.unlink(missing_ok=True)


def _no_room(path: Path, error: OSError) -> OSError:
    """A write that failed, with its file, the room that there is, and what is safe."""
    free = shutil.disk_usage(path.parent).free
    safe = f"the {path.name} from before is whole" if path.exists() else "nothing half is left behind"
    why = f"{error.strerror or error}: cannot write {path}, with {free / 1e6:,.0f} MB free in its folder; {safe}"
    return OSError(error.errno, why) if error.errno else OSError(why)


def output_path(name: str, output_dir: str | Path, postfix: str) -> Path:
    """Path of the NIfTI result of the scan with this name."""
    return Path(output_dir) / f"{name}_{postfix}.nii.gz"
