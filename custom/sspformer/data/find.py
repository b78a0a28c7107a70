"""Which scans a data set holds, with or without label maps."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm.contrib.concurrent import thread_map

from ..io.errors import reason_of
from ..io.files import NIFTI_SUFFIX, stem
from .cache import CheckCache
from .folders import existing, is_dicom, nifti_files, scan_files
from .labels import label_values
from .lists import has_lists, read_datalist, read_json
from .naming import assign_subjects, is_label_path
from .options import DatasetOptions
from .scan import Scan, path_within
from .series import group_series, read_header

__all__ = ["Found", "find_pairs", "find_scans"]

logger = logging.getLogger("sspformer")

SCANS = (
    "a folder with *.nii, *.nii.gz, .hdr/.img pairs or MR DICOM series anywhere below it, one such file, or a datalist "
    '(JSON with a list "training")'
)
PAIRS = (
    "a folder with images/ and labels/ (or nnU-Net's imagesTr/ and labelsTr/) in which an image and its label map have "
    'the same name, or a dataset.json with a list "training" of {"image": path, "label": path}'
)
PAIRED_FOLDERS = (("images", "labels", ""), ("imagesTr", "labelsTr", ""), ("imagesTs", "labelsTs", "test"))
LABEL_MODALITIES = ("SEG", "RTSTRUCT")


@dataclass
class Found:
    """What a data set holds."""

    scans: list[Scan] = field(default_factory=list)
    held_out: list[Scan] = field(default_factory=list)  # of the test split, and not to be read
    label_maps: list[PurePosixPath] = field(default_factory=list)  # left out, for they are no scans
    others: int = 0  # files that are neither
    labelled: bool = False  # whether scans must have label maps
    classes: set[int] | None = None  # values that label maps may hold; None: any

    @property
    def kind(self) -> str:
        return "images with label maps" if self.labelled else "scans"

    @property
    def layout(self) -> str:
        """What such a data set must be."""
        return PAIRS if self.labelled else SCANS

    @property
    def usable(self) -> list[Scan]:
        return [scan for scan in self.scans if not scan.reason]

    @property
    def unusable(self) -> list[Scan]:
        return [scan for scan in self.scans if scan.reason]


def find_scans(options: DatasetOptions, cache: CheckCache, use_dataset_json: bool = True) -> Found:
    """Every NIfTI file and DICOM series of a folder, whose imagesTs/ is the test split, of a datalist or of a file.

    Args:
        options: see `DatasetOptions`; a folder's ``output_dir`` is not searched.
        cache: of DICOM headers.
        use_dataset_json: where a folder has a dataset.json with lists, they say which scans it holds.
    """
    source = existing(options.dataset_dir)
    file = source / "dataset.json"
    if use_dataset_json and file.is_file() and has_lists(read_json(file)):
        source = file
    if source.suffix.lower() == ".json" and source.is_file():
        return _sort_files(read_datalist(source), options, cache, listed=True)
    if source.is_file():
        return _sort_files({source: {}}, options, cache)
    found = Found()
    files = {}
    for path in scan_files(source, skip=options.output_dir):
        relative = path_within(path, source)
        if NIFTI_SUFFIX.search(path.name) and is_label_path(relative):
            found.label_maps.append(relative)
        else:
            files[path] = {"split": "test"} if relative.parts[0] == "imagesTs" else {}
    return _sort_files(files, options, cache, found)


def find_pairs(options: DatasetOptions, cache: CheckCache) -> Found:
    """Every image with its label map, by the names of the files or by the lists of a dataset.json.

    A label map or an image without the other gets its reason. Unlabelled images of the test split are left out.
    """
    source = existing(options.dataset_dir)
    file = source / "dataset.json" if source.is_dir() else source
    described = read_json(file) if file.suffix.lower() == ".json" and file.exists() else {}
    orphans: list[Path] = []
    if has_lists(described):
        files = read_datalist(file, with_labels=True)
    else:
        files, orphans = _pair_folders(options.root)
        if not files or (source.is_file() and not described):
            raise ValueError(f"found no labelled images in {source}: dataset_dir must be {PAIRS}.")
    labelled = {path: known for path, known in files.items() if "label_map" in known or known["split"] != "test"}
    if len(files) > len(labelled):
        logger.info(f"{len(files) - len(labelled)} unlabelled test images in {source} are left out.")
    for known in labelled.values():
        if "label_map" not in known:
            known.setdefault("reason", "it has no label map")
    names = described["labels"] if isinstance(described.get("labels"), Mapping) else None
    found = Found(labelled=True, classes=label_values(names if options.classes is None else options.classes))
    _sort_files(labelled, options, cache, found, listed=True)
    found.scans += [Scan([path], options.root, reason="a label map without an image") for path in orphans]
    return found


def _pair_folders(root: Path) -> tuple[dict[Path, dict], list[Path]]:
    """Images, with the label maps of the same relative path as fields of their `Scan`; and the label maps left over."""
    files, orphans = {}, []
    for images, labels, split in PAIRED_FOLDERS:
        if (root / images).is_dir() and ((root / labels).is_dir() or split):
            maps = {
                _case(path, root / labels): path for path in scan_files(root / labels) if NIFTI_SUFFIX.search(path.name)
            }
            files |= (found := dict(_pairs(root / images, root / labels, maps, split)))
            used = {known.get("label_map") for known in found.values()}
            orphans += [path for path in maps.values() if path not in used]
    return files, orphans


def _pairs(images: Path, labels: Path, maps: Mapping[str, Path], split: str) -> Iterator[tuple[Path, dict]]:
    for path in scan_files(images):
        if NIFTI_SUFFIX.search(path.name):
            case = _case(path, images)
        elif is_dicom(path):
            case = path.relative_to(images).parent.as_posix()
        else:
            continue
        known = {"split": split}
        without_channel, _, channel = case.rpartition("_")
        if case not in maps and without_channel in maps and re.fullmatch(r"\d{4}", channel):
            case = without_channel
            if channel != "0000":
                known["reason"] = "a further channel, and one is read: choose one for each label map in a dataset.json"
        if case in maps or not split:  # else it is an unlabelled test image
            known["label_map"] = maps.get(case, labels / f"{case.removesuffix('_0000')}.nii.gz")
        yield path, known


def _case(path: Path, folder: Path) -> str:
    return stem(path.relative_to(folder).as_posix())


def _sort_files(
    files: Mapping[Path, dict], options: DatasetOptions, cache: CheckCache, found: Found | None = None, listed=False
) -> Found:
    """Adds files to what was found: as scans, label maps or others.

    Args:
        files: with the fields that are known of their `Scan`.
        options: see `find_scans`.
        cache: see `find_scans`.
        found: gets them.
        listed: somebody lists these files as scans, so that a file that is none gets a reason.
    """
    found = found or Found()
    dicom = []
    for path, known in files.items():
        if nifti := nifti_files(path):
            found.scans.append(Scan(nifti, options.root, **known))
        elif is_dicom(path):
            dicom.append(path)
        elif listed or path.suffix.lower() in (".dcm", ".ima"):
            kind = "DICOM" if path.suffix.lower() == ".dcm" else "?"
            found.scans.append(Scan([path], options.root, kind, **known | {"reason": _why_neither(path)}))
        else:
            found.others += 1

    read = partial(read_header, cache=cache)
    workers = options.num_workers
    headers = thread_map(read, dicom, max_workers=workers, desc="reading DICOM headers", disable=None) if dicom else []
    series = {}
    for path, head in zip(dicom, headers, strict=True):
        if "reason" in head:
            found.scans.append(Scan([path], options.root, "DICOM", **files[path] | head))
        elif head["modality"] in LABEL_MODALITIES:
            found.label_maps.append(path_within(path, options.root))
        elif not head["image"] and not listed:  # reports, display states, directories
            found.others += 1
        else:
            series[path] = head
    for paths, copies in group_series(series, {path: files[path].get("split", "") for path in series}):
        note = f"{copies} duplicate files left out" if copies else ""
        head = series[paths[0]]
        found.scans.append(Scan(paths, options.root, "DICOM", note=note, header=head, **files[paths[0]]))
    assign_subjects(found.scans, options.root.name, options.subject_pattern)
    return found


def _why_neither(path: Path) -> str:
    """Why a file that is meant to be a scan is none."""
    if not path.exists():
        return reason_of(FileNotFoundError())
    if not path.stat().st_size:
        return "empty file (0 bytes)"
    return "neither NIfTI nor DICOM (dcmtk's dcmconv repairs raw DICOM that lacks the mark DICM at byte 128)"
