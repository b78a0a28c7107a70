"""Images and their label maps: found, checked against each other, and split by subject."""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ..io.errors import by, reason_of
from ..io.files import NIFTI_SUFFIX, stem
from ..io.load import files_of
from ..options import is_null
from .check import Cache, check_dicom, check_label, check_nifti, in_threads
from .datalist import (
    COLUMNS,
    MAX_NAMED,
    existing,
    keep_datalist,
    match_subjects,
    name_scans,
    refuse,
    report,
    row_of,
    split_subjects,
    test_split,
    warn_of_overlap,
)
from .find import Scan, find_scans, has_lists, is_dicom, path_within, read_datalist, read_json, walk

__all__ = ["check_pairs", "prepare_pairs", "prepare_test_data"]

logger = logging.getLogger("sspformer")

FOLDERS = (("images", "labels", ""), ("imagesTr", "labelsTr", ""), ("imagesTs", "labelsTs", "test"))


COLUMNS_OF_PAIRS = (*COLUMNS[:-2], "labels", *COLUMNS[-2:], "label_path")


MAX_SHIFT = 0.1  # of the grids of an image and its label map against each other, in voxels


MAX_VALUES = 10  # label values named in a message


LAYOUTS = (
    "a folder with images/ and labels/ (or nnU-Net's imagesTr/ and labelsTr/) in which an image and its label map have "
    'the same name, or a dataset.json with a list "training" of {"image": path, "label": path}'
)


def prepare_pairs(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    classes: int | Mapping | None = None,
    val_fraction: float = 0.15,
    seed: int = 0,
    max_subjects: int | None = None,
    skip_unreadable: bool = False,
    min_size: int = 8,
    subject_pattern: str | None = None,
    num_workers: int = 2,
) -> dict[str, list[dict]]:
    """Finds, checks and splits the labelled images of a data set, before any training starts.

    Args:
        dataset_dir: a folder with images/ and labels/, or nnU-Net's imagesTr/ and labelsTr/ (and imagesTs/ with
            labelsTs/ as the test split), where both files have the same name, the image perhaps with nnU-Net's _0000;
            or an MSD-style dataset.json, or the folder that holds it, with paths relative to it, whose lists
            "training", "validation" (even an empty one) and "test" are the split.
        output_dir: gets `scans.csv`, a row a pair, and `scan_check.json`, which spares unchanged files another reading.
        classes: the label values that may occur: n for 0 to n - 1, or a mapping such as {"0": "background", ...} or
            nnU-Net's {"background": 0, ...}. None: those of dataset.json's "labels", if it has them, else any integers.
        val_fraction: fraction of the subjects for validation, in [0, 1), where no list "validation" is given.
        seed: of the split, and of the subjects drawn.
        max_subjects: train on so many subjects, drawn from the training split; fewer are a subset of more. None: all.
        skip_unreadable: go on without the unusable pairs instead of raising.
        min_size: fewest voxels along each side.
        subject_pattern: as in `prepare_datalist`.
        num_workers: threads that read.

    Returns:
        {"training": [...], "validation": [...], "test": [...]}, JSON-serialisable: "image" and "label" (paths; an image
        may be the list of a DICOM series' files), "subject", "name" (unique, fit for a file name) and "version"
        (another one once a file was written anew, so that no cache by item gives the old voxels).

    Raises:
        FileNotFoundError: when `dataset_dir` does not exist.
        ValueError: naming all pairs that do not fit (no label map, a label map without an image, other shape or affine,
            label values that are no class) or cannot be read, unless `skip_unreadable`; when no pair is left; when an
            argument is out of its range.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}.")
    if min_size < 2:
        raise ValueError(f"min_size must be at least 2, got {min_size}.")
    dataset_dir = existing(dataset_dir)
    pairs, allowed = _find_pairs(dataset_dir, output_dir, classes, min_size, subject_pattern, num_workers)
    usable = [pair for pair in pairs if not pair.reason]
    if to_split := [pair for pair in usable if not pair.split]:
        split_subjects(to_split, val_fraction, seed)
    warn_of_overlap(usable, dataset_dir.name)
    max_subjects = None if is_null(max_subjects) else max_subjects
    subjects = sorted({pair.subject for pair in usable if pair.split in ("training", "both")})
    if max_subjects is not None:
        drawn = random.Random(seed).sample(subjects, len(subjects))[: max(1, max_subjects)]
        for pair in usable:
            if pair.split == "training" and pair.subject not in drawn:
                pair.split = "left out"
    _report(dataset_dir, output_dir, pairs, skip_unreadable)
    if max_subjects is not None and not 1 <= max_subjects <= len(subjects):
        raise ValueError(
            f"max_subjects must be from 1 to {len(subjects)}, the subjects to train on, got {max_subjects}."
        )

    data = {
        "training": [pair for pair in usable if pair.split in ("training", "both")],
        "validation": [pair for pair in usable if pair.split in ("validation", "both")],
        "test": [pair for pair in usable if pair.split == "test"],
    }
    if not data["training"]:
        raise ValueError(f'nothing to train on in {dataset_dir}: its list "training" is missing or empty.')
    _warn_of_labels(data["training"], allowed)
    items = {split: [_item(pair) for pair in chosen] for split, chosen in data.items()}
    keep_datalist(items, output_dir)
    return items


def prepare_test_data(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    classes: int | Mapping | None = None,
    skip_unreadable: bool = True,
    subject_pattern: str | None = None,
    num_workers: int = 2,
) -> list[dict]:
    """The pairs to evaluate on: those of the list "test", else of "validation", else all; checked as for training.

    Args:
        dataset_dir: as `prepare_pairs` takes it, like the other arguments.
        output_dir: gets `scans.csv` and `scan_check.json`.
        classes: the label values that may occur.
        skip_unreadable: name the unusable pairs in a warning and in `scans.csv`, and go on.
        subject_pattern: finds the subject in a path.
        num_workers: threads that read.

    Returns:
        the items, as in `prepare_pairs`.
    """
    dataset_dir = existing(dataset_dir)
    pairs, allowed = _find_pairs(dataset_dir, output_dir, classes, 2, subject_pattern, num_workers, for_test=True)
    usable = [pair for pair in pairs if not pair.reason]
    for pair in usable:
        pair.split = "test"
    _report(dataset_dir, output_dir, pairs, skip_unreadable)
    _warn_of_labels(usable, allowed)
    return [_item(pair) for pair in usable]


def check_pairs(
    items: Sequence[Mapping],
    classes: int | Mapping | None = None,
    output_dir: str | os.PathLike | None = None,
    num_workers: int = 2,
) -> None:
    """Checks pairs that a client such as MONAI Label lists itself, as `prepare_pairs` checks those that it finds.

    Args:
        items: with "image", the path of a NIfTI file or the list of a DICOM series' files, and "label".
        classes: the label values that may occur, as of `prepare_pairs`.
        output_dir: gets `scan_check.json`.
        num_workers: threads that read.

    Raises:
        ValueError: naming all pairs that cannot be trained on, and why.
    """
    pairs = []
    for item in items:
        files = files_of(item["image"])
        series = "x" if len(files) > 1 or is_dicom(files[0]) else ""
        pairs.append(Scan(files, PurePosixPath(files[0].name), "?", series, label_map=Path(item["label"])))
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    cache = Cache(Path(output_dir) / "scan_check.json" if output_dir else None)
    allowed = _label_values(classes)

    def check(pair: Scan) -> None:
        pair.reason = "; ".join(_problems(pair, pair.files[0].parent, allowed, 2, cache))

    in_threads(check, pairs, num_workers, cache, "checking pairs")
    if unusable := [f"\n  {pair.files[0]}: {pair.reason}" for pair in pairs if pair.reason]:
        more = f"\n  ... and {len(unusable) - MAX_NAMED} more" if len(unusable) > MAX_NAMED else ""
        raise ValueError(
            f"{len(unusable)} of {len(pairs)} images with label maps cannot be trained on, mend or remove the label "
            f"maps:{''.join(unusable[:MAX_NAMED])}{more}"
        )


def _find_pairs(
    dataset_dir: Path,
    output_dir: str | os.PathLike | None,
    classes: int | Mapping | None,
    min_size: int,
    subject_pattern: str | None,
    num_workers: int,
    for_test: bool = False,
) -> tuple[list[Scan], set[int] | None]:
    """All pairs of a data set, or those to test on, checked and named; and the label values."""
    root = dataset_dir if dataset_dir.is_dir() else dataset_dir.parent
    given, orphans, described = _find_files(dataset_dir)
    allowed = _label_values(described if classes is None else classes)
    unlabelled = [file for file, known in given.items() if known["split"] == "test" and "label_map" not in known]
    if unlabelled:
        logger.info(f"{len(unlabelled)} unlabelled test images in {dataset_dir} are left out.")
    given = {file: known for file, known in given.items() if file not in unlabelled}
    if for_test and (split := test_split({known["split"] for known in given.values()}, dataset_dir)):
        given, orphans = {file: known for file, known in given.items() if known["split"] == split}, []

    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    cache = Cache(Path(output_dir) / "scan_check.json" if output_dir else None)
    pairs, _, _ = find_scans(dataset_dir, None, num_workers, cache, given)
    if not is_null(subject_pattern):
        match_subjects(pairs, subject_pattern)

    def check(pair: Scan) -> None:
        pair.reason = pair.reason or "; ".join(_problems(pair, root, allowed, min_size, cache))

    in_threads(check, pairs, num_workers, cache, "checking pairs")
    pairs += [
        Scan([label], path_within(label, root), "NIfTI", reason="a label map without an image") for label in orphans
    ]
    pairs.sort(key=lambda pair: (pair.relative, pair.series))
    name_scans([pair for pair in pairs if not pair.reason], root.name)
    return pairs, allowed


def _report(dataset_dir: Path, output_dir: str | os.PathLike | None, pairs: list[Scan], skip_unreadable: bool) -> None:
    """Writes and logs what was found; raises `ValueError` for unusable pairs, unless skipped, and when none is left."""
    root = dataset_dir if dataset_dir.is_dir() else dataset_dir.parent
    usable = sorted((pair for pair in pairs if not pair.reason), key=lambda pair: pair.split == "left out")
    unusable = [pair for pair in pairs if pair.reason]
    splits = Counter(pair.split for pair in usable)
    summary = (
        f"{len(usable)} usable pairs of {len({pair.subject for pair in usable})} subjects "
        f"({', '.join(f'{n} {split}' for split, n in sorted(splits.items()))}), {len(unusable)} unusable."
    )
    rows = [_row(pair, root) for pair in usable + unusable]
    report(dataset_dir, Path(output_dir) if output_dir else None, usable, unusable, rows, COLUMNS_OF_PAIRS, summary)
    refuse(dataset_dir, unusable, "images with label maps", skip_unreadable)
    if not usable:
        raise ValueError(f"no usable image with a label map in {dataset_dir}, which must be {LAYOUTS}.")


def _find_files(dataset_dir: Path) -> tuple[dict[Path, dict], list[Path], Mapping | None]:
    """The files of the images, each with fields of its `Scan`; label maps without an image; dataset.json's "labels"."""
    file = dataset_dir / "dataset.json" if dataset_dir.is_dir() else dataset_dir
    described = read_json(file) if file.suffix.lower() == ".json" and file.exists() else {}
    classes = described["labels"] if isinstance(described.get("labels"), Mapping) else None
    if has_lists(described):
        return read_datalist(file, with_labels=True), [], classes

    given, orphans, root = {}, [], dataset_dir if dataset_dir.is_dir() else dataset_dir.parent
    for images, labels, split in FOLDERS:
        if (root / images).is_dir() and ((root / labels).is_dir() or split):
            found, alone = _pair_folders(root / images, root / labels, split)
            given |= found
            orphans += alone
    if not given or (file == dataset_dir and not described):
        raise ValueError(f"found no labelled images in {dataset_dir}: dataset_dir must be {LAYOUTS}.")
    return given, orphans, classes


def _pair_folders(images: Path, labels: Path, split: str) -> tuple[dict[Path, dict], list[Path]]:
    """Images with the label maps of the same relative path, and the label maps left over."""

    def case(path: Path, folder: Path) -> str:
        return stem(path.relative_to(folder).as_posix())

    def files(folder: Path) -> Iterator[Path]:
        return (path for path in walk(folder) if path.suffix.lower() != ".img" or not path.with_suffix(".hdr").exists())

    maps = {case(path, labels): path for path in files(labels) if NIFTI_SUFFIX.search(path.name)}
    left, found = dict(maps), {}
    for path in files(images):
        if NIFTI_SUFFIX.search(path.name):
            name = case(path, images)
        elif is_dicom(path):
            name = path.relative_to(images).parent.as_posix()
        else:
            continue
        known = {"split": split}
        without_channel, _, channel = name.rpartition("_")
        if name not in maps and without_channel in maps and re.fullmatch(r"\d{4}", channel):
            name = without_channel
            if channel != "0000":
                known["reason"] = "a further channel, and one is read: choose one for each label map in a dataset.json"
        if name in maps or not split:  # else it is an unlabelled test image
            known["label_map"] = maps.get(name, labels / f"{name.removesuffix('_0000')}.nii.gz")
            left.pop(name, None)
        found[path] = known
    return found, list(left.values())


def _label_values(classes: int | Mapping | None) -> set[int] | None:
    """The label values of n classes, of {value: name} or of {name: value or values}; None for any."""
    if classes is None:
        return None
    if isinstance(classes, int):
        values = set(range(classes))
    elif isinstance(classes, Mapping):
        keys = [str(key) for key in classes]
        if all(key.isdecimal() for key in keys):
            values = set(map(int, keys))
        else:
            values = set()
            for value in classes.values():
                values |= set(map(int, value if isinstance(value, (list, tuple)) else [value]))
    else:
        raise ValueError(f"classes must be a number, a mapping or None, got {classes!r}.")
    if len(values) < 2:
        raise ValueError(f"classes must be at least 2, background included, got {classes!r}.")
    return values


def _problems(pair: Scan, root: Path, allowed: set[int] | None, min_size: int, cache: Cache) -> Iterator[str]:
    """Reads a pair, keeps what is found out in `pair.check`, and says all that is wrong with it."""
    try:
        pair.check = dict(cache.get(check_dicom if pair.series else check_nifti, pair.files, min_size))
        if order := pair.check.get("order"):
            pair.files = [pair.files[i] for i in order]
        if volumes := pair.check.get("volumes"):
            yield f"4D ({len(volumes)} volumes), and a label map belongs to one volume"
    except Exception as error:
        yield reason_of(error)
    if pair.label_map is None:
        yield "it has no label map"
        return
    label = f"its label map {path_within(pair.label_map, root)}"
    if not os.path.lexists(pair.label_map):
        yield f"{label} is missing"
        return
    try:
        found = cache.get(check_label, pair.label_files)
    except Exception as error:
        yield f"{label}: {reason_of(error)}"
        return
    pair.check["values"] = values = {int(value): count for value, count in found["values"].items()}
    if "shape" in pair.check:
        yield from (f"{label} {problem}" for problem in _misfits(pair.check, found))
    if allowed is not None and (unknown := sorted(set(values) - allowed)):
        known = f"the classes are {_compact(sorted(allowed))}; others need --class_names and --network_def#out_channels"
        yield f"{label} has unknown values {_compact(unknown)} ({known})"
    if set(values) == {0}:
        pair.note = "empty label map"


def _misfits(image: dict, label: dict) -> Iterator[str]:
    """In which ways a label map does not lie on the grid of its image."""
    if image["shape"] != label["shape"]:
        yield f"has another shape: {by(label['shape'])}, the image {by(image['shape'])}"
        return
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in image["shape"]))])
    shift = np.linalg.norm(corners @ np.subtract(image["affine"], label["affine"])[:3].T, axis=1).max()
    if shift > MAX_SHIFT * min(image["spacing"]):
        axes = image["orientation"], label["orientation"]
        turned = f", and its axes are {axes[1]}, the image's {axes[0]}" if axes[0] != axes[1] else ""
        yield f"has another affine: it lies up to {shift:.3g} mm off the image{turned}"


def _warn_of_labels(pairs: list[Scan], allowed: set[int] | None) -> None:
    """Says which label maps are empty, and which classes are in none."""
    if empty := [pair.label for pair in pairs if pair.note]:
        more = f" and {len(empty) - MAX_VALUES} more" if len(empty) > MAX_VALUES else ""
        logger.warning(f"The label map is empty (background only) for {', '.join(empty[:MAX_VALUES])}{more}.")
    if pairs and allowed and (absent := sorted(allowed - {0}.union(*(pair.check["values"] for pair in pairs)))):
        logger.warning(f"The classes {_compact(absent)} are in none of the {len(pairs)} label maps.")


def _compact(values: list[int]) -> str:
    """Sorted integers in words, as `0-3, 7`."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value, value])
    words = [str(low) if low == high else f"{low}-{high}" if low >= 0 else f"{low} to {high}" for low, high in runs]
    return ", ".join(words[:MAX_VALUES]) + (", ..." if len(words) > MAX_VALUES else "")


def _item(pair: Scan) -> dict:
    """The datalist's item of a pair."""
    files = [str(path) for path in pair.files]
    image = files if pair.series else files[0]
    known = {"subject": pair.subject, "name": pair.name, "version": pair.version}
    return {"image": image, "label": str(pair.label_map)} | known


def _row(pair: Scan, root: Path) -> dict[str, str]:
    """The row of `scans.csv`: that of the image, and what its label map holds."""
    label = "" if pair.label_map is None else str(path_within(pair.label_map, root))
    return row_of(pair) | {"labels": _compact(sorted(pair.check.get("values", []))), "label_path": label}
