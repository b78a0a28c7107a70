"""What was found, as scans.csv, as a table in the log, and as an error that names all that cannot be used."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from ..io.errors import list_text, size_text
from ..io.tables import format_table, write_csv
from .find import Found
from .labels import integer_ranges
from .options import DatasetOptions
from .scan import Scan

logger = logging.getLogger("sspformer")

MAX_ROWS = 30  # of the printed table
MAX_NAMED = 20  # unusable scans in the error
BIDS_LEFT_OUT = "no raw anatomical image of the BIDS data set, or none of bids_suffixes"
SHOWN = ("name", "subject", "split", "format", "shape", "spacing_mm", "orientation")


def report(found: Found, options: DatasetOptions) -> None:
    """Writes `scans.csv` and logs what was found.

    Raises:
        ValueError: naming the unusable scans, unless they are to be skipped; when no usable scan is left.
    """
    usable = sorted(found.usable, key=lambda scan: scan.split == "left out")
    rows = [_row(scan, found.labelled) for scan in usable + found.unusable]
    left_out = {"label map": found.label_maps, BIDS_LEFT_OUT: found.bids_left_out, "test scan": found.held_out}
    rows += [{"status": f"{what}, left out", "path": str(path)} for what, paths in left_out.items() for path in paths]
    rows += [{"status": f"left out: {what}", "path": str(path)} for path, what in found.foreign.items()]
    shown, more = ([*SHOWN, "labels"], ["label_path"]) if found.labelled else (SHOWN, [])
    if any(scan.target is not None for scan in usable):
        more = ["target"]
        for scan, row in zip(usable, rows):
            row["target"] = options.classes[scan.target] if isinstance(scan.target, int) else f"{scan.target:g}"
    if options.output_dir:
        write_csv(options.output_dir / "scans.csv", rows, [*shown, "status", "path", *more])
    if usable:
        logger.info(f"Scans in {options.dataset_dir}:\n{format_table(rows[: len(usable)], shown, max_rows=MAX_ROWS)}")
    for scan in found.unusable:
        logger.warning(f"Unusable: {scan}: {scan.reason}.")
    summary = _summary(found)
    logger.info(summary + (f" All rows are in {options.output_dir / 'scans.csv'}." if options.output_dir else ""))
    if not options.skip_unreadable:
        hint = "Repair or remove them, or pass --data_options#skip_unreadable true to leave them out."
        raise_if_unusable(found, options.dataset_dir, hint)
    if not usable and not found.held_out:
        raise ValueError(f"no usable scan in {options.dataset_dir}, which must be {found.layout}. Found: {summary}")
    if found.labelled:
        _warn_of_labels(found)


def raise_if_unusable(found: Found, source: Path, hint: str) -> None:
    """Raises `ValueError` if a scan is unusable, naming all of them, their reasons and what to do."""
    if unusable := found.unusable:
        named = "".join(f"\n  {scan}: {scan.reason}" for scan in unusable[:MAX_NAMED])
        more = f"\n  ... and {len(unusable) - MAX_NAMED} more" if len(unusable) > MAX_NAMED else ""
        raise ValueError(
            f"{len(unusable)} of {len(found.scans)} {found.kind} in {source} cannot be used:{named}{more}\n{hint}"
        )


def _row(scan: Scan, labelled: bool) -> dict[str, str]:
    """The row of `scans.csv`."""
    volumes = f"volumes {' '.join(map(str, scan.volumes))} of a 4D file" if scan.volumes else ""
    status = f"unusable: {scan.reason}" if scan.reason else "; ".join(filter(None, ["usable", volumes, scan.note]))
    row = {
        "name": scan.name,
        "subject": scan.subject,
        "split": scan.split,
        "format": scan.format,
        "shape": size_text(scan.check.get("shape", [])),
        "spacing_mm": size_text(scan.check.get("spacing", [])),
        "orientation": scan.check.get("orientation", ""),
        "status": status,
        "path": str(scan),
    }
    if labelled:
        row |= {"labels": integer_ranges(scan.check.get("values", [])), "label_path": str(scan.label_path or "")}
    return row


def _summary(found: Found) -> str:
    usable, subjects = found.usable, {scan.subject for scan in found.usable}
    splits = ", ".join(f"{n} {split}" for split, n in sorted(Counter(scan.split for scan in usable).items()))
    parts = [f"{len(usable)} usable {found.kind} of {len(subjects)} subjects" + (f" ({splits})" if splits else "")]
    parts += [f"{len(found.unusable)} unusable"]
    counts = {
        "label maps left out": len(found.label_maps),
        f"files left out ({BIDS_LEFT_OUT})": len(found.bids_left_out),
        "test scans left out": len(found.held_out),
        "other files ignored": found.others + len(found.foreign),
    }
    return ", ".join(parts + [f"{count} {what}" for what, count in counts.items() if count]) + f"{found.advice}."


def _warn_of_labels(found: Found) -> None:
    """Says which label maps to train or to evaluate on are empty, and which classes are in none of them."""
    scans = [scan for scan in found.usable if scan.split in ("training", "both")] or found.usable
    if empty := [str(scan) for scan in scans if set(scan.check["values"]) == {0}]:
        logger.warning(f"The label map is empty (background only) for {list_text(empty)}.")
    seen = {0}.union(*(scan.check["values"] for scan in scans))
    if found.classes and (absent := found.classes - seen):
        logger.warning(f"The classes {integer_ranges(absent)} are in none of the {len(scans)} label maps.")
