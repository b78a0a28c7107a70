"""What a path says: label map or scan, and whose."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ..io.files import stem

__all__ = ["is_label_path", "known_subject_of", "subject_of"]

_LABEL = r"(?:labels?|label-?maps?|(?:brain)?masks?|segs?|segmentations?|dseg|probseg|aseg|aparc|annotations?|rois?|gt)"


_LABEL_FOLDER = re.compile(rf"(?:.*[_\-. ])?(?:{_LABEL}|labels?(?:tr|ts|va|val))\d*|(?:labels?|masks?)[_\-. ].*", re.I)


_LABEL_STEM = re.compile(rf"(?:.*[_\-. ])?{_LABEL}[_\-]?\d*", re.I)


# Words of a path that say what or when was scanned, and never who.
_WORD = r"""(?:
    t[12](?:w|wi|c|ce|gd|n|f|s|star|km|map|post|pre|flair|tse|fse|se|gre|mprage|spgr)? | flair | pdw? | [23]d
  | dwi? | dti | trace | adc | swi | bold | fmri | rest | asl | cbf | tof | mra | stir | epi | mp2?-?rage | spgr | tse
  | fse | gre | flash | b\d{1,4} | pre | post | ce | gd | contrast | weighted | fs | iso | \d+mm
  | ax(?:ial)? | sag(?:ittal)? | cor(?:onal)? | tra(?:ns(?:verse)?)? | hf[sp] | ff[sp] | [hf]fd[lr]
  | (?:ses|session|visit|run|echo|timepoint|tp|baseline|followup|day|week|month|year)(?:[-_]?\d+)?
  | (?:study|scan|series|time|acq|se|st|mr)(?:[-_]?\d{1,2})?
  | (?:ses|run|acq|task|rec|dir|echo|space|desc|res|part|inv)-[a-z0-9]+
)"""


_GENERIC = r"""(?:
    000[0-3] | images?(?:tr|ts|va)? | img | scans | volume | vol | data | mri | brain | head | anat | func | raw
  | rawdata | sourcedata | bids | nii | nifti | dicoms? | dcm | orig | train(?:ing)? | val(?:idation)? | test(?:ing)?
  | input | patients? | subjects? | cases? | (?:dataset|ds|site|center|centre|batch|cohort|group|fold|part)\d*
  | acpc | dc | restore | reg(?:istered)? | n4 | defaced? | bet | (?:skull)?-?stripped | preproc | mni(?:152)? | norm
)"""


_TRAILING = re.compile(rf"(?:^|[\W_]+)(?:{_WORD}|{_GENERIC})$", re.I | re.X)


_LEADING = re.compile(rf"^{_WORD}(?:[\W_]+|$)", re.I | re.X)


_BIDS = re.compile(r"^(?:.*?[_\-. ])?sub-[a-z0-9]+", re.I)


# Published naming schemes whose session numbers would look like part of the subject: ADNI, OASIS, TCGA, BraTS.
_KNOWN = re.compile(r"\d{3}_S_\d{4,5}|OAS\d_?\d{4}|TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|BraTS-[A-Z]+-\d{5}", re.I)


def is_label_path(path: str | PurePosixPath) -> bool:
    """Whether a relative path names a label map: a folder such as `labelsTr` or `masks`, or a stem such as `x_seg`.

    A word counts as a whole only: `unmasked` and `image_segment` are scans.
    """
    path = PurePosixPath(path)
    return any(map(_LABEL_FOLDER.fullmatch, path.parent.parts)) or bool(_LABEL_STEM.fullmatch(stem(path.name)))


def subject_of(path: str | PurePosixPath, root_name: str = "dataset") -> str:
    """The subject a scan belongs to, guessed from its path; in doubt two people become one, never one person two.

    A name that `known_subject_of` finds wins. Else, from the file upwards, each component is stripped of contrast and
    session words (`T1`, `flair`, `0001`, `ses-2`, `study1`, ...): the first with a digit left names the subject, else
    the first with anything left, else the data set as a whole.

    Args:
        path: of a NIfTI file, or of a folder with a DICOM series; relative to the data set.
        root_name: returned when the path says nothing.
    """
    if known := known_subject_of(path):
        return known
    path = PurePosixPath(path)
    parts = [stem(path.name), *reversed(path.parent.parts)]
    names = [name for name in map(_without_words, parts) if name]
    return next((name for name in names if re.search(r"\d", name)), names[0] if names else root_name)


def known_subject_of(path: str | PurePosixPath) -> str:
    """The subject by BIDS or by the naming scheme of a well-known data set; empty when the path follows neither.

    A BIDS `sub-XXX` keeps the text before it and the folder above it, as several data sets have a `sub-01`.
    """
    parts = PurePosixPath(path).parts
    for i, part in enumerate(parts):
        if match := _BIDS.match(part):
            above = parts[: parts.index("derivatives")] if "derivatives" in parts[:i] else parts[:i]
            telling = [folder for folder in above if re.fullmatch(r"ds\d+", folder) or _without_words(folder)]
            return "/".join([*telling[-1:], match.group()])
    match = _KNOWN.search("/".join(parts))
    return match.group() if match else ""


def _without_words(part: str) -> str:
    """A path component without the contrast, session and filler words at its ends; empty when nothing is left."""
    previous = None
    while part != previous:
        previous, part = part, _LEADING.sub("", _TRAILING.sub("", part))
    return part
