"""Targets of whole scans: a class or a number for each subject, from a column of a table."""

from __future__ import annotations

import csv
import difflib
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..io.errors import list_text
from ..io.files import stem
from ..options import is_null
from .datalist import find_and_check, items_to_evaluate, lists_of
from .find import Found, find_scans
from .options import DatasetOptions
from .report import report
from .scan import Scan
from .split import hold_out_test, keep_test, split_subjects

logger = logging.getLogger("sspformer")

MISSING = ("", "n/a", "na", "nan", "null")  # BIDS writes n/a


@dataclass(frozen=True)
class TargetOptions(DatasetOptions):
    """Options of a data set whose scans have targets.

    Args:
        classes: names of the classes, in the order of the network's outputs; empty or None: targets are numbers.
        targets: table with a row for each subject: participants.tsv of BIDS, or any CSV or TSV with a header. Subjects
            are in its column participant_id, else in its first. None: participants.tsv beside the scans.
        target: column with the targets.

    Raises:
        ValueError: as :class:`DatasetOptions`; also if ``target`` is not given.
    """

    targets: str | os.PathLike | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "targets", None if is_null(self.targets) else Path(self.targets).absolute())
        object.__setattr__(self, "target", None if is_null(self.target) else str(self.target))

    def read(self) -> dict[str, str]:
        """The table, see :func:`read_table`."""
        return read_table(self.targets or self.root / "participants.tsv", self.target)


def prepare_targets(options: TargetOptions) -> dict[str, list[dict]]:
    """The scans to train and to validate on, with their targets. Each class is split by subject on its own.

    Returns:
        as :func:`prepare_datalist`. Items also have the "target": a number (float) or the index of a class (int).

    Raises:
        FileNotFoundError: when the data set or the table does not exist.
        ValueError: as :func:`prepare_datalist`; also naming subjects that the table lacks, unless ``skip_unreadable``;
            targets that are no numbers or no known class; rows of a subject that differ; classes of fewer than two
            subjects; numbers that are all the same.
    """
    table = options.read()

    def choose(found: Found, _) -> None:
        hold_out_test(found, options)
        assign_targets(found, table, options)
        check_targets(found.usable, options)

    found = find_and_check(find_scans, options, choose)
    split_subjects(found, options)
    report(found, options)
    return lists_of(found, options, "training", "validation")


def prepare_test_targets(options: TargetOptions) -> list[dict]:
    """The scans to evaluate on, with their targets: the test split, else that for validation, else all.

    Returns:
        items as :func:`prepare_targets` gives them.
    """
    table = options.read()

    def choose(found: Found, _) -> None:
        keep_test(found, options)
        assign_targets(found, table, options)

    return items_to_evaluate(find_scans, options, choose)


def target_classes(
    weights: str | os.PathLike, dataset_dir: str | os.PathLike, targets: str | os.PathLike | None, target: str | None
) -> list[str]:
    """Names of the classes, in the order of the network's outputs.

    Args:
        weights: file of a trained network. If the record of its training is beside it, the names are taken from there.
        dataset_dir, targets, target: see :class:`TargetOptions`. Without a record the names are the sorted values of
            the column.
    """
    record = Path(weights).with_name("checkpoint.json")
    names = json.loads(record.read_text()).get("class_names") if record.is_file() else None
    return names or sorted(set(TargetOptions(dataset_dir, targets=targets, target=target).read().values()) - {""})


def read_table(path: Path, column: str | None) -> dict[str, str]:
    """A column of a table, by subject without ``sub-``; a missing value is empty.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it has no such column, no rows, or rows of one subject that differ.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no table of targets at {path}: give a CSV or TSV file with a row for each subject with --targets."
        )
    lines = path.read_text(encoding="utf-8-sig").splitlines() or [""]
    rows = list(csv.DictReader(lines, delimiter=max("\t,;", key=lines[0].count)))
    columns = list(rows[0]) if rows else []
    if not rows:
        raise ValueError(f"the table {path} has no rows: it needs a header and a row for each subject.")
    if column not in columns:
        close = difflib.get_close_matches(str(column), columns, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        missing = f"no column {column!r}" if column else "no target chosen"
        raise ValueError(f"{path}: {missing}; {hint}name one with --target: {list_text(columns[1:])}.")
    key = "participant_id" if "participant_id" in columns else columns[0]
    values: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        value = (row[column] or "").strip()
        values[_plain(row[key] or "")].add("" if value.lower() in MISSING else value)
    if several := [f"{subject} ({' and '.join(sorted(own))})" for subject, own in values.items() if len(own) > 1]:
        raise ValueError(
            f"{path} has rows of one subject that differ in {column}: {list_text(several)}. Keep one row for each."
        )
    return {subject: own.pop() for subject, own in values.items()}


def assign_targets(found: Found, table: Mapping[str, str], options: TargetOptions) -> None:
    """Gives each scan its target. One that has no row gets a reason; one whose target is missing is left out.

    A subject is looked up with and without ``sub-``, then by the name of the file.

    Raises:
        ValueError: when no scan has a row, or a target is no number or no known class.
    """
    used, left_out, bad = set(), set(), {}
    for scan in found.usable:
        keys = (scan.subject, scan.subject.rpartition("/")[2], stem(scan.relative.name))
        subject = next((key for key in map(_plain, keys) if key in table), None)
        if subject is None:
            scan.reason = f"its subject {scan.subject} has no row in the table of targets"
            continue
        used.add(subject)
        try:
            scan.target = _number_or_class(table[subject], options.classes)
        except ValueError:
            bad[subject] = table[subject]
        if scan.target is None:
            left_out.add(subject)
    if not used:
        subjects = sorted({scan.subject for scan in found.scans})
        raise ValueError(
            f"no subject of {options.dataset_dir} is in the table of targets: the scans are of "
            f"{list_text(subjects, 3)}, the table has {list_text(sorted(table), 3)}. Rename them, or set "
            "--data_options#subject_pattern."
        )
    if bad:
        named = list_text([f"{value!r} of {subject}" for subject, value in bad.items()])
        wanted, hint = f"a class ({list_text(list(options.classes or []))})", "add it to --class_names, or write n/a"
        if not options.classes:
            wanted, hint = "a finite number", "correct it, write n/a, or use configs/classification.json for classes"
        raise ValueError(f"the target {options.target} must be {wanted}, got {named}: {hint}.")
    if left_out:
        logger.warning(f"The target {options.target} is missing for {list_text(sorted(left_out))}: left out.")
        found.scans = [scan for scan in found.scans if scan.reason or scan.target is not None]
    if unused := sorted(set(table) - used):
        logger.warning(f"{len(unused)} subjects in the table of targets have no scan here: {list_text(unused)}.")


def check_targets(scans: Sequence[Scan], options: TargetOptions) -> None:
    """Raises `ValueError` when nothing can be learned from the targets of the subjects to train and validate on."""
    targets = {scan.subject: scan.target for scan in scans}
    if not options.classes:
        if len(set(targets.values())) == 1:
            raise ValueError(f"the target {options.target} is {targets.popitem()[1]:g} for all subjects.")
        return
    counts = Counter(options.classes[index] for index in targets.values())
    few = [f"{name} ({counts[name]})" for name in options.classes if counts[name] < 2]
    if few or len(options.classes) < 2:
        raise ValueError(
            f"a classification needs two classes or more, and two subjects of each, to train and to validate on; "
            f"of the target {options.target}, too few subjects have {list_text(few or list(options.classes))}. Write "
            "n/a for them to leave them out and name the others with --class_names, or use configs/regression.json if "
            "the target is a number."
        )


def _number_or_class(value: str, classes: Sequence[str] | None) -> int | float | None:
    if not value:
        return None
    if classes:
        return list(classes).index(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _plain(subject: str) -> str:
    return subject.strip().removeprefix("sub-")
