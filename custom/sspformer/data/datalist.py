"""The datalist of a data set: its scans found, checked, named, split by subject and reported."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ..io.errors import by, reason_of
from ..io.files import stem, write_atomically
from ..options import is_null
from .check import Cache, check_dicom, check_nifti, in_threads
from .find import SPLITS, Scan, datalist_of, find_scans

__all__ = [
    "LazyDatalist",
    "existing",
    "keep_datalist",
    "match_subjects",
    "name_scans",
    "prepare_datalist",
    "prepare_test_scans",
    "refuse",
    "report",
    "row_of",
    "split_subjects",
    "test_split",
    "warn_of_overlap",
]

logger = logging.getLogger("sspformer")

MAX_ROWS = 30  # rows of the printed table


MAX_NAMED = 20  # unusable files named in the error


COLUMNS = ("name", "subject", "split", "format", "shape", "spacing_mm", "orientation", "status", "path")


def prepare_datalist(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    val_fraction: float = 0.15,
    seed: int = 0,
    skip_unreadable: bool = False,
    min_size: int = 8,
    max_volumes: int = 4,
    subject_pattern: str | None = None,
    num_workers: int = 2,
) -> dict[str, list[dict]]:
    """Finds, checks and splits the scans of a data set, before any training starts.

    Args:
        dataset_dir: a folder, searched recursively for NIfTI files and DICOM series; a single file; or an MSD-style
            datalist (JSON with "training" and perhaps "validation", which then is the split, even an empty one), or the
            folder that holds it as dataset.json. The scans of a list "test", or of a folder's imagesTs/, are left out.
        output_dir: gets `scans.csv`, a row a file; `scan_check.json`, which spares unchanged files another reading; and
            `datalist.json`, the split, to be a `dataset_dir` itself.
        val_fraction: fraction of the subjects for validation, in [0, 1); at least one subject unless it is 0. A single
            subject serves for both, with a warning.
        seed: of the split, which is the same for the same subjects.
        skip_unreadable: go on without the unusable scans instead of raising.
        min_size: fewest voxels along each side.
        max_volumes: most volumes taken out of a 4D file, evenly spaced.
        subject_pattern: regular expression searched in each path relative to the data set; its first group, or the
            whole match, is the subject. None: `subject_of` guesses, or DICOM's PatientID (as a hash) says so.
        num_workers: threads that read.

    Returns:
        {"training": [...], "validation": [...]}, no subject in both. An item is JSON-serialisable: "image" (path of a
        NIfTI, or the list of a DICOM series' files in slice order), "subject", "name" (unique, fit for a file name),
        "version" (another one once a file was written anew, so that no cache by item gives the old voxels) and, for one
        volume of a 4D file, "volume".

    Raises:
        FileNotFoundError: when `dataset_dir` does not exist.
        ValueError: naming the unusable scans, unless `skip_unreadable`; when no usable scan is left to train on; when a
            path does not match `subject_pattern`; when an argument is out of its range.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}.")
    if min_size < 2 or max_volumes < 1:
        raise ValueError(f"min_size must be at least 2 and max_volumes at least 1, got {min_size} and {max_volumes}.")
    scans = _prepare(
        dataset_dir,
        output_dir,
        skip_unreadable,
        min_size,
        max_volumes,
        subject_pattern,
        num_workers,
        val_fraction,
        seed,
    )
    data = {
        split: [item for scan in scans if scan.split in (split, "both") for item in _items(scan)]
        for split in ("training", "validation")
    }
    if not data["training"]:
        raise ValueError(
            f"nothing to train on in {dataset_dir}: all its usable scans are for validation or testing; move some to "
            'its list "training" or its imagesTr/.'
        )
    keep_datalist(data, output_dir)
    return data


def prepare_test_scans(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    skip_unreadable: bool = True,
    subject_pattern: str | None = None,
    num_workers: int = 2,
) -> list[dict]:
    """The scans to evaluate on, with or without label maps: those of the test split, else of "validation", else all.

    Args:
        dataset_dir: as `prepare_datalist` takes it; a list "test", or a folder's imagesTs/, is the test split.
        output_dir: gets `scans.csv` and `scan_check.json`.
        skip_unreadable: name the unusable scans in a warning and in `scans.csv`, and go on.
        subject_pattern: finds the subject in a path.
        num_workers: threads that read.

    Returns:
        the items, as in `prepare_datalist`.
    """
    scans = _prepare(
        dataset_dir,
        output_dir,
        skip_unreadable,
        min_size=2,
        max_volumes=4,
        subject_pattern=subject_pattern,
        num_workers=num_workers,
    )
    return [item for scan in scans for item in _items(scan)]


def _prepare(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike | None,
    skip_unreadable: bool,
    min_size: int,
    max_volumes: int,
    subject_pattern: str | None,
    num_workers: int,
    val_fraction: float | None = None,
    seed: int = 0,
) -> list[Scan]:
    """The usable scans, reported: split for training and validation or, without `val_fraction`, those to test on."""
    dataset_dir = existing(dataset_dir)
    output_dir = Path(output_dir) if output_dir is not None else None
    if output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)
    cache = Cache(output_dir / "scan_check.json" if output_dir else None)

    scans, labels, others = find_scans(datalist_of(dataset_dir), output_dir, num_workers, cache)
    if not is_null(subject_pattern):
        match_subjects(scans, subject_pattern)
    held_out: list[Scan] = []
    if val_fraction is not None:
        held_out = [scan for scan in scans if scan.split == "test"]
        scans = [scan for scan in scans if scan.split != "test"]
    else:
        chosen = test_split({scan.split for scan in scans}, dataset_dir)
        scans = [scan for scan in scans if chosen in ("", scan.split)]
    _check_scans(scans, min_size, max_volumes, num_workers, cache)
    scans.sort(key=lambda scan: (scan.relative, scan.series))
    usable = [scan for scan in scans if not scan.reason]
    unusable = [scan for scan in scans if scan.reason]
    name_scans(usable, dataset_dir.name)
    if val_fraction is None:
        for scan in usable:
            scan.split = "test"
    elif to_split := [scan for scan in usable if not scan.split]:
        split_subjects(to_split, val_fraction, seed)
    warn_of_overlap(usable + held_out, dataset_dir.name)

    left_out = {"label map": list(map(str, labels)), "test scan": [scan.label for scan in held_out]}
    summary = (
        f"{len(usable)} usable scans of {len({scan.subject for scan in usable})} subjects, {len(unusable)} unusable, "
        + "".join(f"{len(paths)} {what}s left out, " for what, paths in left_out.items() if paths)
        + f"{others} other files ignored."
    )
    rows = [*map(row_of, usable + unusable)]
    rows += [{"status": f"{what}, left out", "path": path} for what, paths in left_out.items() for path in paths]
    report(dataset_dir, output_dir, usable, unusable, rows, COLUMNS, summary)
    refuse(dataset_dir, unusable, "scans", skip_unreadable)
    if not usable and not held_out:
        raise ValueError(
            f"no usable scan in {dataset_dir}: looked, in all folders below it, for *.nii, *.nii.gz, .hdr/.img pairs "
            f"and MR DICOM series, and found {summary}"
        )
    return usable


class LazyDatalist(Mapping):
    """The lists that a function such as :func:`prepare_datalist` returns, which is called when one is first looked up.

    Never, where a client such as MONAI Label gives lists of its own: a config may be evaluated as a whole, and its data
    set need not exist then.

    Args:
        prepare: returns the lists.
        args: of it.
        kwargs: of it.
    """

    def __init__(self, prepare: Callable[..., dict[str, list[dict]]], *args, **kwargs) -> None:
        self._prepare = partial(prepare, *args, **kwargs)

    @cached_property
    def _lists(self) -> dict[str, list[dict]]:
        return self._prepare()

    def __getitem__(self, split: str) -> list[dict]:
        return self._lists[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lists)

    def __len__(self) -> int:
        return len(self._lists)


def keep_datalist(splits: dict[str, list[dict]], output_dir: str | os.PathLike | None) -> None:
    """Writes the split to `datalist.json`, a `dataset_dir` for later runs: what was held out of one stays so.

    Where the same scans serve for training and validation there is no list "validation", and they will again: a
    datalist names a file once.
    """
    if output_dir is None:
        return
    if splits["training"] == splits["validation"]:
        splits = {split: items for split, items in splits.items() if split != "validation"}
    listed = {}
    for split, items in splits.items():
        files = {str(item["image"]): item for item in items}  # of a 4D file there is an item for each volume
        keys = ("image", "label", "subject")
        listed[split] = [{key: item[key] for key in keys if key in item} for item in files.values()]
    write_atomically(Path(output_dir) / "datalist.json", json.dumps(listed, indent=1) + "\n")


def existing(dataset_dir: str | os.PathLike) -> Path:
    """The absolute path; raises `FileNotFoundError`, with the name that may have been meant, when there is none."""
    dataset_dir = Path(dataset_dir)
    if not dataset_dir.exists():
        siblings = [p.name for p in dataset_dir.parent.iterdir()] if dataset_dir.parent.is_dir() else []
        close = difflib.get_close_matches(dataset_dir.name, siblings, n=1)
        hint = f" Did you mean {dataset_dir.parent / close[0]}?" if close else ""
        raise FileNotFoundError(f"dataset_dir {dataset_dir} does not exist.{hint}")
    return dataset_dir.absolute()


def match_subjects(scans: list[Scan], pattern: str) -> None:
    """Gives each scan the subject that a regular expression finds in its path."""
    for scan in scans:
        match = re.search(pattern, str(scan.relative))
        if not match:
            raise ValueError(f"subject_pattern {pattern!r} does not match the path {scan.relative}.")
        scan.subject = match.group(1 if match.re.groups else 0)


def _check_scans(scans: list[Scan], min_size: int, max_volumes: int, num_workers: int, cache: Cache) -> None:
    """Gives each scan what the check found out, or the reason why it is unusable."""

    def check(scan: Scan) -> None:
        if scan.reason:
            return
        try:
            scan.check = cache.get(check_dicom if scan.series else check_nifti, scan.files, min_size)
        except Exception as error:
            scan.reason = reason_of(error)
            return
        if order := scan.check.get("order"):
            scan.files = [scan.files[i] for i in order]
        if volumes := scan.check.get("volumes"):
            chosen = np.linspace(0, len(volumes) - 1, min(max_volumes, len(volumes))).round().astype(int)
            scan.volumes = [volumes[i] for i in chosen]

    in_threads(check, scans, num_workers, cache, "checking scans")


def name_scans(scans: list[Scan], root_name: str, stem_first: bool = False) -> None:
    """Gives each scan a short unique name: its stem (DICOM: folder and series number), with folders where needed.

    Folders come before the stem, and special characters become `_`; or, with `stem_first`, the stem begins the name and
    is left as it is.
    """
    parts = []
    for scan in scans:
        folders = list(scan.relative.parts[:-1])
        last = stem(scan.relative.name)
        if scan.series:
            last = f"{folders.pop() if folders else root_name}_series{scan.series}"
        clean = [re.sub(r"[^\w.-]+", "_", part) for part in [*folders, last]]
        parts.append([*clean[:-1], last] if stem_first else clean)
    depth = [1] * len(scans)
    while True:
        names = ["_".join([p[-1], *p[-d:-1]] if stem_first else p[-d:]) for p, d in zip(parts, depth, strict=True)]
        taken = Counter(name.lower() for name in names)
        clash = [i for i, name in enumerate(names) if taken[name.lower()] > 1 and depth[i] < len(parts[i])]
        if not clash:
            break
        for i in clash:
            depth[i] += 1
    used: set[str] = set()
    for scan, name in zip(scans, names, strict=True):
        scan.name, n = name, 1
        while scan.name.lower() in used:
            n += 1
            scan.name = f"{name}-{n}"
        used.add(scan.name.lower())


def split_subjects(scans: list[Scan], val_fraction: float, seed: int) -> None:
    """Draws the validation subjects; the same for the same subjects and seed, whatever the order of the files."""
    subjects = sorted({scan.subject for scan in scans})
    random.Random(seed).shuffle(subjects)
    wanted = max(1, round(val_fraction * len(subjects))) if val_fraction else 0
    if wanted and len(subjects) == 1:
        logger.warning(
            f"All scans seem to be of one subject ({subjects[0]}), so the same scans serve for training and validation "
            "and the validation loss says nothing about other people. If they are of several, say how a path names the "
            "subject, for example --subject_pattern 'patient[0-9]+'."
        )
        for scan in scans:
            scan.split = "both"
        return
    validation = set(subjects[: min(wanted, len(subjects) - 1)])
    for scan in scans:
        scan.split = "validation" if scan.subject in validation else "training"


def warn_of_overlap(scans: list[Scan], root_name: str) -> None:
    """Says so when a datalist has one subject in two splits."""
    for splits in itertools.combinations(SPLITS, 2):
        first, second = ({scan.subject for scan in scans if scan.split == split} for split in splits)
        if both := first & second:
            logger.warning(f"{root_name} has scans of {', '.join(sorted(both))} in {splits[0]} and in {splits[1]}.")


def test_split(splits: Collection[str], dataset_dir: Path) -> str:
    """The one to evaluate on of the splits that a data set has; empty, with a warning, for all of it."""
    for split in ("test", "validation"):
        if split in splits:
            return split
    logger.warning(
        f'{dataset_dir} has no test split (a list "test" in dataset.json; or imagesTs/, and labelsTs/ for labels): '
        "all its scans are evaluated, with those that may have been trained on."
    )
    return ""


def _items(scan: Scan) -> list[dict]:
    """The datalist's items of a scan: one, or one for each volume."""
    files = [str(path) for path in scan.files]
    image = files if scan.series else files[0]
    item = {"image": image, "subject": scan.subject, "name": scan.name, "version": scan.version}
    return [item | {"name": f"{scan.name}_vol{v:03d}", "volume": v} for v in scan.volumes] or [item]


def row_of(scan: Scan) -> dict[str, str]:
    volumes = f"volumes {' '.join(map(str, scan.volumes))} of a 4D file" if scan.volumes else ""
    status = f"unusable: {scan.reason}" if scan.reason else "; ".join(filter(None, ["usable", volumes, scan.note]))
    return {
        "name": scan.name,
        "subject": scan.subject,
        "split": scan.split,
        "format": scan.format,
        "shape": by(scan.check.get("shape", [])),
        "spacing_mm": by(scan.check.get("spacing", [])),
        "orientation": scan.check.get("orientation", ""),
        "status": status,
        "path": scan.label,
    }


def report(
    dataset_dir: Path,
    output_dir: Path | None,
    usable: list[Scan],
    unusable: list[Scan],
    rows: list[dict[str, str]],
    columns: Sequence[str],
    summary: str,
) -> None:
    """Writes `scans.csv` and logs the usable scans in a table (the first rows), the unusable ones and the summary."""
    if output_dir:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(output_dir / "scans.csv", table.getvalue())
    if usable:
        shown = columns[: columns.index("status")]
        logger.info(f"Scans in {dataset_dir}:\n{_table(rows[: len(usable)], shown)}")
    for scan in unusable:
        logger.warning(f"Unusable: {scan.label}: {scan.reason}.")
    logger.info(summary + (f" All rows are in {output_dir / 'scans.csv'}." if output_dir else ""))


def refuse(dataset_dir: Path, unusable: list[Scan], what: str, skip_unreadable: bool) -> None:
    """Raises `ValueError` naming what cannot be used, unless it is to be skipped."""
    if unusable and not skip_unreadable:
        named = "".join(f"\n  {scan.label}: {scan.reason}" for scan in unusable[:MAX_NAMED])
        more = f"\n  ... and {len(unusable) - MAX_NAMED} more" if len(unusable) > MAX_NAMED else ""
        raise ValueError(
            f"{len(unusable)} {what} in {dataset_dir} cannot be used:{named}{more}\n"
            "Mend or remove them, or pass --skip_unreadable true to go on without them."
        )


def _table(rows: list[dict[str, str]], columns: Sequence[str]) -> str:
    """The first rows in columns, for the log."""
    shown = [columns, *([row[column] for column in columns] for row in rows[:MAX_ROWS])]
    widths = [max(map(len, cells)) for cells in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in shown]
    return "\n".join(lines + ([f"... and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []))
