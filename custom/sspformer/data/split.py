"""Which scans are for training, for validation and for testing. No subject is split."""

from __future__ import annotations

import itertools
import logging
import random

from .find import Found
from .listing import SPLITS
from .options import DatasetOptions

logger = logging.getLogger("sspformer")


def hold_out_test(found: Found, options: DatasetOptions) -> None:
    """Holds out the test split, so that its scans are not even read."""
    found.held_out = [scan for scan in found.scans if scan.split == "test"]
    found.scans = [scan for scan in found.scans if scan.split != "test"]


def keep_test(found: Found, options: DatasetOptions) -> None:
    """Keeps the scans to evaluate on: the test split, else that for validation, else all, with a warning."""
    splits = {scan.split for scan in found.scans}
    chosen = next((split for split in ("test", "validation") if split in splits), None)
    if chosen:
        found.scans = [scan for scan in found.scans if scan.split == chosen]
    else:
        logger.warning(
            f'{options.dataset_dir} has no test split (a list "test" in dataset.json, or imagesTs/ and, for labels, '
            "labelsTs/): all its scans are evaluated, including those that may have been trained on."
        )
    for scan in found.scans:
        scan.split = "test"


def split_subjects(found: Found, options: DatasetOptions) -> None:
    """Draws the validation subjects, unless a datalist gives them, and the ``max_subjects`` to train on.

    The same subjects and seed give the same draw, whatever the order of the files.

    Raises:
        ValueError: when ``max_subjects`` exceeds the subjects to train on.
    """
    scans = found.usable
    if to_split := [scan for scan in scans if not scan.split]:
        classes = {scan.target for scan in to_split if isinstance(scan.target, int)}
        for target in sorted(classes) or [None]:  # each class on its own
            _draw_validation([scan for scan in to_split if target in (None, scan.target)], options)
    for splits in itertools.combinations(SPLITS, 2):
        first, second = ({s.subject for s in scans + found.held_out if s.split == split} for split in splits)
        if both := first & second:
            names = ", ".join(sorted(both))
            logger.warning(f"{options.dataset_dir.name} has scans of {names} in {splits[0]} and in {splits[1]}.")
    subjects = sorted({scan.subject for scan in scans if scan.split in ("training", "both")})
    if options.max_subjects is None or not subjects:
        return
    if options.max_subjects > len(subjects):
        raise ValueError(
            f"max_subjects must be from 1 to {len(subjects)}, the subjects to train on, got {options.max_subjects}."
        )
    drawn = random.Random(options.seed).sample(subjects, len(subjects))[: options.max_subjects]
    for scan in scans:
        if scan.split == "training" and scan.subject not in drawn:
            scan.split = "left out"


def _draw_validation(scans: list, options: DatasetOptions) -> None:
    subjects = sorted({scan.subject for scan in scans})
    random.Random(options.seed).shuffle(subjects)
    wanted = max(1, round(options.val_fraction * len(subjects))) if options.val_fraction else 0
    if wanted and len(subjects) == 1:
        logger.warning(
            f"All scans seem to be of one subject ({subjects[0]}), so the same scans serve for training and validation "
            "and the validation loss says nothing about other people. If they are of several, say how a path names the "
            "subject, for example --data_options#subject_pattern 'patient[0-9]+'."
        )
        for scan in scans:
            scan.split = "both"
        return
    validation = set(subjects[: min(wanted, len(subjects) - 1)])
    for scan in scans:
        scan.split = "validation" if scan.subject in validation else "training"
