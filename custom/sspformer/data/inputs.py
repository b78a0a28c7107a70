"""The scans to infer from."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from tqdm.contrib.concurrent import thread_map

from ..io.errors import Unusable, list_text, reason_of, size_text, without_ones
from ..io.files import printable
from ..io.nifti import check_header, check_intent
from .cache import CheckCache
from .find import find_scans
from .naming import name_scans
from .options import MIN_SIZE, DatasetOptions
from .report import BIDS_LEFT_OUT, MAX_NAMED
from .scan import Scan

logger = logging.getLogger("sspformer")


def find_inputs(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    bids_suffixes: Sequence[str] | str | None = None,
) -> list[dict]:
    """Finds the scans of a file, folder, DICOM series or datalist, and reads their headers; label maps are left out.

    Args:
        dataset_dir: a NIfTI file, which may be named like a label map; a folder, searched recursively for NIfTI files
            and DICOM series; or a datalist (JSON), of which all lists are taken.
        output_dir: not searched, so that results are not taken for scans.
        bids_suffixes: what is a scan in a BIDS data set, see `DatasetOptions`.

    Returns:
        the items, sorted by path and JSON-serialisable: "image" (path, or the list of a DICOM series' files), "name"
        (unique; begins with the stem of the file's name, for a series with the name of its folder) and "source" (path
        relative to the data set, for a series of its folder). An item that no network can take has a "reason" instead
        of the "image". Broken voxels show only when `LoadScand` reads them.

    Raises:
        FileNotFoundError: when ``dataset_dir`` does not exist.
        ValueError: when there is no scan at all, or ``output_dir`` is a file or the searched folder itself.
    """
    options = DatasetOptions(dataset_dir, output_dir, bids_suffixes=bids_suffixes)
    source, output_dir = options.dataset_dir, options.output_dir
    if output_dir and output_dir.is_file():
        raise ValueError(f"output_dir {output_dir} is a file: give a folder.")
    if output_dir and source.is_dir() and output_dir.resolve() == source.resolve():
        raise ValueError(
            f"output_dir {output_dir} is dataset_dir itself, where the next run would take results for scans: "
            f"give another folder, such as {output_dir / 'output'}."
        )
    found = find_scans(options, CheckCache(), use_dataset_json=False)
    left_out = found.label_maps + found.bids_left_out
    if left_out:
        logger.info(f"Left out as label maps, or as {BIDS_LEFT_OUT}: {list_text(left_out, MAX_NAMED)}.")
    others = found.others + len(found.foreign)
    counts = f"{len(left_out)} label maps and images of other kinds and {others} other files"
    if not found.scans:
        raise ValueError(f"no scan in {source}, which must be {found.layout}. Found: {counts}{found.advice}.")
    logger.info(printable(f"{len(found.scans)} scans in {source}; {counts} are left out{found.advice}."))
    thread_map(_check, found.scans, max_workers=options.num_workers, desc="reading headers", disable=None)
    found.scans.sort(key=lambda scan: (scan.relative, scan.series))
    name_scans(found.scans, source.name, stem_first=True)
    return [_item(scan, source.name) for scan in found.scans]


def _check(scan: Scan) -> None:
    try:
        if not scan.reason and not scan.series:
            image, _ = check_header(scan.files[0], MIN_SIZE)
            check_intent(image)
            if len(shape := without_ones(image.shape)) > 3:
                raise Unusable(f"4D (shape {size_text(shape)}): split it into 3D volumes first")
    except Exception as error:
        scan.reason = reason_of(error)


def _item(scan: Scan, root_name: str) -> dict:
    folder = scan.relative.parent
    source = (str(folder) if folder.parts else root_name) if len(scan.files) > 1 and scan.series else str(scan.relative)
    files = [str(file) for file in scan.files]
    result = {"reason": scan.reason} if scan.reason else {"image": files if scan.series else files[0]}
    return {"name": scan.name, "source": source} | result
