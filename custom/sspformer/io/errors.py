"""Why a file cannot be read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterable, Sequence

import nibabel as nib
import numpy as np


class Unusable(ValueError):
    """A scan that cannot be used; the message is the reason, in words for the person who owns the scan."""


def reason_of(error: Exception) -> str:
    """The reason behind an exception, in plain words. Unknown messages are left out: they may quote a DICOM header."""
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)) or "could the file be damaged" in str(error):
        return "truncated or corrupt: its voxels cannot be read to the end"
    if isinstance(error, FileNotFoundError):
        return "no such file, or a broken link (DataLad and git-annex: get the file first)"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    if isinstance(error, nib.filebasedimages.ImageFileError):
        return "not a NIfTI file although named so: it has no such header"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return f"cannot be read ({type(error).__name__})"


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without trailing ones beyond the third side."""
    shape = tuple(shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def check_size(shape: Sequence[int], min_size: int) -> None:
    """Raises `Unusable` for a 2D image, and for a side of fewer voxels than `min_size`."""
    if len(shape) < 3 or shape[2] == 1:
        raise Unusable("a 2D image")
    if min(shape[:3]) < min_size:
        raise Unusable(f"too small: {size_text(shape[:3])} voxels, every side needs at least {min_size}")


def size_text(numbers: Iterable[float]) -> str:
    """Sides or spacings in words, as `12x10x9`."""
    return "x".join(f"{n:.3g}" if isinstance(n, float | np.floating) else str(n) for n in numbers)


def list_text(names: Collection[object], n: int = 10) -> str:
    """The first names in words, and how many more there are."""
    return ", ".join(map(str, list(names)[:n])) + (f" and {len(names) - n} more" if len(names) > n else "")
