"""Names and versions of files, and writing them atomically."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path


def stats(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size in bytes and modification time in ns of each file."""
    return [(str(f), s.st_size, s.st_mtime_ns) for f, s in ((f, f.stat()) for f in files)]


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file; several processes may do so at the same time."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def digest(text: object) -> str:
    """A hash in place of an identifier; empty for an empty one."""
    text = str(text or "").strip()
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16] if text else ""


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def printable(text: object) -> str:
    """Text for tables, logs and messages: bytes of a file name that are no UTF-8 become `\\xfc` and the like."""
    return str(text).encode(errors="surrogateescape").decode(errors="backslashreplace")


NIFTI_SUFFIX = re.compile(r"\.(nii|hdr|img)(\.gz)?$", re.I)
NIFTI_NAME = re.compile(r"\.nii(\.gz)?$", re.I)


def stem(name: str) -> str:
    """A file name without the suffixes of NIfTI."""
    return NIFTI_SUFFIX.sub("", name)


def part_of(path: str | os.PathLike) -> Path:
    """The temporary path beside a file or folder that this process, and no other on any host, writes first."""
    path = Path(path)
    ending = f".{socket.gethostname()}.{os.getpid()}.part"
    has_room = len(os.fsencode(path.name + ending)) <= 255
    return path.with_name((path.name if has_room else digest(path.name)) + ending)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to, which then replaces the file: a kill leaves the old file or the new one.

    Several processes may write the file at the same time. What embeds its file's name in the content must be given an
    open file, or that of host and process gets there.

    Args:
        path: of the file; its folder is created.

    Raises:
        OSError: on a full disk, naming the file, the room and what is safe.
    """
    path, part = Path(path), part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
