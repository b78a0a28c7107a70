"""One run at a time in an output folder, and what a killed one has left there."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import time
from pathlib import Path

from ..options import is_null
from .files import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("sspformer")

_locks: dict[Path, int] = {}  # of this process: file descriptors, by folder


def _close_all() -> None:
    while _locks:
        os.close(_locks.popitem()[1])


# workers must not hold the lock of a run that was killed
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)


def own_folder(output_dir: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> None:
    """Lock an output folder for this process, and delete the temporary files of runs that were killed.

    The lock is ``flock`` on ``.lock`` in the folder, in which host and process stand. The system takes it away with the
    process, however that ends; the file stays. A process that has the lock keeps it. Where the file system has no
    locks, a warning says so.

    Args:
        output_dir: is created.
        cache_dir: other runs may share it; ``None`` for none.

    Raises:
        ValueError: if another process has the lock, with its host and its number.
    """
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not _lock(folder):
        logger.warning(f"{printable(folder)} cannot be locked: let no second run write there before this one ends.")
        return
    for place in ("", "cache", "models", "models/pretrained", "pictures"):
        _clean(folder / place)
    if not is_null(cache_dir):
        _clean(Path(cache_dir), shared=True)


def leave_folder(output_dir: str | os.PathLike) -> None:
    """Release the lock of :func:`own_folder`, if this process has it."""
    descriptor = _locks.pop(Path(output_dir).resolve(), None)
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _lock(folder: Path) -> bool:
    """Whether the folder is locked now; False: it cannot be."""
    if fcntl is None:
        return False
    file = folder / ".lock"
    if folder in _locks:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(file.stat(), os.fstat(_locks[folder])):
                return True
        os.close(_locks.pop(folder))  # the folder was deleted, and is there again
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        time.sleep(0.5)  # it may be about to write its name
        owner = file.read_text(errors="replace").strip() or "another process"
        raise ValueError(
            f"another run writes to {printable(folder)}: {owner}. Wait until it ends, or give this run an --output_dir "
            "of its own."
        ) from None
    except OSError:
        os.close(descriptor)
        return False
    _locks[folder] = descriptor
    with contextlib.suppress(OSError):  # the disk is full
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return True


_SUFFIX = r"\.(pt|json|csv|png|dcm|nii\.gz)"
#: temporary names of versions up to 0.4.0, without and with the process, and of other hosts
_UNNUMBERED = re.compile(r".+(\.(pt|json|csv|png|dcm)|_[\w-]+\.nii\.gz)\.part")
_NUMBERED = re.compile(rf".+{_SUFFIX}\.(?P<process>\d+)\.part")
_OF_A_HOST = re.compile(rf".+{_SUFFIX}\.[\w.-]+\.\d+\.part")


def _clean(folder: Path, shared: bool = False) -> None:
    """Delete the temporary files of dead processes of this host, and those older than a day of others.

    Args:
        folder: its subfolders are left alone.
        shared: other runs may be writing there.
    """
    of_this_host = re.compile(rf".+\.{re.escape(socket.gethostname())}\.(?P<process>\d+)\.part")
    for path in folder.glob("*.part"):
        named = of_this_host.fullmatch(path.name) or _NUMBERED.fullmatch(path.name)
        known = named or _OF_A_HOST.fullmatch(path.name) or _UNNUMBERED.fullmatch(path.name)
        with contextlib.suppress(OSError):  # another run has deleted it, or it is another user's
            dead = _is_dead(int(named["process"])) if named else not shared and _UNNUMBERED.fullmatch(path.name)
            if known and (dead or time.time() - path.lstat().st_mtime > 86400):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                logger.info(f"deleted {printable(path)}, which a killed run has left")


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OverflowError, PermissionError):
        pass
    return False
