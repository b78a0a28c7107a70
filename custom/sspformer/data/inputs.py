"""The scans to infer from: whatever a path holds, with a reason for each one that cannot be read."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import nibabel as nib

from ..io.errors import Unusable, by, reason_of, without_ones
from .check import Cache, check_header, in_threads
from .datalist import existing, name_scans
from .find import Scan, find_scans

__all__ = ["find_inputs"]

logger = logging.getLogger("sspformer")

MIN_SIZE = 2  # voxels along each side


def find_inputs(
    dataset_dir: str | os.PathLike, output_dir: str | os.PathLike | None = None, num_workers: int = 2
) -> list[dict]:
    """Finds the scans of a file, folder, DICOM series or datalist, and reads their headers; label maps are left out.

    Args:
        dataset_dir: a NIfTI file, which may be named like a label map; a folder, searched recursively for NIfTI files
            and DICOM series; or a datalist (JSON), of which all lists are taken.
        output_dir: not searched, so that results are not taken for scans.
        num_workers: threads that read headers.

    Returns:
        the items, sorted by path and JSON-serialisable: "image" (path, or the list of a DICOM series' files), "name"
        (unique; starts with the stem of the file's name, for a series with its folder's name) and "source" (path
        relative to the data set, for a series of its folder). An item that no network can take has "reason" instead of
        "image". Broken voxels show only when `LoadScand` reads them.

    Raises:
        FileNotFoundError: when `dataset_dir` does not exist.
        ValueError: when there is no scan at all, or `output_dir` is a file or the searched folder itself.
    """
    dataset_dir = existing(dataset_dir)
    output_dir = Path(output_dir) if output_dir is not None else None
    if output_dir and output_dir.is_file():
        raise ValueError(f"output_dir {output_dir} is a file: give a folder.")
    if dataset_dir.is_dir() and output_dir and output_dir.resolve() == dataset_dir.resolve():
        raise ValueError(
            f"output_dir {output_dir} is dataset_dir itself, where results would be taken for scans the next time: "
            f"give another folder, such as {output_dir / 'output'}."
        )
    cache = Cache(None)
    scans, labels, others = find_scans(dataset_dir, output_dir, num_workers, cache)
    if not scans:
        raise ValueError(
            f"no scan in {dataset_dir}: looked, in all folders below it, for *.nii, *.nii.gz, .hdr/.img pairs and "
            f"DICOM series, and found {len(labels)} label maps and {others} other files."
        )

    def check(scan: Scan) -> None:
        try:
            if not scan.reason and not scan.series:
                check_header(scan.files, MIN_SIZE)
                if len(shape := without_ones(nib.load(scan.files[0]).shape)) > 3:
                    raise Unusable(f"4D (shape {by(shape)}): split it into 3D volumes first")
        except Exception as error:
            scan.reason = reason_of(error)

    in_threads(check, scans, num_workers, cache, "reading headers")
    scans.sort(key=lambda scan: (scan.relative, scan.series))
    name_scans(scans, dataset_dir.name, stem_first=True)
    if labels:
        logger.info(f"{len(labels)} label maps in {dataset_dir} are left out.")
    return [_item(scan, dataset_dir) for scan in scans]


def _item(scan: Scan, dataset_dir: Path) -> dict:
    item = {"name": scan.name, "source": str(scan.relative)}
    if scan.series and len(scan.files) > 1:
        folder = scan.relative.parent
        item["source"] = str(folder) if folder.parts else dataset_dir.name
    if scan.reason:
        return item | {"reason": scan.reason}
    files = [str(file) for file in scan.files]
    return item | {"image": files if scan.series else files[0]}
