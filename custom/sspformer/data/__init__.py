"""From a folder of scans, whatever it holds, to a checked datalist that is split by subject; and reading its items.

`prepare_datalist` finds NIfTI files and DICOM series, reads every one of them once (a truncated file or a NaN voxel
shows only in the data), says in plain words what cannot be used, and splits by subject. `prepare_pairs` does so for
images with label maps, `prepare_test_scans` and `prepare_test_data` choose those to evaluate on, and `find_inputs`
finds the scans to infer from. `LoadScand` reads the items of all of them.
No patient identity of a DICOM header reaches a name, a log or a file: a PatientID is used only through its hash.

Each module knows only those before it: ``naming`` (what a path says), ``reading`` (voxels and affine, or the reason why
not), ``checking`` (whether a scan can be trained on), ``finding`` (which scans there are, and whose), ``datalist``, and
on top of it ``pairs`` and ``inputs``; ``caching`` keeps what was preprocessed.
"""

from .cache import CachedDataset, file_hashing
from .check import Cache, check_dicom, check_header, check_label, check_nifti, in_threads
from .datalist import (
    LazyDatalist,
    existing,
    keep_datalist,
    match_subjects,
    name_scans,
    prepare_datalist,
    prepare_test_scans,
    refuse,
    report,
    row_of,
    split_subjects,
    test_split,
    warn_of_overlap,
)
from .device_loader import DeviceLoader, ScanBuffer
from .find import (
    Scan,
    datalist_of,
    dicom_header,
    find_scans,
    has_lists,
    is_dicom,
    path_within,
    read_datalist,
    read_json,
    walk,
)
from .inputs import find_inputs
from .labels import class_names, class_weights
from .naming import is_label_path, known_subject_of, subject_of
from .pairs import check_pairs, prepare_pairs, prepare_test_data

__all__ = [
    "DeviceLoader",
    "ScanBuffer",
    "Cache",
    "CachedDataset",
    "LazyDatalist",
    "Scan",
    "check_dicom",
    "check_header",
    "check_label",
    "check_nifti",
    "check_pairs",
    "class_names",
    "class_weights",
    "datalist_of",
    "dicom_header",
    "existing",
    "file_hashing",
    "find_inputs",
    "find_scans",
    "has_lists",
    "in_threads",
    "is_dicom",
    "is_label_path",
    "keep_datalist",
    "known_subject_of",
    "match_subjects",
    "name_scans",
    "path_within",
    "prepare_datalist",
    "prepare_pairs",
    "prepare_test_data",
    "prepare_test_scans",
    "read_datalist",
    "read_json",
    "refuse",
    "report",
    "row_of",
    "split_subjects",
    "subject_of",
    "test_split",
    "walk",
    "warn_of_overlap",
]
