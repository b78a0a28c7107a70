"""Which scans a data set holds, and whose they are."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pydicom

from ..io.errors import reason_of
from ..io.files import NIFTI_NAME, NIFTI_SUFFIX, digest, stats
from .check import Cache, in_threads
from .naming import is_label_path, known_subject_of, subject_of

__all__ = [
    "Scan",
    "datalist_of",
    "dicom_header",
    "find_scans",
    "has_lists",
    "is_dicom",
    "path_within",
    "read_datalist",
    "read_json",
    "walk",
]

SPLITS = ("training", "validation", "test")  # the lists of a datalist


MR_STORAGE = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")  # MR images, enhanced ones


@dataclass
class Scan:
    """One NIfTI file (or .hdr/.img pair) or one DICOM series, and what is known of it."""

    files: list[Path]  # a series: its slice files, in slice order once checked
    relative: PurePosixPath  # relative to the data set: the NIfTI file, or the first file of the series
    format: str  # "NIfTI", "DICOM" or "?"
    series: str = ""  # DICOM series number
    subject: str = ""
    split: str = ""  # given by a datalist, or drawn: "training", "validation", "both" or, if given, "test"
    name: str = ""
    reason: str = ""  # why it is unusable
    note: str = ""
    check: dict = field(default_factory=dict)  # shape, spacing, orientation, volumes (4D) or order (DICOM)
    volumes: list[int] = field(default_factory=list)  # those to use of a 4D file
    label_map: Path | None = None  # of its segmentation

    @property
    def version(self) -> str:
        """A hash of the state of its files and its label map's: another one once any of them was written anew."""
        return digest(stats([*self.files, *self.label_files]))

    @property
    def label_files(self) -> list[Path]:
        """Its label map: a NIfTI file, or the .hdr and .img of a pair; empty without one."""
        files = [self.label_map] if self.label_map else []
        return files + [file.with_suffix(".img") for file in files if file.suffix.lower() == ".hdr"]

    @property
    def label(self) -> str:
        """How the scan is named in messages."""
        if not self.series:
            return str(self.relative)
        if len(self.files) == 1:
            return f"{self.relative} (DICOM series {self.series})"
        files = f"{len(self.files)} files such as {self.relative.name}"
        return f"{self.relative.parent}/ (DICOM series {self.series}, {files})"


def path_within(path: Path, root: Path) -> PurePosixPath:
    """A path relative to the data set's folder, also of a file outside it."""
    return PurePosixPath(*(part for part in Path(os.path.relpath(path, root)).parts if part != ".."))


def find_scans(
    dataset_dir: Path, output_dir: Path | None, num_workers: int, cache: Cache, given: Mapping[Path, dict] | None = None
) -> tuple[list[Scan], list[PurePosixPath], int]:
    """Every NIfTI file and DICOM series (a broken one with its reason), the label maps, the number of other files.

    Args:
        dataset_dir: a folder, whose imagesTs/ is its test split, one file or a datalist; absolute.
        output_dir: not searched.
        num_workers: threads that read DICOM headers.
        cache: of DICOM headers.
        given: look at these files only, none of which is a label map, and set these fields of their `Scan`.
    """
    root = dataset_dir if dataset_dir.is_dir() else dataset_dir.parent
    is_datalist = given is not None or (dataset_dir.is_file() and dataset_dir.suffix.lower() == ".json")
    is_folder = dataset_dir.is_dir() and not is_datalist
    if is_folder:
        files = walk(root, output_dir.resolve() if output_dir else None)
        given = {file: {"split": "test"} if root / "imagesTs" in file.parents else {} for file in files}
    elif is_datalist:
        given = read_datalist(dataset_dir) if given is None else given
    else:
        given = {dataset_dir: {}}

    scans: list[Scan] = []
    labels: list[PurePosixPath] = []
    dicom: list[Path] = []
    others = 0
    for path, known in given.items():
        header, voxels = path.with_suffix(".hdr"), path.with_suffix(".img")
        is_pair = path in (header, voxels) and header.exists() and voxels.exists()
        if is_folder and is_pair and path == voxels:
            continue  # it comes with its .hdr
        if is_folder and NIFTI_SUFFIX.search(path.name) and is_label_path(path_within(path, root)):
            labels.append(path_within(path, root))
        elif NIFTI_NAME.search(path.name):
            scans.append(Scan([path], path_within(path, root), "NIfTI", **known))
        elif is_pair:
            scans.append(Scan([header, voxels], path_within(path, root), "NIfTI", **known))
        elif is_dicom(path):
            dicom.append(path)
        elif path.suffix.lower() in (".dcm", ".ima") or is_datalist:
            reason = _why_neither(path)
            kind = "DICOM" if path.suffix.lower() == ".dcm" else "?"
            scans.append(Scan([path], path_within(path, root), kind, reason=reason, **known))
        else:
            others += 1

    def read_header(path: Path) -> dict[str, str]:
        try:
            return cache.get(dicom_header, [path])
        except Exception as error:
            return {"reason": f"corrupt DICOM file: {reason_of(error)}"}

    series: dict[tuple, list[tuple[Path, dict]]] = defaultdict(list)
    headers = in_threads(read_header, dicom, num_workers, cache, "reading DICOM headers")
    for path, head in zip(dicom, headers, strict=True):
        if "reason" in head:
            scans.append(Scan([path], path_within(path, root), "DICOM", reason=head["reason"], **given[path]))
        elif head["modality"] in ("SEG", "RTSTRUCT"):
            labels.append(path_within(path, root))
        elif not head["image"] and not is_datalist:  # reports, display states, directories
            others += 1
        else:
            uid = head["series"] or str(path.parent)
            # an enhanced file is a series of its own, unless one too large was written as several
            instance = (head["concatenation"] or head["instance"]) if head["enhanced"] else ""
            series[uid, instance, given[path].get("split")].append((path, head))

    dicom_scans: list[tuple[Scan, dict]] = []
    for members in series.values():
        unique = {head["instance"] or str(path): path for path, head in reversed(members)}  # the first file of each
        paths = sorted(unique.values())
        head = members[0][1]
        scan = Scan(paths, path_within(paths[0], root), "DICOM", series=head["number"], **given[paths[0]])
        if len(members) > len(paths):
            scan.note = f"{len(members) - len(paths)} duplicate files left out"
        dicom_scans.append((scan, head))
    _assign_subjects(scans, dicom_scans, root.name)
    return scans + [scan for scan, _ in dicom_scans], labels, others


def _assign_subjects(scans: list[Scan], dicom_scans: list[tuple[Scan, dict]], root_name: str) -> None:
    """Gives each scan its subject, unless a datalist did.

    Args:
        scans: NIfTI files and files that are no series.
        dicom_scans: with what `dicom_header` says of each.
        root_name: the subject of a path that says nothing.
    """
    known: dict[str, set[str]] = defaultdict(set)  # a person's BIDS or other well-known names, by the paths
    home: dict[str, PurePosixPath] = {}  # and the first folder

    def person_of(scan: Scan, head: dict) -> str:
        return head["patient"] or head["study"] or scan.label

    for scan, head in dicom_scans:
        person, folder = person_of(scan, head), scan.relative.parent
        known[person] |= {known_subject_of(folder)} - {""}
        home.setdefault(person, folder)
    for scan, head in dicom_scans:
        person = person_of(scan, head)
        # Several names for one PatientID: it is a filler such as "anonymous", and the path knows better.
        name = next(iter(known[person])) if len(known[person]) == 1 else known_subject_of(scan.relative.parent)
        if not name:
            name = _of_patient(head["patient"]) if head["patient"] else subject_of(home[person], root_name)
        scan.subject = scan.subject or name

    subject_by_patient = {head["patient"]: scan.subject for scan, head in dicom_scans if head["patient"]}
    for scan in scans:
        if not scan.subject:
            scan.subject = subject_of(scan.relative, root_name)
            # A NIfTI converted from a DICOM series beside it often carries the PatientID in its name.
            for word in filter(None, re.split(r"[\W_]+", scan.subject)):
                scan.subject = subject_by_patient.get(digest(word), scan.subject)


def _of_patient(patient: str) -> str:
    """The subject's name by the hash of a PatientID."""
    return f"dicom-{patient[:8]}"


def has_lists(described: Mapping) -> bool:
    """Whether the content of a dataset.json lists scans (nnU-Net's of version 2 does not)."""
    return any(isinstance(described.get(split), list) for split in SPLITS)


def datalist_of(dataset_dir: Path) -> Path:
    """The dataset.json of a folder if it lists scans, else the path itself."""
    file = dataset_dir / "dataset.json"
    return file if file.is_file() and has_lists(read_json(file)) else dataset_dir


def read_datalist(file: Path, with_labels: bool = False) -> dict[Path, dict]:
    """Files of an MSD-style datalist, each with its "split" and, if the list says so, its "subject".

    Args:
        file: JSON; its paths are relative to its folder.
        with_labels: give a file its "label_map" where the item has a "label".
    """
    lists = read_json(file)
    if not has_lists(lists):
        raise ValueError(
            f'the datalist {file} needs a list "training" of {{"image": path}} (and may have "validation" and "test").'
        )
    found: dict[Path, dict] = {}
    for split in SPLITS:
        for item in lists.get(split) or []:
            item = item if isinstance(item, dict) else {"image": item}
            images = item.get("image")
            images = [images] if isinstance(images, str) else images
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                raise ValueError(f'the datalist {file}: the item {item} of "{split}" has no "image" path.')
            # without a list "validation", be it empty, "training" is still to be split
            is_split = split == "test" or isinstance(lists.get("validation"), list)
            given = {"split": split if is_split else "", "subject": str(item.get("subject", ""))}
            if with_labels and isinstance(item.get("label"), str):
                given["label_map"] = file.parent / item["label"]
            if with_labels and len(images) > 1 and any(map(NIFTI_SUFFIX.search, images)):
                given["reason"] = 'several channels, and one is read: its "image" must be one file'
            for path in (file.parent / image for image in images):
                for one in walk(path) if path.is_dir() else [_first_channel(path)]:
                    if one in found:
                        raise ValueError(f'the datalist {file} lists {one} twice, the second time in "{split}".')
                    found[one] = given
    return found


def _first_channel(image: Path) -> Path:
    """The file that a dataset.json of nnU-Net (version 1) means, which lists `x_0000.nii.gz` as `x.nii.gz`."""
    first = image.with_name(NIFTI_SUFFIX.sub(r"_0000\g<0>", image.name))
    return first if first.exists() and not image.exists() else image


def read_json(file: Path) -> dict:
    """The object in a JSON file; raises `ValueError` naming the file."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"the datalist {file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f'the datalist {file} must hold a JSON object with lists such as "training".')
    return content


def walk(folder: Path, skip: Path | None = None) -> Iterator[Path]:
    """Every file below a folder, sorted; no hidden ones, no DICOMDIR, no folder twice (links may form loops)."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen or (skip is not None and real == str(skip)):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(files) if name[0] != "." and name.upper() != "DICOMDIR")


def is_dicom(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _why_neither(path: Path) -> str:
    """Why a file that is meant to be a scan is none."""
    if not path.exists():
        return reason_of(FileNotFoundError())
    if not path.stat().st_size:
        return "empty file (0 bytes)"
    return "neither NIfTI nor DICOM (dcmtk's dcmconv mends raw DICOM that lacks the mark DICM at byte 128)"


def dicom_header(files: list[Path]) -> dict[str, str]:
    """What groups and names a DICOM file (a list of one); identifiers leave here only as hashes."""
    ds = pydicom.dcmread(files[0], stop_before_pixels=True)
    return {
        "series": digest(ds.get("SeriesInstanceUID")),
        "instance": digest(ds.get("SOPInstanceUID")),
        "study": digest(ds.get("StudyInstanceUID")),
        "patient": digest(ds.get("PatientID")),
        "number": str(ds.get("SeriesNumber") or "x"),
        "modality": str(ds.get("Modality") or ""),
        "image": "yes" if ds.get("Rows") or ds.get("SOPClassUID") in MR_STORAGE else "",
        "enhanced": "yes" if int(ds.get("NumberOfFrames") or 1) > 1 else "",
        "concatenation": digest(ds.get("ConcatenationUID")),
    }
