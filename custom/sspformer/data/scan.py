"""One scan of a data set."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from ..io.files import digest, printable, stats


@dataclass
class Scan:
    """A NIfTI file (or .hdr/.img pair) or a DICOM series, perhaps with its label map, and what is known of it."""

    files: list[Path]  # of a series: in slice order once checked
    root: Path  # the folder of the data set
    format: str = "NIfTI"  # or "DICOM", or "?"
    label_map: Path | None = None
    target: float | int | None = None  # of a whole scan: a number, or the index of a class
    subject: str = ""
    split: str = ""  # "training", "validation", "both", "test" or "left out"
    name: str = ""  # unique, fit for a file name
    reason: str = ""  # why it is unusable
    note: str = ""
    header: dict[str, str] = field(default_factory=dict)  # see `dicom_header`; empty for NIfTI
    check: dict = field(default_factory=dict)  # see `check_nifti` and `check_dicom`; "values" of the label map
    volumes: list[int] = field(default_factory=list)  # to use of a 4D file

    @cached_property
    def relative(self) -> PurePosixPath:
        """Its path relative to the data set; of a series: that of the first file by name."""
        return path_within(min(self.files), self.root)

    @property
    def series(self) -> str:
        """The number of a DICOM series; empty for a NIfTI file."""
        return self.header.get("number", "")

    @property
    def label_path(self) -> PurePosixPath | None:
        """The path of its label map relative to the data set."""
        return self.label_map and path_within(self.label_map, self.root)

    @property
    def label_files(self) -> list[Path]:
        """The files of its label map: one, two (.hdr and .img) or none."""
        files = [self.label_map] if self.label_map else []
        return files + [file.with_suffix(".img") for file in files if file.suffix.lower() == ".hdr"]

    def __str__(self) -> str:
        """How messages name it."""
        if not self.series:
            return str(self.relative)
        if len(self.files) == 1:
            return f"{self.relative} (DICOM series {self.series})"
        files = f"{len(self.files)} files such as {self.relative.name}"
        return f"{self.relative.parent}/ (DICOM series {self.series}, {files})"

    def items(self) -> list[dict]:
        """Its items in a datalist: one, or one for each volume.

        "version" changes whenever a file of the scan or of its label map is written again, so that no cache by item
        returns the old voxels.
        """
        files = [str(path) for path in self.files]
        item = {"image": files if self.series else files[0]}
        if self.label_map:
            item["label"] = str(self.label_map)
        if self.target is not None:
            item["target"] = self.target
        version = digest(stats([*self.files, *self.label_files]))
        item |= {"subject": self.subject, "name": self.name, "version": version}
        return [item | {"name": f"{self.name}_vol{v:03d}", "volume": v} for v in self.volumes] or [item]


def path_within(path: Path, root: Path) -> PurePosixPath:
    """A path relative to the data set's folder, to print; of a file outside it, too."""
    return PurePosixPath(*(printable(part) for part in Path(os.path.relpath(path, root)).parts if part != ".."))
