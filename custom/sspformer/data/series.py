"""DICOM files grouped into series."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pydicom
from tqdm.contrib.concurrent import thread_map

from ..io.dicom_in import quiet_dicom
from ..io.errors import reason_of
from ..io.files import digest
from .cache import CheckCache

__all__ = ["dicom_header", "group_series", "read_headers"]

MR_STORAGE = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")  # MR images, enhanced ones


@quiet_dicom()
def dicom_header(files: list[Path]) -> dict[str, str]:
    """What groups and names a DICOM file (a list of one); identifiers leave here only as hashes."""
    ds = pydicom.dcmread(files[0], stop_before_pixels=True)
    return {
        "series": digest(ds.get("SeriesInstanceUID")),
        "instance": digest(ds.get("SOPInstanceUID")),
        "study": digest(ds.get("StudyInstanceUID")),
        "patient": digest(ds.get("PatientID")),
        "number": str(ds.get("SeriesNumber") or "x"),
        "modality": str(ds.get("Modality") or ""),
        "image": "yes" if ds.get("Rows") or ds.get("SOPClassUID") in MR_STORAGE else "",
        "enhanced": "yes" if int(ds.get("NumberOfFrames") or 1) > 1 else "",
        "concatenation": digest(ds.get("ConcatenationUID")),
    }


def read_headers(files: Sequence[Path], cache: CheckCache, num_workers: int) -> dict[Path, dict[str, str]]:
    """`dicom_header` of each file, or the "reason" why it has none."""
    if not files:
        return {}
    read = partial(_read_header, cache=cache)
    return dict(zip(files, thread_map(read, files, max_workers=num_workers, desc="reading headers", disable=None)))


def _read_header(path: Path, cache: CheckCache) -> dict[str, str]:
    try:
        return cache.get(dicom_header, [path])
    except Exception as error:
        return {"reason": f"corrupt DICOM file: {reason_of(error)}"}


def group_series(headers: Mapping[Path, dict], splits: Mapping[Path, str]) -> list[tuple[list[Path], int]]:
    """The files of each series, sorted and without copies, and how many copies were left out.

    Files belong together that share the SeriesInstanceUID (or the folder, if they have none) and the split. An enhanced
    file is a series of its own, unless it is part of a concatenation. Files that share the SOPInstanceUID are copies.

    Args:
        headers: of each file, see `dicom_header`.
        splits: of each file; empty where no list says.
    """
    series: dict[tuple, list[Path]] = defaultdict(list)
    for path, head in headers.items():
        instance = (head["concatenation"] or head["instance"]) if head["enhanced"] else ""
        series[head["series"] or str(path.parent), instance, splits[path]].append(path)
    grouped = []
    for files in series.values():
        first = {headers[path]["instance"] or str(path): path for path in reversed(files)}
        grouped.append((sorted(first.values()), len(files) - len(first)))
    return grouped
