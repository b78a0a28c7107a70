"""Whether a scan and its label map can be used: each file is read once, to its end."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm.contrib.concurrent import thread_map

from ..io.dicom_in import read_dicom
from ..io.errors import Unusable, reason_of, size_text, without_ones
from ..io.nifti import check_grid, check_intent, open_nifti
from .cache import CheckCache
from .labels import integer_ranges
from .options import MIN_SIZE, DatasetOptions
from .scan import Scan

MAX_SHIFT = 0.1  # of the grids of an image and its label map against each other, in voxels


def check_scans(scans: Sequence[Scan], classes: set[int] | None, options: DatasetOptions, cache: CheckCache) -> None:
    """Reads all scans, and gives each its "check" or the "reason" why it is unusable.

    Args:
        scans: those with a reason are not read.
        classes: values that label maps may hold; None: any.
        options: see `DatasetOptions`.
        cache: of the results.
    """

    def check(scan: Scan) -> None:
        if not scan.reason:
            scan.reason = "; ".join([*_check_image(scan, options, cache), *_check_label_map(scan, classes, cache)])

    if scans:
        thread_map(check, scans, max_workers=options.num_workers, desc="checking scans", disable=None)


def _check_image(scan: Scan, options: DatasetOptions, cache: CheckCache) -> Iterator[str]:
    """Keeps in the scan what its files hold, and says what is wrong with them."""
    try:
        scan.check = dict(cache.get(check_dicom if scan.series else check_nifti, scan.files, options.min_size))
    except Exception as error:
        yield reason_of(error)
        return
    if order := scan.check.get("order"):
        scan.files = [scan.files[i] for i in order]
    if volumes := scan.check.get("volumes"):
        if scan.label_map:
            yield f"4D ({len(volumes)} volumes), and a label map belongs to one volume"
        chosen = np.linspace(0, len(volumes) - 1, min(options.max_volumes, len(volumes))).round().astype(int)
        scan.volumes = [volumes[i] for i in chosen]


def _check_label_map(scan: Scan, classes: set[int] | None, cache: CheckCache) -> Iterator[str]:
    """Keeps in the scan what its label map holds, and says what is wrong with it."""
    if not scan.label_map:
        return
    label = f"its label map {scan.label_path}"
    if not os.path.lexists(scan.label_map):
        yield f"{label} is missing"
        return
    try:
        found = cache.get(check_label, scan.label_files)
    except Exception as error:
        yield f"{label}: {reason_of(error)}"
        return
    scan.check["values"] = values = {int(value): count for value, count in found["values"].items()}
    if "shape" in scan.check:
        yield from (f"{label} {problem}" for problem in _misfits(scan.check, found))
    if classes is not None and (unknown := set(values) - classes):
        hint = f"the classes are {integer_ranges(classes)}; others need --class_names and --network_def#out_channels"
        yield f"{label} has unknown values {integer_ranges(unknown)} ({hint})"
    if set(values) == {0}:
        scan.note = "empty label map"


def _misfits(image: dict, label: dict) -> Iterator[str]:
    """How the grid of a label map differs from that of its image."""
    if image["shape"] != label["shape"]:
        yield f"has another shape: {size_text(label['shape'])}, the image {size_text(image['shape'])}"
        return
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in image["shape"]))])
    shift = np.linalg.norm(corners @ np.subtract(image["affine"], label["affine"])[:3].T, axis=1).max()
    if shift > MAX_SHIFT * min(image["spacing"]):
        axes = image["orientation"], label["orientation"]
        turned = f", and its axes are {axes[1]}, the image's {axes[0]}" if axes[0] != axes[1] else ""
        yield f"has another affine: it lies up to {shift:.3g} mm off the image{turned}"


def check_nifti(files: list[Path], min_size: int) -> dict:
    """Reads a NIfTI file to its last byte; returns its grid (see `check_grid`) and, if 4D, its usable volumes."""
    with open_nifti(files[0], min_size) as (image, grid):
        check_intent(image)
        voxels = image.dataobj.get_unscaled()
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    four = len(without_ones(image.shape)) == 4
    ranges = [_value_range(voxels[:, :, :, i]) for i in range(image.shape[3])] if four else [_value_range(voxels)]
    values = np.array(ranges) * slope + intercept
    _value_range(values)
    if len(values) == 3 and (values.min(axis=1) < -0.1 * values.max(axis=1)).all() and (values.max(axis=1) > 0).all():
        raise Unusable("three volumes with negative values: a displacement field (warp), no scans")
    varied = [i for i, (low, high) in enumerate(ranges) if low < high and slope != 0]
    if not varied:
        raise Unusable("all voxels have the same value")
    return grid | ({"volumes": varied} if four else {})


def check_label(files: list[Path]) -> dict:
    """Reads a label map to its last byte; returns its grid (see `check_grid`) and how often each value occurs.

    Raises:
        Unusable: when it is no NIfTI file of one volume, or has a value that is not an integer.
    """
    with open_nifti(files[0], MIN_SIZE) as (image, grid):
        voxels = image.dataobj.get_unscaled()
    if len(shape := without_ones(image.shape)) > 3:
        raise Unusable(f"4D (shape {size_text(shape)}): a label map is one volume of class numbers")
    values, counts = np.unique(voxels, return_counts=True)
    slope = float(image.dataobj.slope)
    values = values * slope + float(image.dataobj.inter)
    stored_whole = np.issubdtype(image.get_data_dtype(), np.integer)  # scaled: precise to half a step
    tolerance = max(1e-4, min(0.1, 0.51 * abs(slope))) if stored_whole else 1e-4
    whole = np.isfinite(values) & (np.abs(values - np.round(values)) < tolerance)
    if not whole.all():
        examples = ", ".join(f"{value:.7g}" for value in values[~whole][:3])
        raise Unusable(f"its values are not integers (such as {examples}), so it is not a map of class numbers")
    return grid | {"values": {str(int(v)): int(n) for v, n in zip(np.round(values), counts, strict=True)}}


def check_dicom(files: list[Path], min_size: int) -> dict:
    """Reads a DICOM series as training will; returns its grid (see `check_grid`) and the order of its files."""
    voxels, affine, order = read_dicom(files, min_size)
    low, high = _value_range(voxels)
    if low == high:
        raise Unusable("all voxels have the same value")
    return check_grid(voxels.shape, affine) | {"order": order}


def _value_range(voxels: np.ndarray) -> tuple[float, float]:
    """Least and greatest voxel; raises `Unusable` for NaN and Inf, which pass through min and max."""
    low, high = voxels.min(), voxels.max()
    with np.errstate(over="ignore"):  # what float32 cannot hold counts as infinite
        if not np.isfinite(np.array([low, high]).astype(np.float32)).all():
            broken = np.count_nonzero(~np.isfinite(voxels.astype(np.float32)))
            raise Unusable(f"{broken} voxels are NaN or infinite")
    return float(low), float(high)
