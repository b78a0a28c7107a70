"""Which geometry a scan can have, in any format, and which size fits into the memory."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["check_resampled_shape", "free_memory", "grid_problem", "memory_needed"]

# What a scan can have. docs/inputs.md says why.
SPACING = (0.01, 20.0)  # mm along each axis
FIELD_OF_VIEW = (2.0, 2500.0)  # mm, the longest side
MAX_ORIGIN = 10_000.0  # mm along each axis
MIN_DETERMINANT = 0.5  # of the unit axes

# What resampling can make of it.
LEAST_SIDES = (2, 4)  # voxels along the shortest side and along the longest
BYTES_PER_VOXEL = 32  # the scan, its copies and an output of one channel
BYTES_PER_CHANNEL = 4  # and voxel, of a network with more; measured with 18: 90 in all

ROUNDING = 1e-3  # headers hold float32


def grid_problem(shape: Sequence[int], affine: np.ndarray, spacing: np.ndarray, unit: str = "mm") -> str:
    """Why the grid of a scan cannot be, with the likely cause; empty if it can.

    Args:
        shape: voxels along each axis.
        affine: from voxels to mm.
        spacing: mm along each axis.
        unit: of the file, from which the affine and the spacing were converted.
    """
    sizes = "x".join(f"{size:.4g}" for size in spacing)
    said = "" if unit == "mm" else f" (by its header, which says {unit}: is that the right unit?)"
    if not np.isfinite(spacing).all() or min(spacing) <= 0:
        return f"zero or non-finite voxel spacing ({sizes} mm)"
    if not np.isfinite(affine[:3, :3]).all():
        return "non-finite axes in its affine"
    if not _within(spacing, *SPACING):
        return f"voxel spacing of {sizes} mm{said or _likely_unit(spacing)}: it must be {_range(SPACING)}"
    side = max(np.multiply(shape[:3], spacing))
    if not _within(side, *FIELD_OF_VIEW):
        return f"field of view of {side:.4g} mm, with voxels of {sizes} mm{said}: it must be {_range(FIELD_OF_VIEW)}"
    if (determinant := abs(np.linalg.det(affine[:3, :3] / spacing))) < MIN_DETERMINANT:
        kind = "singular" if determinant < 1e-3 else "sheared"
        return (
            f"{kind} affine: its axes span {determinant:.2g} of the volume of a box with its voxel spacing, at least "
            f"{MIN_DETERMINANT} is possible"
        )
    if not (np.abs(affine[:3, 3]) <= MAX_ORIGIN).all():  # NaN, too
        where = ", ".join(f"{value:.4g}" for value in affine[:3, 3])
        return f"its origin lies at ({where}) mm{said}: beyond {MAX_ORIGIN / 1000:g} m the header is corrupt"
    return ""


def _within(values: np.ndarray | float, low: float, high: float) -> bool:
    return bool(np.all(values >= low * (1 - ROUNDING)) and np.all(values <= high * (1 + ROUNDING)))


def _range(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:g} to {bounds[1]:g} mm"


def _likely_unit(spacing: np.ndarray) -> str:
    """The unit in which the spacing would be one of a scan, in words."""
    for unit, factor in {"metres": 1000.0, "microns": 0.001}.items():
        if _within(spacing * factor, *SPACING):
            return f", probably {unit} (in NIfTI, xyzt_units says so)"
    return ""


def check_resampled_shape(shape: Sequence[int], option: str, name: str, channels: int = 0) -> None:
    """Whether the voxels that resampling makes of a scan are enough, and fit into the memory.

    Args:
        shape: voxels along each axis, after resampling.
        option: that asks for them, with its value.
        name: of the scan.
        channels: of the network's output on that grid.

    Raises:
        ValueError: naming the scan, the option and the shape.
    """
    sides = "x".join(str(int(side)) for side in shape)
    if min(shape) < LEAST_SIDES[0] or max(shape) < LEAST_SIDES[1]:
        raise ValueError(f"{name}: {option} leaves {sides} voxels, too few to work on.")
    need = memory_needed(shape, channels)
    free = free_memory()
    if need > free:
        raise ValueError(
            f"{name}: {option} makes {sides} voxels, which need {need / 1e9:.3g} GB of memory; {free / 1e9:.3g} GB are "
            "free."
        )


def memory_needed(shape: Sequence[int], channels: int = 0) -> int:
    """Bytes that a scan on the network's grid needs until its result is written; see :func:`check_resampled_shape`."""
    return math.prod(map(int, shape)) * (BYTES_PER_VOXEL + BYTES_PER_CHANNEL * channels)


def free_memory() -> float:
    """Bytes of free memory, by the system and the limit of the container; infinite where neither is known."""
    free = [math.inf]
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        free += [int(found[1]) * 1024] if found else []
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of version 2 and 1 of cgroups
        with contextlib.suppress(OSError, ValueError):
            free.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(free)
