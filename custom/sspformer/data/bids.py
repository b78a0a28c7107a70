"""Which files of a BIDS data set are scans (https://bids-specification.readthedocs.io)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

DESCRIPTION = "dataset_description.json"
IMAGES = ("sub-*/anat/sub-*_*.nii*", "sub-*/ses-*/anat/sub-*_*.nii*")  # below a folder without a description
NOT_RAW = {"derivatives", "sourcedata", "code", "phenotype", "stimuli"}
TYPES = "anat|dwi|fmap|func|perf|pet|swi|eeg|ieeg|meg|micr|motion|mrs|nirs|beh"

#: suffixes of magnitude images in anat/, the deprecated ones too; maps such as T1map are none
ANATOMICAL = "T1w T2w PDw T2starw FLAIR inplaneT1 inplaneT2 PDT2 angio UNIT1 MEGRE MESE T2star FLASH PD".split()

_LAYOUT = re.compile(rf"(?:^|/)sub-[^/]+/(?:ses-[^/]+/)?(?P<type>{TYPES})/sub-[^/]+$")
_SUFFIX = re.compile(r"_(?P<suffix>[a-z0-9]+)\.nii(?:\.gz)?$", re.I)
_PHASE = re.compile(r"_part-(?!mag_)")  # or a real or imaginary part


def left_out_of_bids(root: Path, suffixes: tuple[str, ...] | str | None) -> Callable[[Path], bool]:
    """Tells of a file below a folder whether BIDS says that it is none of the raw images that are asked for.

    A file is in a BIDS data set if its path is ``sub-*/[ses-*/]TYPE/sub-*``, or if a folder above it has a
    ``dataset_description.json`` or images in ``sub-*/[ses-*/]anat/``. A root within ``derivatives/`` counts for itself.

    Args:
        root: the folder that is searched.
        suffixes: of the images, such as ("T1w", "bold"); None: `ANATOMICAL`; "all": everything, as in other folders.
    """

    @cache
    def described(folder: Path) -> bool:
        if (folder / DESCRIPTION).is_file() or any(any(folder.glob(images)) for images in IMAGES):
            return True
        stop = folder.parent == folder or (folder.name in NOT_RAW and root.is_relative_to(folder))
        return not stop and described(folder.parent)

    def left_out(path: Path) -> bool:
        layout = _LAYOUT.search(path.as_posix())
        if suffixes == "all" or not (layout or described(path.parent)):
            return False
        suffix = _SUFFIX.search(path.name)
        raw = layout and suffix and not NOT_RAW & set(path.relative_to(root).parts) and not _PHASE.search(path.name)
        if suffixes is None:
            return not (raw and layout["type"] == "anat" and suffix["suffix"] in ANATOMICAL)
        return not (raw and suffix["suffix"] in suffixes)

    return left_out
