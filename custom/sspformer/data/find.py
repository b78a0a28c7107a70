"""Which scans a data set holds, with or without label maps, and whose they are."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..io.errors import reason_of
from ..io.files import NIFTI_SUFFIX
from ..io.formats import foreign_content, foreign_name, no_file
from .bids import left_out_of_bids
from .cache import CheckCache
from .labels import label_values
from .listing import existing, has_lists, is_dicom, nifti_files, pair_folders, read_datalist, read_json, scan_files
from .naming import assign_subjects, is_label_path
from .options import DatasetOptions
from .scan import Scan, path_within
from .series import group_series, read_headers

logger = logging.getLogger("sspformer")

LABEL_MODALITIES = ("SEG", "RTSTRUCT")
SCANS = (
    "a folder with *.nii, *.nii.gz, .hdr/.img pairs or MR DICOM series anywhere below it, one such file, or a datalist "
    '(JSON with a list "training")'
)
PAIRS = (
    "a folder with images/ and labels/ (or nnU-Net's imagesTr/ and labelsTr/) in which an image and its label map have "
    'the same name, or a dataset.json with a list "training" of {"image": path, "label": path}'
)


@dataclass
class Found:
    """What a data set holds."""

    scans: list[Scan] = field(default_factory=list)
    held_out: list[Scan] = field(default_factory=list)  # of the test split, and not to be read
    label_maps: list[PurePosixPath] = field(default_factory=list)  # left out, for they are no scans
    bids_left_out: list[PurePosixPath] = field(default_factory=list)  # images of a BIDS data set left out, see `bids`
    foreign: dict[PurePosixPath, str] = field(default_factory=dict)  # images of other formats, and what to do
    others: int = 0  # files that are none of these
    labelled: bool = False  # whether all scans must have label maps
    classes: set[int] | None = None  # values that label maps may hold; None: any

    @property
    def usable(self) -> list[Scan]:
        return [scan for scan in self.scans if not scan.reason]

    @property
    def unusable(self) -> list[Scan]:
        return [scan for scan in self.scans if scan.reason]

    @property
    def advice(self) -> str:
        """What images of other formats are and what to do with them, each kind once."""
        kinds = {what: path for path, what in reversed(self.foreign.items())}
        return "".join(f"; {path} is {what}" for what, path in kinds.items())

    @property
    def kind(self) -> str:
        return "images with label maps" if self.labelled else "scans"

    @property
    def layout(self) -> str:
        """What such a data set must be."""
        return PAIRS if self.labelled else SCANS


def find_scans(options: DatasetOptions, cache: CheckCache, use_dataset_json: bool = True) -> Found:
    """Every NIfTI file and DICOM series of a folder, whose imagesTs/ is the test split, of a datalist or of a file.

    Args:
        options: see `DatasetOptions`; the ``output_dir`` is not searched.
        cache: of DICOM headers.
        use_dataset_json: let the lists of a folder's dataset.json, if it has any, say which scans the folder holds.
    """
    source = existing(options.dataset_dir)
    if use_dataset_json and has_lists(read_json(source / "dataset.json")):
        source = source / "dataset.json"
    found = Found()
    if source.is_dir():
        files, bids_left_out = {}, left_out_of_bids(source, options.bids_suffixes)
        for path in scan_files(source, skip=options.output_dir):
            relative = path_within(path, source)
            if NIFTI_SUFFIX.search(path.name) and is_label_path(relative):
                found.label_maps.append(relative)
            elif bids_left_out(path) and not path.is_dir():
                if NIFTI_SUFFIX.search(path.name):
                    found.bids_left_out.append(relative)
                else:
                    found.others += 1
            else:
                files[path] = {"split": "test" if relative.parts[:1] == ("imagesTs",) else ""}
        _add_files(found, files, options, cache)
    elif source.suffix.lower() == ".json":
        _add_files(found, read_datalist(source), options, cache, listed=True)
    else:
        _add_files(found, {source: {}}, options, cache, listed=True)
    return found


def find_pairs(options: DatasetOptions, cache: CheckCache) -> Found:
    """Every image with its label map, by the names of the files or by the lists of a dataset.json.

    An image or a label map without the other gets its reason. Unlabelled images of the test split are left out.
    """
    source = existing(options.dataset_dir)
    file = source / "dataset.json" if source.is_dir() else source
    described = read_json(file) if file.suffix.lower() == ".json" else {}
    orphans: list[Path] = []
    if has_lists(described):
        files = read_datalist(file, with_labels=True)
    else:
        files, orphans = pair_folders(options.root)
        if not files or (source.is_file() and not described):
            raise ValueError(f"found no labelled images in {source}: dataset_dir must be {PAIRS}.")
    labelled = {path: known for path, known in files.items() if "label_map" in known or known["split"] != "test"}
    if len(files) > len(labelled):
        logger.info(f"{len(files) - len(labelled)} unlabelled test images in {source} are left out.")
    for known in labelled.values():
        if "label_map" not in known:
            known.setdefault("reason", "it has no label map")
    classes = described["labels"] if isinstance(described.get("labels"), Mapping) else None
    found = Found(labelled=True, classes=label_values(classes if options.classes is None else options.classes))
    _add_files(found, labelled, options, cache, listed=True)
    found.scans += [Scan([path], options.root, reason="a label map without an image") for path in orphans]
    return found


def _add_files(
    found: Found, files: Mapping[Path, dict], options: DatasetOptions, cache: CheckCache, listed: bool = False
) -> None:
    """Adds files to what was found: as scans, label maps or others.

    Args:
        found: gets them.
        files: with the fields that are known of their `Scan`.
        options: see `find_scans`.
        cache: see `find_scans`.
        listed: they are listed as scans, so that a file that is none gets a reason.
    """
    root, dicom = options.root, []
    for path, known in files.items():
        if nifti := nifti_files(path):
            found.scans.append(Scan(nifti, root, **known))
        elif is_dicom(path):
            dicom.append(path)
        elif listed or path.suffix.lower() in (".dcm", ".ima") or path.is_dir() or _is_closed(path):
            kind = "DICOM" if path.suffix.lower() == ".dcm" else "?"
            found.scans.append(Scan([path], root, kind, **known | {"reason": _why_neither(path)}))
        elif what := foreign_name(path.name):
            found.foreign[path_within(path, root)] = what
        else:
            found.others += 1

    series = {}
    for path, head in read_headers(dicom, cache, options.num_workers).items():
        if "reason" in head:
            found.scans.append(Scan([path], root, "DICOM", **files[path] | head))
        elif head["modality"] in LABEL_MODALITIES:
            found.label_maps.append(path_within(path, root))
        elif not head["image"] and not listed:  # reports, display states, directories
            found.others += 1
        else:
            series[path] = head
    owners = {path: tuple(files[path].get(key, "") for key in ("split", "label_map", "subject")) for path in series}
    for paths, note, reason in group_series(series, owners, cache):
        known = files[paths[0]]
        reason = known.get("reason") or reason
        found.scans.append(
            Scan(paths, root, "DICOM", header=series[paths[0]], **known | {"note": note, "reason": reason})
        )
    assign_subjects(found.scans, root.name, options.subject_pattern)


def _is_closed(path: Path) -> bool:
    return os.path.exists(path) and not os.access(path, os.R_OK)


def _why_neither(path: Path) -> str:
    """Why a file that is meant to be a scan is none, or a folder that cannot be read."""
    try:
        if what := no_file(path):
            return what
        if not path.stat().st_size:
            return "empty file (0 bytes)"
        with open(path, "rb") as file:
            if what := foreign_name(path.name) or foreign_content(file.read(348)):
                return f"neither NIfTI nor DICOM, but {what}"
    except OSError as error:
        return reason_of(error)
    return "neither NIfTI nor DICOM (dcmtk's dcmconv repairs raw DICOM that lacks the mark DICM at byte 128)"
