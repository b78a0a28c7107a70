"""DICOM files grouped into series."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from tqdm.contrib.concurrent import thread_map

from ..io.dicom_in import as_number, dicom_frames, element, hash_voxels, header_text, open_dicom, quiet_dicom
from ..io.errors import reason_of
from ..io.files import digest, printable
from .cache import CheckCache

MR_STORAGE = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")  # MR images, enhanced ones
MIN_JOINED = 3  # slices: the distance of two would always be even
UNCLEAR = (
    "each file has a SeriesInstanceUID of its own, and nothing says that they are slices of one scan (if they are, "
    "dcm2niix -m y joins them)"
)


@quiet_dicom()
def dicom_header(files: list[Path]) -> dict[str, str]:
    """What groups and names a DICOM file (a list of one); identifiers leave here only as hashes."""
    ds = open_dicom(files[0], pixels=False)
    return {
        "series": digest(element(ds, "SeriesInstanceUID")),
        "instance": digest(element(ds, "SOPInstanceUID")),
        "study": digest(element(ds, "StudyInstanceUID")),
        "frame": digest(element(ds, "FrameOfReferenceUID")),
        "patient": digest(element(ds, "PatientID")),
        "person": digest([str(element(ds, key) or "") for key in ("PatientID", "PatientName", "PatientBirthDate")]),
        "place": _place(ds),
        "number": header_text(ds, "SeriesNumber") or "x",
        "modality": header_text(ds, "Modality"),
        "image": "yes" if element(ds, "Rows") or element(ds, "SOPClassUID") in MR_STORAGE else "",
        "enhanced": "yes" if as_number(element(ds, "NumberOfFrames")) > 1 else "",
        "concatenation": digest(element(ds, "ConcatenationUID")),
    }


def _place(ds: pydicom.Dataset) -> str:
    """A hash of the grid of each frame; empty if the header does not say."""
    try:
        grids = [(*frame["position"], *frame["orientation"], *frame["spacing"]) for frame in dicom_frames(ds)]
        return digest([ds.Rows, ds.Columns, (np.round(grids, 3) + 0.0).tolist()])  # + 0.0: no -0.0
    except Exception:  # the check will say what is wrong
        return ""


def read_headers(files: Sequence[Path], cache: CheckCache, num_workers: int) -> dict[Path, dict[str, str]]:
    """`dicom_header` of each file, or the "reason" why it has none."""
    if not files:
        return {}
    read = partial(_read_header, cache=cache)
    return dict(zip(files, thread_map(read, files, max_workers=num_workers, desc="reading headers", disable=None)))


def _read_header(path: Path, cache: CheckCache) -> dict[str, str]:
    try:
        return cache.get(dicom_header, [path])
    except Exception as error:
        return {"reason": f"corrupt DICOM file: {reason_of(error)}"}


class Series(NamedTuple):
    """The files of one scan."""

    files: list[Path]  # sorted
    note: str = ""
    reason: str = ""  # why it is unusable


def group_series(headers: Mapping[Path, dict], owners: Mapping[Path, Hashable], cache: CheckCache) -> list[Series]:
    """The files of each scan, without copies.

    Anonymisers and consoles repeat UIDs, or give each slice its own. So no UID is trusted alone:

    - Files belong together that share the SeriesInstanceUID (or the folder, if they have none), the patient, the study,
      the frame of reference and the owner. An enhanced file is a scan of its own, unless it is part of a concatenation.
    - Slices that each have a SeriesInstanceUID of their own are joined by their SeriesNumber.
    - Copies have equal voxels and geometry. Voxels are read only where two files may be copies.
    - Files of one place that differ belong to several scans. Their folders tell these apart; where they do not, the
      files get a reason that names two of them.

    Args:
        headers: of each file, see `dicom_header`.
        owners: of each file: what parts files whatever their headers say, such as the split of a datalist.
        cache: of the voxels' hashes.
    """
    rivals = _Rivals(headers, cache)
    groups, result = defaultdict(list), []
    for path, head in headers.items():
        scan = head["person"], head["study"], head["frame"], owners[path]
        instance = (head["concatenation"] or head["instance"]) if head["enhanced"] else ""
        groups[(*scan, head["series"] or str(path.parent), instance)].append(path)

    single = defaultdict(list)
    for (*scan, _, _), files in groups.items():
        head = headers[files[0]]
        if len(files) > 1 or head["enhanced"] or head["modality"] != "MR":
            result += rivals.part(sorted(files))
        else:
            single[(*scan, head["number"])].append(files[0])
    unclear = defaultdict(list)
    for (person, *_, owner, number), files in single.items():
        if number != "x" and len(files) >= MIN_JOINED:
            result += rivals.part(sorted(files))
        else:
            for path in files:
                unclear[person, owner, number, path.parent].append(path)
    return result + [Series(sorted(files), reason=UNCLEAR if len(files) > 1 else "") for files in unclear.values()]


class _Rivals:
    """Tells apart the scans of files whose headers say that they are one.

    Rivals are two files at one place or, in two folders, with one SOPInstanceUID. They are copies, or they clash.
    """

    def __init__(self, headers: Mapping[Path, dict], cache: CheckCache) -> None:
        self.headers, self.cache = headers, cache
        self.contents: dict[Path, Hashable] = {}

    def part(self, files: list[Path]) -> list[Series]:
        """The scans of these files, by the folders that tell them apart."""
        clash = self._clash(files)
        if not clash:
            first = {self._place(path): path for path in reversed(files)}
            copies = len(files) - len(first)
            return [Series(sorted(first.values()), f"{copies} duplicate files left out" if copies else "")]
        top = Path(os.path.commonpath([path.parent for path in files]))
        folders = _grouped(files, lambda path: path.relative_to(top).parts[:-1][:1])
        scans: list[list[Path]] = []
        for folder in sorted(folders, key=len, reverse=True):
            places = set(map(self._place, folder))
            copied = (s for s in scans if places <= set(map(self._place, s)) and not self._clash(s, folder))
            if scan := next(copied, None):
                scan += folder
            else:
                scans.append(folder)
        if len(scans) > 1 and all(self._clash(*two) for two in combinations(scans, 2)):
            parts = [series for scan in scans for series in self.part(sorted(scan))]
            note = "its UIDs are those of a scan in another folder, too"
            return [part._replace(note="; ".join(filter(None, [part.note, note]))) for part in parts]
        per_place = len(files) / len(set(map(self._place, files)))
        named = " and ".join(printable(path.relative_to(top.parent)) for path in clash)
        reason = (
            f"several images at one slice position ({per_place:.3g} on average, such as {named}: copies that differ, "
            "echoes, time points or diffusion directions in one series; convert it with dcm2niix)"
        )
        return [Series(files, reason=reason)]

    def _place(self, path: Path) -> Hashable:
        return self.headers[path]["place"] or path

    def _clash(self, files: Sequence[Path], others: Sequence[Path] = ()) -> tuple[Path, Path] | None:
        """The first two files that clash; with `others`, one of each."""
        every, others = [*files, *others], set(others)
        instances = [(path.parent, self.headers[path]["instance"]) for path in every]
        telling = len(set(instances)) == len(every) and len({uid for _, uid in instances}) > 1
        keys = [self._place, lambda path: self.headers[path]["instance"] or path] if telling else [self._place]
        for twins in (twins for key in keys for twins in _grouped(every, key)):
            for a, b in combinations(twins, 2):
                if (not others or (a in others) != (b in others)) and self._content(a) != self._content(b):
                    return a, b
        return None

    def _content(self, path: Path) -> Hashable:
        """What copies have in common."""
        if path not in self.contents:
            try:
                self.contents[path] = self._place(path), self.cache.get(hash_voxels, [path])["voxels"]
            except Exception:  # the check will say what is wrong
                self.contents[path] = path
        return self.contents[path]


def _grouped(files: Iterable[Path], key: Callable[[Path], Hashable]) -> list[list[Path]]:
    groups = defaultdict(list)
    for path in files:
        groups[key(path)].append(path)
    return list(groups.values())
