"""The options of a data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..options import NULL, PATH, SCHEMA, either, integer, is_null

MIN_SIZE = 2  # voxels along each side of any scan


TAKES = {
    **{name: SCHEMA[name].takes for name in ("val_fraction", "seed", "num_workers", "bids_suffixes")},
    **{name: SCHEMA[f"data_options#{name}"].takes for name in ("max_subjects", "skip_unreadable", "subject_pattern")},
    "dataset_dir": PATH,
    "output_dir": either(NULL, PATH),
    "min_size": integer(f"[{MIN_SIZE}, inf)"),
    "max_volumes": integer("[1, inf)"),
}


@dataclass(frozen=True)
class DatasetOptions:
    """What the functions ``prepare_*`` need to know of a data set.

    Values may come as a command line gives them: "null" for None, "false" for False. Nothing is read yet.

    Args:
        dataset_dir: the data set, see :mod:`sspformer.data`.
        output_dir: gets ``scans.csv`` (a row for each scan), ``datalist.json`` (the split, a ``dataset_dir`` for later
            runs) and ``scan_check.json`` (spares unchanged files another reading). None: nothing is written.
        classes: the values that label maps may hold: n for 0 to n - 1, names of those from 1 on, or a mapping such as
            {"0": "background", ...} or nnU-Net's {"background": 0, ...}. None: the "labels" of dataset.json if it has
            them, else any integers.
        val_fraction: fraction of the subjects to validate on, in [0, 1), unless the data set has a list "validation".
            Above 0 it means one subject at least; a single subject serves for both, with a warning.
        seed: of the split and of the choice of ``max_subjects``. The same subjects and seed give the same split.
        max_subjects: train on this many subjects, drawn from those to train on. A smaller number draws a subset of a
            larger one. None: all.
        skip_unreadable: continue without unusable scans instead of raising.
        subject_pattern: regular expression, searched in each path relative to the data set; its first group, or else
            the whole match, is the subject. None: BIDS names, DICOM's PatientID (hashed) or a guess from the path.
        bids_suffixes: what is a scan in a folder that is a BIDS data set (see :mod:`sspformer.data.bids`): the raw
            images of these suffixes, such as ("T1w", "bold"). None: the anatomical ones. "all": every image, also
            derivatives, maps and phases.
        min_size: fewest voxels along each side.
        max_volumes: most volumes of a 4D file, evenly spaced.
        num_workers: threads that read.

    Raises:
        ValueError: naming an option of the wrong type or out of its range.
    """

    dataset_dir: str | os.PathLike
    output_dir: str | os.PathLike | None = None
    classes: int | Sequence[str] | Mapping | None = None
    val_fraction: float = 0.15
    seed: int = 0
    max_subjects: int | None = None
    skip_unreadable: bool = False
    subject_pattern: str | None = None
    bids_suffixes: tuple[str, ...] | str | None = None
    min_size: int = 8
    max_volumes: int = 4
    num_workers: int = 2

    def __post_init__(self) -> None:
        values = {"classes": None if is_null(self.classes) else self.classes}
        for name, takes in TAKES.items():
            values[name] = takes.of(name, getattr(self, name))
        values |= {"dataset_dir": Path(values["dataset_dir"]).absolute(), "num_workers": max(1, values["num_workers"])}
        values["output_dir"] = None if values["output_dir"] is None else Path(values["output_dir"])
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen for everybody else

    @property
    def root(self) -> Path:
        """The folder of the data set."""
        return self.dataset_dir if self.dataset_dir.is_dir() else self.dataset_dir.parent
