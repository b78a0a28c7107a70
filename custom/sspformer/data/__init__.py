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

from .caching import CachedDataset, file_hashing
from .datalist import LazyDatalist, prepare_datalist, prepare_test_scans
from .inputs import find_inputs
from .naming import is_label_path, subject_of
from .pairs import check_pairs, from_client, prepare_pairs, prepare_test_data
from .reading import LoadScand

__all__ = [
    "CachedDataset",
    "LazyDatalist",
    "LoadScand",
    "check_pairs",
    "file_hashing",
    "find_inputs",
    "from_client",
    "is_label_path",
    "prepare_datalist",
    "prepare_pairs",
    "prepare_test_data",
    "prepare_test_scans",
    "subject_of",
]
