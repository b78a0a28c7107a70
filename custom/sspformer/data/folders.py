"""What lies in a folder."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from ..io.files import NIFTI_NAME

__all__ = ["existing", "is_dicom", "nifti_files", "scan_files", "walk"]


def existing(path: Path) -> Path:
    """The path of a data set; raises `FileNotFoundError`, with the name that may have been meant, if it is missing."""
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise FileNotFoundError(f"dataset_dir {path} does not exist.{hint}")
    return path


def walk(folder: Path, skip: Path | None = None) -> Iterator[Path]:
    """Every file below a folder, sorted; no hidden ones, no DICOMDIR, no folder twice (links may form loops)."""
    seen = {os.path.realpath(skip)} if skip else set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(files) if name[0] != "." and name.upper() != "DICOMDIR")


def nifti_files(path: Path) -> list[Path]:
    """The files of a NIfTI scan by the name of one: the file itself, .hdr and .img, or nothing if it is no NIfTI."""
    if NIFTI_NAME.search(path.name):
        return [path]
    pair = [path.with_suffix(".hdr"), path.with_suffix(".img")]
    return pair if path in pair and all(file.exists() for file in pair) else []


def scan_files(folder: Path, skip: Path | None = None) -> Iterator[Path]:
    """As `walk`; of an .hdr/.img pair only the .hdr."""
    return (path for path in walk(folder, skip) if path in nifti_files(path)[:1] or not nifti_files(path))


def is_dicom(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
