"""From a folder of scans, whatever it holds, to a checked datalist that is split by subject; and reading its items.

`prepare_datalist` finds NIfTI files and DICOM series, reads every one of them once (a truncated file or a NaN voxel
shows only in the data), says in plain words what cannot be used, and splits by subject. `LoadScand` reads its items.
No patient identity of a DICOM header reaches a name, a log or a file: a PatientID is used only through its hash.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import logging
import os
import random
import re
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
import pydicom
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import SpaceKeys
from tqdm import tqdm

__all__ = ["LoadScand", "is_label_path", "prepare_datalist", "subject_of"]

logger = logging.getLogger("sspformer")

CHECK_VERSION = 1  # raise it whenever the check below changes, so that results cached by an older one are not used
MAX_ROWS = 30  # rows of the printed table
MAX_NAMED = 20  # unusable files named in the error
DICOM_UNEVEN = 0.1  # largest deviation of a slice from its place in an even stack, as a fraction of the slice distance

NIFTI_VECTOR_INTENTS = {1005: "symmetric matrices", 1006: "a displacement field", 1007: "vectors", 2003: "colours"}


class _Unusable(ValueError):
    """A scan that cannot be used; the message is the reason, in words for the person who owns the scan."""


@dataclass
class _Scan:
    """One NIfTI file (or .hdr/.img pair) or one DICOM series, and what is known of it."""

    files: list[Path]  # a series: its slice files, in slice order once checked
    relative: PurePosixPath  # relative to the data set: the NIfTI file, or the first file of the series
    format: str  # "NIfTI" or "DICOM"
    series: str = ""  # DICOM series number
    subject: str = ""
    split: str = ""  # given by a datalist, or drawn
    name: str = ""
    reason: str = ""  # why it is unusable
    note: str = ""
    check: dict = field(default_factory=dict)  # shape, spacing, orientation, volumes (4D) or order (DICOM)

    @property
    def label(self) -> str:
        """How the scan is named in messages."""
        if not self.series:
            return str(self.relative)
        if len(self.files) == 1:
            return f"{self.relative} (DICOM series {self.series})"
        files = f"{len(self.files)} files such as {self.relative.name}"
        return f"{self.relative.parent}/ (DICOM series {self.series}, {files})"


# ---------------------------------------------------------------------------------------------------------------------
# What a path says: label map or scan, and whose
# ---------------------------------------------------------------------------------------------------------------------

_NIFTI_SUFFIX = re.compile(r"\.(nii|hdr|img)(\.gz)?$", re.I)
_NIFTI_NAME = re.compile(r"\.nii(\.gz)?$", re.I)

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


def _stem(name: str) -> str:
    return _NIFTI_SUFFIX.sub("", name)


def is_label_path(path: str | PurePosixPath) -> bool:
    """Whether a relative path names a label map: a folder such as `labelsTr` or `masks`, or a stem such as `x_seg`.

    A word counts as a whole only: `unmasked` and `image_segment` are scans.
    """
    *folders, name = PurePosixPath(path).parts
    return any(_LABEL_FOLDER.fullmatch(folder) for folder in folders) or bool(_LABEL_STEM.fullmatch(_stem(name)))


def _without_words(part: str) -> str:
    """A path component without the contrast, session and filler words at its ends; empty when nothing is left."""
    previous = None
    while part != previous:
        previous, part = part, _LEADING.sub("", _TRAILING.sub("", part))
    return part


def subject_of(path: str | PurePosixPath, root_name: str = "dataset") -> str:
    """The subject a scan belongs to, guessed from its path; in doubt two people become one, never one person two.

    A BIDS `sub-XXX` wins, with the text before it and the folder above it, as several data sets have a `sub-01`; then
    the schemes of well-known data sets. Else, from the file upwards, each component is stripped of contrast and session
    words (`T1`, `flair`, `0001`, `ses-2`, `study1`, ...): the first with a digit left names the subject, else the first
    with anything left, else the data set as a whole.

    Args:
        path: of a NIfTI file, or of a folder with a DICOM series; relative to the data set.
        root_name: returned when the path says nothing.
    """
    parts = list(PurePosixPath(path).parts)
    if not parts:
        return root_name
    parts[-1] = _stem(parts[-1])
    for i, part in enumerate(parts):
        if match := _BIDS.match(part):
            above = parts[: parts.index("derivatives")] if "derivatives" in parts[:i] else parts[:i]
            telling = [folder for folder in above if re.fullmatch(r"ds\d+", folder) or _without_words(folder)]
            return "/".join([*telling[-1:], match.group()])
    if match := _KNOWN.search("/".join(parts)):
        return match.group()
    names = [name for name in map(_without_words, reversed(parts)) if name]
    return next((name for name in names if re.search(r"\d", name)), names[0] if names else root_name)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _dicom_frames(ds: pydicom.Dataset) -> Iterator[dict[str, Sequence[float] | float]]:
    """Position, orientation, spacing and rescaling of each frame of a DICOM file (one frame, unless it is enhanced)."""
    enhanced = ds.get("PerFrameFunctionalGroupsSequence")
    if not enhanced and int(ds.get("NumberOfFrames") or 1) > 1:
        raise _Unusable("multi-frame DICOM without a position for each frame (convert it with dcm2niix)")
    shared = (ds.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]

    for frame in enhanced or [None]:

        def look(macro: str, keyword: str, default=None, frame=frame):
            if frame is None:
                value = ds.get(keyword)
            else:
                holders = (group[macro][0] for group in (frame, shared) if group.get(macro))
                value = next((holder.get(keyword) for holder in holders if holder.get(keyword) is not None), None)
            if value is None and default is None:
                raise _Unusable(f"no {keyword} in the DICOM header, so where its slices lie is unknown")
            return default if value is None else value

        yield {
            "position": np.array(look("PlanePositionSequence", "ImagePositionPatient"), float),
            "orientation": np.array(look("PlaneOrientationSequence", "ImageOrientationPatient"), float),
            "spacing": np.array(look("PixelMeasuresSequence", "PixelSpacing"), float),
            "slope": float(look("PixelValueTransformationSequence", "RescaleSlope", 1.0)),
            "intercept": float(look("PixelValueTransformationSequence", "RescaleIntercept", 0.0)),
        }


def _dicom_pixels(ds: pydicom.Dataset, name: str) -> np.ndarray:
    """Stored pixel values of a DICOM file, (frames, rows, columns); raises `_Unusable`."""
    if not any(keyword in ds for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise _Unusable("no pixel data in it")
    try:
        return np.asarray(ds.pixel_array).reshape(-1, int(ds.Rows), int(ds.Columns))
    except Exception as error:  # each decoder has its own exceptions
        syntax = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
        if syntax is not None and syntax.is_compressed and "RLE" not in syntax.name:
            raise _Unusable(
                f"its pixels are compressed ({syntax.name}) and cannot be decoded here: "
                "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
            ) from error
        raise _Unusable(f"truncated or corrupt: the pixels of {name} cannot be read") from error


def _stack_geometry(frames: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Order of the frames along the slice normal, and the affine (4, 4) of the stack (column, row, slice) to RAS mm.

    The affine is nibabel's (https://nipy.org/nibabel/dicom/dicom_orientation.html), with the axes of a NIfTI: index 0
    runs along a row of pixels. Raises `_Unusable` for slices of several orientations, duplicates and gaps.
    """
    first = frames[0]
    row, column = first["orientation"][:3], first["orientation"][3:]
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
        raise _Unusable("invalid ImageOrientationPatient in the DICOM header")
    if min(first["spacing"]) <= 0 or not np.isfinite(first["spacing"]).all():
        raise _Unusable("zero or non-finite PixelSpacing in the DICOM header")
    for frame in frames:
        if not np.allclose(frame["orientation"], first["orientation"], atol=1e-3):
            raise _Unusable("its slices have different orientations (a localizer?)")
        if not np.allclose(frame["spacing"], first["spacing"], rtol=1e-3):
            raise _Unusable("its slices have different pixel spacings")
    if len(frames) < 2:
        raise _Unusable("a 2D image (a single slice)")

    positions = np.array([frame["position"] for frame in frames])
    heights = positions @ np.cross(row, column)
    order = np.argsort(heights, kind="stable")
    positions, steps = positions[order], np.diff(heights[order])
    if steps.min() < 1e-3:
        per_position = len(frames) / (1 + np.count_nonzero(steps > 1e-3))
        raise _Unusable(
            f"several images at one slice position ({per_position:.3g} on average: duplicates, echoes, time points or "
            "diffusion directions in one series; convert it with dcm2niix)"
        )
    distance = np.median(steps)
    if np.abs(steps - distance).max() > DICOM_UNEVEN * distance:
        raise _Unusable(
            f"missing slices: they lie {steps.min():.3g} to {steps.max():.3g} mm apart, {distance:.3g} mm as a rule"
        )
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    line = positions[0] + np.arange(len(frames))[:, None] * step
    if np.abs(positions - line).max() > DICOM_UNEVEN * distance:
        raise _Unusable("its slices do not lie on one straight line")

    affine = np.eye(4)
    affine[:3, 0] = row * first["spacing"][1]  # PixelSpacing is (between rows, between columns)
    affine[:3, 1] = column * first["spacing"][0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return order, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's LPS to RAS


def _read_dicom(files: Sequence[str | Path], min_size: int = 2) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Reads one MR series.

    MONAI's PydicomReader is not used: it stacks a list of files as channels, and orders a folder by InstanceNumber.

    Args:
        files: of the series, in any order; or a single enhanced multi-frame file.
        min_size: fewest slices, checked before any pixel is decoded.

    Returns:
        the voxels (columns, rows, slices) float32, rescaled; the affine (4, 4) to RAS mm; and the order of the files.

    Raises:
        _Unusable: with the reason, when this is no stack of evenly spaced MR slices.
    """
    datasets, frames, owner = [], [], []
    for i, path in enumerate(files):
        ds = pydicom.dcmread(path)
        if ds.get("Modality") != "MR":
            raise _Unusable(f"not MR: the DICOM modality is {ds.get('Modality') or 'not given'}")
        if not ds.get("Rows") or not ds.get("Columns"):
            raise _Unusable("no pixel data in it")
        if int(ds.get("SamplesPerPixel") or 1) != 1 or "MONOCHROME" not in ds.get("PhotometricInterpretation", ""):
            raise _Unusable("a colour image (RGB or palette)")
        if (ds.Rows, ds.Columns) != ((datasets or [ds])[0].Rows, (datasets or [ds])[0].Columns):
            raise _Unusable("its slices have different shapes")
        datasets.append(ds)
        of_file = list(_dicom_frames(ds))
        frames += of_file
        owner += [i] * len(of_file)
    order, affine = _stack_geometry(frames)
    _check_size((datasets[0].Columns, datasets[0].Rows, len(frames)), min_size)

    volume = np.empty((len(frames), int(datasets[0].Rows), int(datasets[0].Columns)), np.float32)
    start = 0
    for path, ds in zip(files, datasets, strict=True):
        pixels = _dicom_pixels(ds, Path(path).name)
        for j, image in enumerate(pixels, start):
            volume[j] = image.astype(np.float32) * frames[j]["slope"] + frames[j]["intercept"]
        start += len(pixels)
    return np.ascontiguousarray(volume[order].T), affine, list(dict.fromkeys(owner[i] for i in order))


def _read_nifti(path: str | Path, volume: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads a NIfTI file, or one volume of a 4D one: voxels (X, Y, Z) float32 and the affine (4, 4) to RAS mm."""
    image = nib.load(path)
    shape = _without_ones(image.shape)
    if len(shape) != (3 if volume is None else 4):
        raise _Unusable(
            f"its shape {_by(shape)} is not 3D; a 4D file needs the item's 'volume', and only a 4D one has it"
        )
    voxels = image.dataobj if volume is None else image.dataobj[:, :, :, volume]
    return np.asarray(voxels, dtype=np.float32).reshape(shape[:3]), np.array(image.affine)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without trailing ones beyond the third side."""
    shape = tuple(shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class LoadScand(MapTransform):
    """Reads the items of `prepare_datalist`.

    Each key goes in as the path of a NIfTI file or the list of the files of a DICOM series (or of one enhanced file),
    and comes out as a MetaTensor (1, X, Y, Z) float32 whose affine maps voxels to RAS mm, as MONAI's NibabelReader
    gives it. An item with "volume" gives that volume of its 4D file. DICOM slices are put in order and rescaled.

    Raises:
        ValueError: naming the file that cannot be read, and why.
    """

    def __init__(self, keys: KeysCollection = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self._load(item[key], item.get("volume"))
        return item

    @staticmethod
    def _load(image: str | Path | Sequence[str], volume: int | None) -> MetaTensor:
        series = not isinstance(image, (str, os.PathLike))
        name = str(image[0] if series else image)
        try:
            voxels, affine = _read_dicom(image)[:2] if series else _read_nifti(image, volume)
        except Exception as error:
            raise ValueError(f"cannot read the scan {name}: {_plain(error)}") from error
        meta = {
            "filename_or_obj": name,
            "original_affine": affine.copy(),
            "spatial_shape": np.array(voxels.shape),
            "space": SpaceKeys.RAS,
            "original_channel_dim": float("nan"),  # MONAI's "no_channel"
        }
        return MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine), meta=meta)


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def _plain(error: Exception) -> str:
    """The reason behind an exception, in plain words. Unknown messages are left out: they may quote a DICOM header."""
    if isinstance(error, _Unusable):
        return str(error)
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)) or "could the file be damaged" in str(error):
        return "truncated or corrupt: its voxels cannot be read to the end"
    if isinstance(error, FileNotFoundError):
        return "no such file, or a broken link (DataLad and git-annex: get the file first)"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    if isinstance(error, nib.spatialimages.HeaderDataError):
        return "corrupt NIfTI header"
    if isinstance(error, nib.filebasedimages.ImageFileError):
        return "not a NIfTI file although named so"
    return f"cannot be read ({type(error).__name__})"


def _check_size(shape: Sequence[int], min_size: int) -> None:
    if len(shape) < 3 or shape[2] == 1:
        raise _Unusable("a 2D image")
    if min(shape[:3]) < min_size:
        raise _Unusable(f"too small: {_by(shape[:3])} voxels, every side needs at least {min_size}")


def _value_range(voxels: np.ndarray) -> tuple[float, float]:
    """Least and greatest voxel; raises `_Unusable` for NaN and Inf, which pass through min and max."""
    low, high = voxels.min(), voxels.max()
    with np.errstate(over="ignore"):  # what float32 cannot hold counts as infinite
        if not np.isfinite(np.array([low, high]).astype(np.float32)).all():
            broken = np.count_nonzero(~np.isfinite(voxels.astype(np.float32)))
            raise _Unusable(f"{broken} voxels are NaN or infinite")
    return float(low), float(high)


def _check_nifti(files: list[Path], min_size: int) -> dict:
    """Reads a NIfTI file to its last byte; returns its shape, spacing, orientation and, if 4D, its usable volumes."""
    path = files[0]
    if not all(file.stat().st_size for file in files):
        raise _Unusable("empty file (0 bytes)")
    compressed = path.suffix.lower() == ".gz"
    with open(path, "rb") as raw:
        if compressed and raw.read(2) != b"\x1f\x8b":
            raise _Unusable("not gzip-compressed although named .gz")
    open_file = gzip.open if compressed else open
    with open_file(path, "rb") as file:
        if len(file.read(348)) < 348:
            raise _Unusable("not a NIfTI file although named so (too short for a header)")
        image_class = type(nib.load(path))
        if not issubclass(image_class, (nib.Nifti1Pair, nib.Nifti2Pair)):
            if issubclass(image_class, nib.AnalyzeImage):
                raise _Unusable("Analyze 7.5, not NIfTI: its orientation is unknown")
            raise _Unusable(f"not a volume in NIfTI format but a {image_class.__name__}")
        file.seek(0)
        raw_header = image_class.header_class.from_fileobj(file, check=False)  # a checked one has zero spacing mended
        file.seek(0)
        # Reading through our own stream, and on to its end, also verifies gzip's check sum.
        image = image_class.from_stream(file) if compressed else nib.load(path)

        shape = _without_ones(image.shape)
        dtype = image.get_data_dtype()
        if dtype.names or dtype.kind not in "iufb":
            kind = "complex numbers" if dtype.kind == "c" else "a colour image (RGB)" if dtype.names else str(dtype)
            raise _Unusable(f"voxels are {kind}, not one real number each")
        intent = int(image.header["intent_code"])
        if len(shape) > 4 or (len(shape) == 4 and intent in NIFTI_VECTOR_INTENTS):
            raise _Unusable(f"{len(shape)}D data (shape {_by(shape)}: {NIFTI_VECTOR_INTENTS.get(intent, 'vectors')}?)")
        _check_size(shape, min_size)
        spacing = nib.affines.voxel_sizes(image.affine)
        if int(raw_header["sform_code"]) == 0:  # then the affine comes from the spacing in the header
            spacing = np.abs(raw_header["pixdim"][1:4])
        if not np.isfinite(image.affine).all() or not np.isfinite(spacing).all() or min(spacing) <= 0:
            raise _Unusable(f"zero or non-finite voxel spacing ({_by(spacing)} mm)")
        if abs(np.linalg.det(image.affine[:3, :3] / spacing)) < 1e-3:
            raise _Unusable("singular affine: its axes do not span three dimensions")

        voxels = image.dataobj.get_unscaled()
        while compressed and file.read(1 << 20):
            pass
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    ranges = [_value_range(voxels[:, :, :, i]) for i in range(shape[3])] if len(shape) == 4 else [_value_range(voxels)]
    _value_range(np.array(ranges) * slope + intercept)
    varied = [i for i, (low, high) in enumerate(ranges) if low < high and slope != 0]
    if not varied:
        raise _Unusable("all voxels have the same value")
    orientation = "".join(axis or "?" for axis in nib.aff2axcodes(image.affine))
    check = {"shape": [int(n) for n in shape[:3]], "spacing": [float(s) for s in spacing], "orientation": orientation}
    return check | ({"volumes": varied} if len(shape) == 4 else {})


def _check_dicom(files: list[Path], min_size: int) -> dict:
    """Reads a DICOM series as training will; returns its shape, spacing, orientation and the order of its files."""
    voxels, affine, order = _read_dicom(files, min_size)
    low, high = _value_range(voxels)
    if low == high:
        raise _Unusable("all voxels have the same value")
    return {
        "shape": list(voxels.shape),
        "spacing": [float(s) for s in nib.affines.voxel_sizes(affine)],
        "orientation": "".join(nib.aff2axcodes(affine)),
        "order": order,
    }


def _dicom_header(files: list[Path]) -> dict[str, str]:
    """What groups and names a DICOM file (a list of one); identifiers leave here only as hashes."""
    ds = pydicom.dcmread(files[0], stop_before_pixels=True)
    return {
        "series": _digest(ds.get("SeriesInstanceUID")),
        "instance": _digest(ds.get("SOPInstanceUID")),
        "study": _digest(ds.get("StudyInstanceUID")),
        "patient": _digest(ds.get("PatientID")),
        "number": str(ds.get("SeriesNumber") or "x"),
        "modality": str(ds.get("Modality") or ""),
        "enhanced": "yes" if int(ds.get("NumberOfFrames") or 1) > 1 else "",
    }


def _digest(text: object) -> str:
    text = str(text or "").strip()
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


class _Cache:
    """Results of earlier runs in a JSON file, by path, size, time and what was asked. Only usable results are kept."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.old, self.new, self.saved = file, {}, {}, time.monotonic()
        try:
            stored = json.loads(file.read_text()) if file and file.exists() else {}
            self.old = stored if isinstance(stored, dict) else {}
        except (OSError, ValueError):
            logger.warning(f"The cache {file} is corrupt and is ignored: every scan is read again.")

    def get(self, function: Callable[..., dict], files: list[Path], *args) -> dict:
        """`function(files, *args)`, from the cache if no file has changed."""
        stats = [(str(f), s.st_size, s.st_mtime_ns) for f, s in ((f, f.stat()) for f in files)]
        key = _digest([function.__name__, CHECK_VERSION, stats, args])
        result = self.old.get(key)
        self.new[key] = result if isinstance(result, dict) else function(files, *args)
        return self.new[key]

    def save(self, every: float = 0.0) -> None:
        """Writes the file, if the last time is more than `every` seconds ago."""
        if self.file and time.monotonic() - self.saved >= every:
            partial = self.file.with_suffix(f".{os.getpid()}.tmp")
            partial.write_text(json.dumps(self.new.copy()))
            partial.replace(self.file)
            self.saved = time.monotonic()


def _in_threads(function: Callable, things: Sequence, num_workers: int, cache: _Cache, description: str) -> list:
    """`[function(thing) for thing in things]` in threads, with progress on stderr; keeps the cache when stopped."""
    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        results = []
        for result in tqdm(pool.map(function, things), description, len(things), disable=None if things else True):
            results.append(result)
            cache.save(every=30)
        return results
    finally:
        pool.shutdown(cancel_futures=True)
        cache.save()


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def _walk(folder: Path, skip: Path | None = None) -> Iterator[Path]:
    """Every file below a folder, sorted; no hidden ones, no DICOMDIR, no folder twice (links may form loops)."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen or (skip is not None and real == str(skip)):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(files) if not name.startswith(".") and name != "DICOMDIR")


def _is_dicom(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _from_datalist(file: Path) -> dict[Path, dict]:
    """Files of an MSD-style datalist, each with its "split" and, if the list says so, its "subject"."""
    try:
        lists = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"the datalist {file} is not valid JSON: {error}.") from error
    if not isinstance(lists, dict) or not isinstance(lists.get("training"), list):
        raise ValueError(
            f'the datalist {file} needs a list "training" of {{"image": path}} (and may have "validation").'
        )
    found: dict[Path, dict] = {}
    for split in ("training", "validation"):
        for item in lists.get(split) or []:
            item = item if isinstance(item, dict) else {"image": item}
            images = item.get("image")
            images = [images] if isinstance(images, str) else images
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                raise ValueError(f'the datalist {file}: the item {item} of "{split}" has no "image" path.')
            given = {"split": split if lists.get("validation") else "", "subject": str(item.get("subject", ""))}
            for path in (file.parent / image for image in images):
                for one in _walk(path) if path.is_dir() else [path]:
                    found[one] = given
    return found


def _find_scans(
    dataset_dir: Path, output_dir: Path | None, num_workers: int, cache: _Cache
) -> tuple[list[_Scan], list[PurePosixPath], int]:
    """Every NIfTI file and DICOM series (a broken one with its reason), the label maps, the number of other files."""
    given: dict[Path, dict] = {}
    if dataset_dir.is_dir():
        root, files = dataset_dir, list(_walk(dataset_dir, output_dir.resolve() if output_dir else None))
    elif dataset_dir.suffix.lower() == ".json":
        given = _from_datalist(dataset_dir)
        root, files = dataset_dir.parent, list(given)
    else:
        root, files = dataset_dir.parent, [dataset_dir]

    def relative(path: Path) -> PurePosixPath:
        parts = PurePosixPath(Path(os.path.relpath(path, root)).as_posix()).parts
        return PurePosixPath(*(part for part in parts if part != ".."))

    scans: list[_Scan] = []
    labels: list[PurePosixPath] = []
    dicom: list[Path] = []
    others = 0
    for path in files:
        header, voxels = path.with_suffix(".hdr"), path.with_suffix(".img")
        pair = path in (header, voxels) and header.exists() and voxels.exists()
        if pair and path == voxels and dataset_dir.is_dir():
            continue  # it comes with its .hdr
        if dataset_dir.is_dir() and _NIFTI_SUFFIX.search(path.name) and is_label_path(relative(path)):
            labels.append(relative(path))
        elif _NIFTI_NAME.search(path.name):
            scans.append(_Scan([path], relative(path), "NIfTI"))
        elif pair:
            scans.append(_Scan([header, voxels], relative(path), "NIfTI"))
        elif _is_dicom(path):
            dicom.append(path)
        elif path.suffix.lower() in (".dcm", ".ima") or given:
            reason = _plain(FileNotFoundError()) if not path.exists() else "neither NIfTI nor DICOM"
            scans.append(
                _Scan([path], relative(path), "DICOM" if path.suffix.lower() == ".dcm" else "?", reason=reason)
            )
        else:
            others += 1

    def read_header(path: Path) -> dict | str:
        try:
            return cache.get(_dicom_header, [path])
        except Exception as error:
            return _plain(error)

    series: dict[tuple, list[tuple[Path, dict]]] = defaultdict(list)
    headers = _in_threads(read_header, dicom, num_workers, cache, "reading DICOM headers")
    for path, head in zip(dicom, headers, strict=True):
        if isinstance(head, str):
            scans.append(_Scan([path], relative(path), "DICOM", reason=f"corrupt DICOM file: {head}"))
        elif head["modality"] in ("SEG", "RTSTRUCT"):
            labels.append(relative(path))
        else:
            split = given.get(path, {}).get("split", "")
            uid = head["series"] or str(path.parent)
            series[uid, head["instance"] if head["enhanced"] else "", split].append((path, head))

    people: dict[str, set[str]] = defaultdict(set)  # a person's BIDS or other well-known names, by the paths
    homes: dict[str, PurePosixPath] = {}  # and the first folder
    of_series: list[tuple[_Scan, str, str, str]] = []
    for members in series.values():
        unique = {head["instance"] or str(path): path for path, head in reversed(members)}  # the first file of each
        paths = sorted(unique.values())
        head = members[0][1]
        scan = _Scan(paths, relative(paths[0]), "DICOM", series=head["number"])
        if len(members) > len(paths):
            scan.note = f"{len(members) - len(paths)} duplicate files left out"
        folder = scan.relative.parent
        person = head["patient"] or head["study"] or scan.label
        known = subject_of(folder) if any(map(_BIDS.match, folder.parts)) or _KNOWN.search(str(folder)) else ""
        people[person] |= {known} - {""}
        homes.setdefault(person, folder)
        of_series.append((scan, person, known, head["patient"]))
    for scan, person, known, patient in of_series:
        if len(people[person]) == 1:
            (known,) = people[person]
        # Several names for one PatientID: it is a filler such as "anonymous", and the path knows better.
        scan.subject = known or (f"dicom-{patient[:8]}" if patient else subject_of(homes[person], root.name))
        scans.append(scan)

    patients = {head["patient"] for members in series.values() for _, head in members} - {""}
    for scan in scans:
        scan.split = given.get(scan.files[0], {}).get("split", "")
        scan.subject = given.get(scan.files[0], {}).get("subject", "") or scan.subject
        if not scan.subject:
            scan.subject = subject_of(scan.relative, root.name)
            # A NIfTI converted from a DICOM series beside it often carries the PatientID in its name.
            for patient in patients & set(map(_digest, re.split(r"[\W_]+", scan.subject))):
                scan.subject = f"dicom-{patient[:8]}"
    return scans, labels, others


# ---------------------------------------------------------------------------------------------------------------------
# Naming, splitting, reporting
# ---------------------------------------------------------------------------------------------------------------------


def _name_scans(scans: list[_Scan], root_name: str) -> None:
    """Gives each scan a short unique name: its stem (DICOM: folder and series number), with folders where needed."""
    parts = []
    for scan in scans:
        folders = list(scan.relative.parts[:-1])
        last = _stem(scan.relative.name)
        if scan.series:
            last = f"{folders.pop() if folders else root_name}_series{scan.series}"
        parts.append([re.sub(r"[^\w.-]+", "_", part) for part in [*folders, last]])
    depth = [1] * len(scans)
    while True:
        names = ["_".join(p[-d:]) for p, d in zip(parts, depth, strict=True)]
        taken = Counter(name.lower() for name in names)
        clash = [i for i, name in enumerate(names) if taken[name.lower()] > 1 and depth[i] < len(parts[i])]
        if not clash:
            break
        for i in clash:
            depth[i] += 1
    used: set[str] = set()
    for scan, name in zip(scans, names, strict=True):
        scan.name, n = name, 1
        while scan.name.lower() in used:
            n += 1
            scan.name = f"{name}-{n}"
        used.add(scan.name.lower())


def _split_subjects(scans: list[_Scan], val_fraction: float, seed: int) -> None:
    """Draws the validation subjects; the same for the same subjects and seed, whatever the order of the files."""
    subjects = sorted({scan.subject for scan in scans})
    random.Random(seed).shuffle(subjects)
    wanted = max(1, round(val_fraction * len(subjects))) if val_fraction else 0
    if wanted and len(subjects) == 1:
        logger.warning(
            f"All scans seem to be of one subject ({subjects[0]}), so the same scans serve for training and validation "
            "and the validation loss says nothing about other people. If they are of several, say how a path names the "
            "subject, for example --subject_pattern 'patient[0-9]+'."
        )
    validation = set(subjects[: min(wanted, len(subjects) - 1)])
    for scan in scans:
        scan.split = "validation" if scan.subject in validation else "training"
        if wanted and len(subjects) == 1:
            scan.split = "both"


def _by(numbers: Iterable[float]) -> str:
    return "x".join(f"{n:.3g}" if isinstance(n, float | np.floating) else str(n) for n in numbers)


COLUMNS = ("name", "subject", "split", "format", "shape", "spacing_mm", "orientation", "status", "path")


def _rows(scans: list[_Scan], labels: list[PurePosixPath]) -> list[dict[str, str]]:
    """A row for each scan and label map, with the keys `COLUMNS`."""
    rows = []
    for scan in scans:
        check = scan.check
        volumes = check.get("volumes")
        notes = [f"volumes {' '.join(map(str, volumes))} of a 4D file"] if volumes else []
        status = (
            f"unusable: {scan.reason}" if scan.reason else "; ".join(["usable", *notes, *filter(None, [scan.note])])
        )
        rows.append(
            {
                "name": scan.name,
                "subject": scan.subject,
                "split": scan.split,
                "format": scan.format,
                "shape": _by(check.get("shape", [])),
                "spacing_mm": _by(check.get("spacing", [])),
                "orientation": check.get("orientation", ""),
                "status": status,
                "path": scan.label,
            }
        )
    return rows + [dict.fromkeys(COLUMNS, "") | {"status": "label map, left out", "path": str(p)} for p in labels]


def _table(rows: list[dict[str, str]]) -> str:
    columns = COLUMNS[:7]
    shown = [columns, *([row[column] for column in columns] for row in rows[:MAX_ROWS])]
    widths = [max(map(len, cells)) for cells in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in shown]
    return "\n".join(lines + ([f"... and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []))


def prepare_datalist(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    val_fraction: float = 0.15,
    seed: int = 0,
    skip_unreadable: bool = False,
    min_size: int = 8,
    max_volumes: int = 4,
    subject_pattern: str | None = None,
    num_workers: int = 2,
) -> dict[str, list[dict]]:
    """Finds, checks and splits the scans of a data set, before any training starts.

    Args:
        dataset_dir: a folder, searched recursively for NIfTI files and DICOM series; a single file; or an MSD-style
            datalist (JSON with "training" and perhaps "validation", which then is the split).
        output_dir: gets `scans.csv`, a row a file, and `scan_check.json`, which spares unchanged files another reading.
        val_fraction: fraction of the subjects for validation, in [0, 1); at least one subject unless it is 0. A single
            subject serves for both, with a warning.
        seed: of the split, which is the same for the same subjects.
        skip_unreadable: go on without the unusable scans instead of raising.
        min_size: fewest voxels along each side.
        max_volumes: most volumes taken out of a 4D file, evenly spaced.
        subject_pattern: regular expression searched in each path relative to the data set; its first group, or the
            whole match, is the subject. None: `subject_of` guesses, or DICOM's PatientID (as a hash) says so.
        num_workers: threads that read.

    Returns:
        {"training": [...], "validation": [...]}, no subject in both. An item is JSON-serialisable: "image" (path of a
        NIfTI, or the list of a DICOM series' files in slice order), "subject", "name" (unique, fit for a file name)
        and, for one volume of a 4D file, "volume".

    Raises:
        FileNotFoundError: when `dataset_dir` does not exist.
        ValueError: naming the unusable scans, unless `skip_unreadable`; when no usable scan is left; when a path does
            not match `subject_pattern`; when an argument is out of its range.
    """
    dataset_dir = Path(dataset_dir)
    if not dataset_dir.exists():
        siblings = [p.name for p in dataset_dir.parent.iterdir()] if dataset_dir.parent.is_dir() else []
        close = difflib.get_close_matches(dataset_dir.name, siblings, n=1)
        hint = f" Did you mean {dataset_dir.parent / close[0]}?" if close else ""
        raise FileNotFoundError(f"dataset_dir {dataset_dir} does not exist.{hint}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}.")
    if min_size < 2 or max_volumes < 1:
        raise ValueError(f"min_size must be at least 2 and max_volumes at least 1, got {min_size} and {max_volumes}.")
    dataset_dir = dataset_dir.absolute()
    output_dir = Path(output_dir) if output_dir is not None else None
    if output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)
    cache = _Cache(output_dir / "scan_check.json" if output_dir else None)

    scans, labels, others = _find_scans(dataset_dir, output_dir, num_workers, cache)
    if subject_pattern:
        for scan in scans:
            match = re.search(subject_pattern, str(scan.relative))
            if not match:
                raise ValueError(f"subject_pattern {subject_pattern!r} does not match the path {scan.relative}.")
            scan.subject = match.group(1 if match.re.groups else 0)

    def check(scan: _Scan) -> None:
        if scan.reason:
            return
        try:
            scan.check = dict(cache.get(_check_dicom if scan.series else _check_nifti, scan.files, min_size))
        except Exception as error:
            scan.reason = _plain(error)

    _in_threads(check, scans, num_workers, cache, "checking scans")
    usable = sorted((s for s in scans if not s.reason), key=lambda s: (s.relative, s.series))
    unusable = sorted((s for s in scans if s.reason), key=lambda s: (s.relative, s.series))
    _name_scans(usable, dataset_dir.name)
    for scan in usable:
        if "order" in scan.check:
            scan.files = [scan.files[i] for i in scan.check["order"]]
        if volumes := scan.check.get("volumes"):
            chosen = np.linspace(0, len(volumes) - 1, min(max_volumes, len(volumes))).round().astype(int)
            scan.check["volumes"] = [volumes[i] for i in chosen]
    if not all(scan.split for scan in usable):
        _split_subjects(usable, val_fraction, seed)
    elif both := {s.subject for s in usable if s.split == "training"} & {
        s.subject for s in usable if s.split == "validation"
    }:
        logger.warning(f"{dataset_dir.name} has scans of {', '.join(sorted(both))} in training and in validation.")

    rows = _rows(usable + unusable, labels)
    if output_dir:
        with open(output_dir / "scans.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if usable:
        logger.info(f"Scans in {dataset_dir}:\n{_table(rows[: len(usable)])}")
    for scan in unusable:
        logger.warning(f"Unusable: {scan.label}: {scan.reason}.")
    n_subjects = len({scan.subject for scan in usable})
    summary = (
        f"{len(usable)} usable scans of {n_subjects} subjects, {len(unusable)} unusable, "
        f"{len(labels)} label maps left out, {others} other files ignored."
    )
    logger.info(summary + (f" All rows are in {output_dir / 'scans.csv'}." if output_dir else ""))
    if unusable and not skip_unreadable:
        named = "".join(f"\n  {scan.label}: {scan.reason}" for scan in unusable[:MAX_NAMED])
        more = f"\n  ... and {len(unusable) - MAX_NAMED} more" if len(unusable) > MAX_NAMED else ""
        raise ValueError(
            f"{len(unusable)} scans in {dataset_dir} cannot be used:{named}{more}\n"
            "Mend or remove them, or pass --skip_unreadable true to go on without them."
        )
    if not usable:
        raise ValueError(
            f"no usable scan in {dataset_dir}: looked, in all folders below it, for *.nii, *.nii.gz, .hdr/.img pairs "
            f"and MR DICOM series, and found {summary}"
        )

    datalist: dict[str, list[dict]] = {"training": [], "validation": []}
    for scan in usable:
        files = [str(path) for path in scan.files]
        item = {"image": files if scan.format == "DICOM" else files[0], "subject": scan.subject, "name": scan.name}
        items = [item]
        if volumes := scan.check.get("volumes"):
            items = [item | {"name": f"{scan.name}_vol{v:03d}", "volume": v} for v in volumes]
        for split, members in datalist.items():
            if scan.split in (split, "both"):
                members += [dict(item) for item in items]
    return datalist
