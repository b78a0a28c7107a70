"""Whose a scan is, and what it is called."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from ..io.files import digest, stem
from .scan import Scan

_LABEL = r"(?:labels?|label-?maps?|(?:brain)?masks?|segs?|segmentations?|dseg|probseg|aseg|aparc|annotations?|rois?|gt)"

_LABEL_FOLDER = re.compile(rf"(?:.*[_\-. ])?(?:{_LABEL}|labels?(?:tr|ts|va|val))\d*|(?:labels?|masks?)[_\-. ].*", re.I)

_LABEL_STEM = re.compile(rf"(?:.*[_\-. ])?{_LABEL}[_\-]?\d*", re.I)


# Words that say what or when was scanned, never who.
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


# ADNI, OASIS, TCGA, BraTS: their session numbers would look like part of the subject.
_KNOWN = re.compile(r"\d{3}_S_\d{4,5}|OAS\d_?\d{4}|TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|BraTS-[A-Z]+-\d{5}", re.I)


def is_label_path(path: str | PurePosixPath) -> bool:
    """Whether a relative path names a label map: by a folder such as `labelsTr` or `masks`, or a stem such as `x_seg`.

    Only whole words count: `unmasked` and `image_segment` are scans.
    """
    path = PurePosixPath(path)
    return any(map(_LABEL_FOLDER.fullmatch, path.parent.parts)) or bool(_LABEL_STEM.fullmatch(stem(path.name)))


def subject_of(path: str | PurePosixPath, root_name: str = "dataset") -> str:
    """The subject of a scan, guessed from its path. In doubt two people become one, never one person two.

    A name that `known_subject_of` finds wins. Else each component, from the file upwards, loses its contrast and
    session words (`T1`, `flair`, `0001`, `ses-2`, `study1`, ...). The first with a digit left names the subject, else
    the first with anything left, else the data set as a whole.

    Args:
        path: of a NIfTI file or of the folder of a DICOM series, relative to the data set.
        root_name: returned when the path says nothing.
    """
    if known := known_subject_of(path):
        return known
    path = PurePosixPath(path)
    parts = [stem(path.name), *reversed(path.parent.parts)]
    names = [name for name in map(_without_words, parts) if name]
    return next((name for name in names if re.search(r"\d", name)), names[0] if names else root_name)


def known_subject_of(path: str | PurePosixPath) -> str:
    """The subject by BIDS or by the naming scheme of a well-known data set; empty if the path follows neither.

    A BIDS `sub-XXX` keeps the text before it and the folder above it, because several data sets have a `sub-01`.
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
    """A path component without the contrast, session and filler words at its ends."""
    previous = None
    while part != previous:
        previous, part = part, _LEADING.sub("", _TRAILING.sub("", part))
    return part


def assign_subjects(scans: Sequence[Scan], root_name: str, pattern: str | None = None) -> None:
    """Gives each scan its subject, unless a datalist did.

    Args:
        scans: of one data set.
        root_name: the subject of a path that says nothing.
        pattern: a regular expression that finds the subject in every path instead, also of scans in a datalist.

    Raises:
        ValueError: naming a path that does not match the pattern.
    """
    if pattern is not None:
        for scan in scans:
            match = re.search(pattern, str(scan.relative))
            if not match:
                raise ValueError(f"subject_pattern {pattern!r} does not match the path {scan.relative}.")
            scan.subject = match.group(1 if match.re.groups else 0)
        return

    series = [scan for scan in scans if scan.header]
    known: dict[str, set[str]] = defaultdict(set)  # the BIDS or other well-known names of a person, by the paths
    home: dict[str, PurePosixPath] = {}  # the first folder of a person
    for scan in series:
        known[_person(scan)] |= {known_subject_of(scan.relative.parent)} - {""}
        home.setdefault(_person(scan), scan.relative.parent)
    for scan in series:
        patient, names = scan.header["patient"], known[_person(scan)]
        # Several names for one PatientID: it is a filler such as "anonymous", and the path knows better.
        name = next(iter(names)) if len(names) == 1 else known_subject_of(scan.relative.parent)
        by_header = f"dicom-{patient[:8]}" if patient else subject_of(home[_person(scan)], root_name)
        scan.subject = scan.subject or name or by_header

    by_patient = {scan.header["patient"]: scan.subject for scan in series if scan.header["patient"]}
    for scan in scans:
        if not scan.subject:
            scan.subject = subject_of(scan.relative, root_name)
            # A NIfTI converted from a DICOM series beside it often carries the PatientID in its name.
            for word in filter(None, re.split(r"[\W_]+", scan.subject)):
                scan.subject = by_patient.get(digest(word), scan.subject)


def _person(scan: Scan) -> str:
    return scan.header["patient"] or scan.header["study"] or str(scan)


def name_scans(scans: Sequence[Scan], root_name: str, stem_first: bool = False) -> None:
    """Gives each scan a short unique name: its stem, with folders where needed.

    The stem of a DICOM series is the name of its folder and its number. Special characters become `_`.

    Args:
        scans: of one data set.
        root_name: the folder of a series that lies in none.
        stem_first: begin with the stem, and leave it as it is if it can be printed, instead of putting the folders
            before it.
    """
    parts = []
    for scan in scans:
        folders = list(scan.relative.parts[:-1])
        last = stem(scan.relative.name) or root_name
        if scan.series:
            last = f"{folders.pop() if folders else root_name}_series{scan.series}"
        clean = [re.sub(r"[^\w.-]+", "_", part) for part in [*folders, last]]
        parts.append([*clean[:-1], re.sub(r"[\x00-\x1f\x7f\\]", "_", last)] if stem_first else clean)
    depth = [1] * len(scans)
    while True:
        names = ["_".join([p[-1], *p[-d:-1]] if stem_first else p[-d:]) for p, d in zip(parts, depth, strict=True)]
        taken = Counter(name.lower() for name in names)
        clash = [i for i, name in enumerate(names) if taken[name.lower()] > 1 and depth[i] < len(parts[i])]
        if not clash:
            break
        for i in clash:
            depth[i] += 1
    used: set[str] = set()
    for scan, name in zip(scans, names, strict=True):
        numbered = (f"{name}-{n}" for n in itertools.count(2))
        scan.name = next(one for one in itertools.chain([name], numbered) if one.lower() not in used)
        used.add(scan.name.lower())
