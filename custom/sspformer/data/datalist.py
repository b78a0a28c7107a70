"""Datalists: the scans of a data set found, checked, split by subject and reported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from ..io.load import files_of
from .cache import CheckCache
from .check import check_scans
from .find import Found, find_pairs, find_scans
from .labels import label_values
from .listing import is_dicom, write_datalist
from .naming import name_scans
from .options import MIN_SIZE, DatasetOptions
from .report import raise_if_unusable, report
from .scan import Scan
from .split import hold_out_test, keep_test, split_subjects


def prepare_datalist(options: DatasetOptions) -> dict[str, list[dict]]:
    """The scans to train and to validate on, without those of the test split.

    Returns:
        {"training": [...], "validation": [...]}, no subject in both. Items are JSON-serialisable: "image" (path of a
        NIfTI file, or the list of a DICOM series' files in slice order), "subject", "name" (unique, fit for a file
        name), "version" (another one once a file was written again) and, for one volume of a 4D file, "volume".

    Raises:
        FileNotFoundError: when ``dataset_dir`` does not exist.
        ValueError: naming the unusable scans, unless ``skip_unreadable``; when no scan is left to train on; when a path
            does not match ``subject_pattern``; when ``max_subjects`` is out of its range.
    """
    found = find_and_check(find_scans, options, hold_out_test)
    split_subjects(found, options)
    report(found, options)
    return lists_of(found, options, "training", "validation")


def prepare_pairs(options: DatasetOptions) -> dict[str, list[dict]]:
    """The images with label maps to train, to validate and to test on.

    Returns:
        {"training": [...], "validation": [...], "test": [...]}; items are those of `prepare_datalist`, with a "label".

    Raises:
        FileNotFoundError: when ``dataset_dir`` does not exist.
        ValueError: as `prepare_datalist`, and naming all pairs that do not fit: no label map, a label map without an
            image, another shape or affine, label values that are no class.
    """
    found = find_and_check(find_pairs, options)
    split_subjects(found, options)
    report(found, options)
    return lists_of(found, options, "training", "validation", "test")


def prepare_test_scans(options: DatasetOptions) -> list[dict]:
    """The items of the scans to evaluate on: the test split, else that for validation, else all."""
    return items_to_evaluate(find_scans, options)


def prepare_test_pairs(options: DatasetOptions) -> list[dict]:
    """The items of the images with label maps to evaluate on: the test split, else that for validation, else all."""
    return items_to_evaluate(find_pairs, options)


def check_pairs(items: Sequence[Mapping], options: DatasetOptions) -> None:
    """Checks pairs that a client such as MONAI Label lists, as `prepare_pairs` checks those that it finds.

    Args:
        items: with "image", the path of a NIfTI file or the list of a DICOM series' files, and "label".
        options: of which ``classes``, ``output_dir`` and ``num_workers`` matter.

    Raises:
        ValueError: naming all pairs that cannot be trained on, and why.
    """
    if not items:
        return
    root = Path(os.path.commonpath([files_of(item["image"])[0].absolute().parent for item in items]))

    def listed(*_) -> Found:
        found = Found(labelled=True, classes=label_values(options.classes))
        for item in items:
            files = files_of(item["image"])
            header = {"number": "x"} if len(files) > 1 or is_dicom(files[0]) else {}
            found.scans.append(Scan(files, root, header=header, label_map=Path(item["label"])))
        return found

    found = find_and_check(listed, replace(options, min_size=MIN_SIZE))
    raise_if_unusable(found, root, "Correct or remove their label maps.")


def find_and_check(find: Callable[..., Found], options: DatasetOptions, choose: Callable | None = None) -> Found:
    """Finds scans, chooses among them, reads the chosen ones and names the usable ones."""
    with CheckCache(options.output_dir) as cache:
        found = find(options, cache)
        if choose:
            choose(found, options)
        check_scans(found.scans, found.classes, options, cache)
    found.scans.sort(key=lambda scan: (scan.relative, scan.series))
    name_scans(found.usable, options.dataset_dir.name)
    return found


def lists_of(found: Found, options: DatasetOptions, *splits: str) -> dict[str, list[dict]]:
    """The items of each split, which are also written to `datalist.json`."""
    lists = {split: [] for split in splits}
    for scan in found.usable:
        for split in ("training", "validation") if scan.split == "both" else (scan.split,):
            lists.get(split, []).extend(scan.items())
    if not lists["training"]:
        raise ValueError(
            f"nothing to train on in {options.dataset_dir}: all its usable {found.kind} are for validation or testing. "
            'Move some to its list "training" or its imagesTr/.'
        )
    if options.output_dir:
        write_datalist(lists, options.output_dir / "datalist.json")
    return lists


def items_to_evaluate(find: Callable[..., Found], options: DatasetOptions, choose: Callable = keep_test) -> list[dict]:
    found = find_and_check(find, replace(options, min_size=MIN_SIZE), choose)
    report(found, options)
    return [item for scan in found.usable for item in scan.items()]


class LazyDatalist(Mapping):
    """The lists of a function such as :func:`prepare_datalist`, which is called when one is first looked up.

    A client such as MONAI Label evaluates a config as a whole but gives lists of its own. The data set of the config
    need not exist then.

    Args:
        prepare: returns the lists.
        args: its arguments.
    """

    def __init__(self, prepare: Callable[..., dict[str, list[dict]]], *args) -> None:
        self._prepare = partial(prepare, *args)

    @cached_property
    def lists(self) -> dict[str, list[dict]]:
        return self._prepare()

    def __getitem__(self, split: str) -> list[dict]:
        return self.lists[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)
