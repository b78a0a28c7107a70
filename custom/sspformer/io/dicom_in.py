"""MR series of DICOM files."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.uid import UID

from .errors import Unusable, check_size
from .nifti import check_grid

DICOM_UNEVEN = 0.1  # largest deviation of a slice from its place in an even stack, as a fraction of the slice distance


#: what may be shown of a header, and what it must look like then
SHOWN = {
    "Modality": re.compile("|".join(getattr(codes.cid33, name).value for name in codes.cid33.dir())),
    "SeriesNumber": re.compile(r"\d{1,7}"),  # fewer digits than a date
}


def header_text(ds: pydicom.Dataset, keyword: str) -> str:
    """A value of the header as text; empty if it is not what its field may hold.

    This is the only way for a header into names, tables, logs and messages. One wrong byte in the length of a value
    makes it swallow its neighbours, the patient's name among them.
    """
    try:
        text = str(ds.get(keyword) or "").strip()
    except Exception:  # its message would quote the value
        return ""
    return text if SHOWN[keyword].fullmatch(text) else ""


def open_dicom(path: str | Path, pixels: bool = True) -> pydicom.Dataset:
    """The elements of a DICOM file, with or without its pixels; raises `Unusable` if they cannot be told apart."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=not pixels)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # pydicom raises many types here
        raise Unusable("truncated or corrupt: the elements of its DICOM header cannot be told apart") from error


def element(ds: pydicom.Dataset, keyword: str) -> object:
    """A value of the header, None if there is none; raises `Unusable` if its bytes are not what its field may hold."""
    try:
        return ds.get(keyword)
    except Exception as error:  # pydicom raises many types here, and quotes the value
        raise Unusable(f"corrupt {keyword} in the DICOM header") from error


class quiet_dicom(contextlib.ContextDecorator):  # noqa: N801 (used as a function is)
    """Silences the warnings of pydicom and highdicom, which quote the header: a patient's name must reach no log.

    A context manager or decorator. Several threads may be inside at a time; the last to leave restores the settings.
    """

    _libraries = ("pydicom", "highdicom")
    _lock, _inside, _before = threading.Lock(), 0, {}

    def __enter__(self) -> None:
        cls = type(self)
        with cls._lock:
            if not cls._inside:
                cls._before = {name: logging.getLogger(name).level for name in cls._libraries}
                for name in cls._libraries:
                    warnings.filterwarnings("ignore", module=name)
                    logging.getLogger(name).setLevel(logging.ERROR)
                cls._filters = warnings.filters[: len(cls._libraries)]
            cls._inside += 1

    def __exit__(self, *_) -> None:
        cls = type(self)
        with cls._lock:
            cls._inside -= 1
            if not cls._inside:
                warnings.filters[:] = [entry for entry in warnings.filters if entry not in cls._filters]
                for name, level in cls._before.items():
                    logging.getLogger(name).setLevel(level)


@quiet_dicom()
def read_dicom(files: Sequence[str | Path], min_size: int = 2) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Reads one MR series.

    MONAI's PydicomReader would stack a list of files as channels, and order a folder by InstanceNumber.

    Args:
        files: of the series, in any order; or a single enhanced multi-frame file.
        min_size: fewest slices, checked before any pixel is decoded.

    Returns:
        the voxels (columns, rows, slices) float32, rescaled; the affine (4, 4) to RAS mm; and the order of the files.

    Raises:
        Unusable: with the reason, when this is no stack of evenly spaced MR slices.
    """
    stack = read_stack(files, min_size)
    first = stack.datasets[0]
    volume = np.empty((len(stack.frames), int(first.Rows), int(first.Columns)), np.float32)
    images = (image for path, ds in zip(files, stack.datasets) for image in _dicom_pixels(ds, Path(path).name))
    for place, frame, image in zip(volume, stack.frames, images, strict=True):
        place[:] = image.astype(np.float32) * frame["slope"] + frame["intercept"]
    order = list(dict.fromkeys(stack.frames[i]["file"] for i in stack.order))
    return np.ascontiguousarray(volume[stack.order].T), stack.affine, order


class DicomStack(NamedTuple):
    """The headers of one MR series, and how its frames (slices) are stacked."""

    datasets: list[pydicom.Dataset]  # of each file
    frames: list[dict]  # as the files hold them: "file" (index), "number" in it (from 1), "position", "slope", ...
    order: np.ndarray  # indices of the frames along the slice normal
    affine: np.ndarray  # (4, 4), of (column, row, slice) to RAS mm


@quiet_dicom()
def read_stack(files: Sequence[str | Path], min_size: int = 2, pixels: bool = True) -> DicomStack:
    """Reads the files of one series, and finds the order of the slices from their positions.

    Args:
        files: as for `read_dicom`.
        min_size: as for `read_dicom`.
        pixels: False: the datasets come without them.

    Raises:
        Unusable: with the reason, when this is no stack of evenly spaced MR slices.
    """
    datasets, frames = [], []
    for i, path in enumerate(files):
        ds = open_dicom(path, pixels)
        if (modality := header_text(ds, "Modality")) != "MR":
            raise Unusable(f"not MR: the DICOM modality is {modality or 'not given, or none of the standard'}")
        if not as_number(element(ds, "Rows")) or not as_number(element(ds, "Columns")):
            raise Unusable(f"no pixel data in {Path(path).name}: truncated, or no image")
        if as_number(element(ds, "SamplesPerPixel") or 1) != 1 or "MONOCHROME" not in str(
            element(ds, "PhotometricInterpretation")
        ):
            raise Unusable("a colour image (RGB or palette)")
        datasets.append(ds)
        if (ds.Rows, ds.Columns) != (datasets[0].Rows, datasets[0].Columns):
            raise Unusable("its slices have different shapes")
        frames += [{"file": i, "number": n, **frame} for n, frame in enumerate(dicom_frames(ds), 1)]
    order, affine = _stack_geometry(frames)
    shape = (int(datasets[0].Columns), int(datasets[0].Rows), len(frames))
    check_size(shape, min_size)
    check_grid(shape, affine)
    return DicomStack(datasets, frames, order, affine)


def dicom_frames(ds: pydicom.Dataset) -> Iterator[dict]:
    """Geometry and rescaling of each frame of a DICOM file (one frame, unless it is enhanced); "thickness" may be 0."""
    enhanced = element(ds, "PerFrameFunctionalGroupsSequence")
    if not enhanced and as_number(element(ds, "NumberOfFrames") or 1) > 1:
        raise Unusable("multi-frame DICOM without a position for each frame (convert it with dcm2niix)")
    shared = (element(ds, "SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    for groups in [(frame, shared) for frame in enhanced] if enhanced else [()]:
        look = partial(_numbers, ds, groups)
        yield {
            "position": look("PlanePositionSequence", "ImagePositionPatient", (3,)),
            "orientation": look("PlaneOrientationSequence", "ImageOrientationPatient", (6,)),
            "spacing": look("PixelMeasuresSequence", "PixelSpacing", (2,)),
            "thickness": as_number(_header_value(ds, groups, "PixelMeasuresSequence", "SliceThickness")),
            "slope": float(look("PixelValueTransformationSequence", "RescaleSlope", (), 1.0)),
            "intercept": float(look("PixelValueTransformationSequence", "RescaleIntercept", (), 0.0)),
        }


@quiet_dicom()
def hash_voxels(files: Sequence[Path]) -> dict[str, str]:
    """{"voxels": hash} of the rescaled voxels of a DICOM file (a list of one)."""
    ds = open_dicom(files[0])
    voxels = hashlib.sha256()
    for frame, image in zip(dicom_frames(ds), _dicom_pixels(ds, files[0].name), strict=True):
        voxels.update(np.ascontiguousarray(image.astype(np.float32) * frame["slope"] + frame["intercept"]))
    return {"voxels": voxels.hexdigest()}


def as_number(value: object) -> float:
    """0 for anything else: nothing depends on it."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _numbers(
    ds: pydicom.Dataset,
    groups: Sequence[pydicom.Dataset],
    macro: str,
    keyword: str,
    shape: tuple[int, ...],
    default: float | None = None,
) -> np.ndarray:
    """Finite numbers of the header; raises `Unusable`, which names the keyword and does not quote the value."""
    value = _header_value(ds, groups, macro, keyword)
    if value is None and default is None:
        raise Unusable(f"no {keyword} in the DICOM header, so where its slices lie is unknown")
    try:
        numbers = np.array(default if value is None else value, float)
    except (TypeError, ValueError):
        numbers = np.array([])
    if numbers.shape != shape or not np.isfinite(numbers).all():
        count = math.prod(shape)
        raise Unusable(f"invalid {keyword} in the DICOM header: not {count} finite number{'s' * (count > 1)}")
    return numbers


def _header_value(ds: pydicom.Dataset, groups: Sequence[pydicom.Dataset], macro: str, keyword: str):
    """A value of the header; of an enhanced file: of its first functional group that has it in this macro."""
    holders = [element(group, macro)[0] for group in groups if element(group, macro)] if groups else [ds]
    return next((value for holder in holders if (value := element(holder, keyword)) is not None), None)


def _stack_geometry(frames: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Order of the frames along the slice normal, and the affine (4, 4) of the stack (column, row, slice) to RAS mm.

    The affine is nibabel's (https://nipy.org/nibabel/dicom/dicom_orientation.html), with the axes of a NIfTI: index 0
    runs along a row of pixels. Raises `Unusable` for slices of several orientations, duplicates and gaps.
    """
    first = frames[0]
    row, column = first["orientation"][:3], first["orientation"][3:]
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
        raise Unusable("invalid ImageOrientationPatient in the DICOM header")
    if min(first["spacing"]) <= 0 or not np.isfinite(first["spacing"]).all():
        raise Unusable("zero or non-finite PixelSpacing in the DICOM header")
    for frame in frames:
        if not np.allclose(frame["orientation"], first["orientation"], atol=1e-3):
            raise Unusable(
                "its slices have different orientations (a localizer, or several stacks in one series; dcm2niix parts "
                "them)"
            )
        if not np.allclose(frame["spacing"], first["spacing"], rtol=1e-3):
            raise Unusable("its slices have different pixel spacings")
    if len(frames) < 2:
        raise Unusable("a 2D image (a single slice)")

    positions = np.array([frame["position"] for frame in frames])
    heights = positions @ np.cross(row, column)
    order = np.argsort(heights, kind="stable")
    positions, steps = positions[order], np.diff(heights[order])
    if steps.min() < 1e-3:
        per_position = len(frames) / (1 + np.count_nonzero(steps > 1e-3))
        raise Unusable(
            f"several images at one slice position ({per_position:.3g} on average: duplicates, echoes, time points or "
            "diffusion directions in one series; convert it with dcm2niix)"
        )
    distance = np.median(steps)
    if np.abs(steps - distance).max() > DICOM_UNEVEN * distance:
        raise Unusable(
            f"missing slices: they lie {steps.min():.3g} to {steps.max():.3g} mm apart, {distance:.3g} mm as a rule"
        )
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    line = positions[0] + np.arange(len(frames))[:, None] * step
    if np.abs(positions - line).max() > DICOM_UNEVEN * distance:
        raise Unusable("its slices do not lie on one straight line")

    affine = np.eye(4)
    affine[:3, 0] = row * first["spacing"][1]  # PixelSpacing is (between rows, between columns)
    affine[:3, 1] = column * first["spacing"][0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return order, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's LPS to RAS


def _dicom_pixels(ds: pydicom.Dataset, name: str) -> np.ndarray:
    """Stored pixel values of a DICOM file, (frames, rows, columns); raises `Unusable`."""
    if not any(keyword in ds for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise Unusable(f"no pixel data in {name}: truncated, or no image")
    try:
        return np.asarray(ds.pixel_array).reshape(-1, int(ds.Rows), int(ds.Columns))
    except Exception as error:  # each decoder has its own exceptions
        syntax = UID(getattr(ds, "file_meta", {}).get("TransferSyntaxUID") or "")
        if syntax.type == "Transfer Syntax" and syntax.is_compressed and "RLE" not in syntax.name:  # a known one
            raise Unusable(
                f"its pixels are compressed ({syntax.name}) and cannot be decoded here: "
                "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
            ) from error
        raise Unusable(f"truncated or corrupt: the pixels of {name} cannot be read") from error
