"""Demonstration data, made without any download from the averaged brain in the nilearn package.

With it every workflow runs out of the box, and every loader meets what clinical folders hold: NIfTI and DICOM, several
orientations, voxel spacings, contrasts and intensity scales. It is no data to learn anatomy from: all subjects are the
ICBM 152 average brain (skull-stripped), bent, recoloured and made noisy.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from monai.networks.layers import GaussianFilter
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation

from .io.dicom_out import decimal_strings

__all__ = ["LABELS", "make_demo_dataset", "make_demo_head", "write_series"]

VERSION = 3  # raise it when the images made from the same seed change

MARKER = "demo.json"

LABELS = {"background": 0, "grey matter": 1, "white matter": 2, "cerebrospinal fluid": 3}

STATEMENT = "variations of one averaged brain; not real subjects; not to learn from"

SOURCE = (
    "ICBM 152 nonlinear symmetric 2009a average brain (T1-weighted, skull-stripped) with its grey- and white-matter "
    "maps, as the nilearn package carries them; warped, recoloured and made noisy by sspformer"
)

LICENCE = (
    "Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill "
    "University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose "
    "and without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and "
    "McGill University make no representations about the suitability of this software for any purpose. It is provided "
    '"as is" without express or implied warranty. The authors are not responsible for any data loss, equipment damage, '
    "property loss, or injury to subjects or patients resulting from the use or misuse of this software package."
)

FIELD_OF_VIEW = (186.0, 222.0, 186.0)  # mm, left-right, posterior-anterior, inferior-superior

CENTRE = (0.0, -19.0, 4.0)  # mm, the middle of the brain in the template's RAS coordinates


class Protocol(NamedTuple):
    """How one subject is scanned."""

    axcodes: str  # anatomical direction in which each voxel axis increases
    spacing: tuple[float, float, float]  # mm, along each voxel axis
    contrast: str  # "t1": white matter bright; "t2": fluid bright
    gamma: float  # exponent of the contrast curve
    peak: float  # stored intensity of the brightest tissue
    noise: float  # standard deviation of the complex noise, as a fraction of peak
    tilt: float = 0.0  # degrees, rotation of the grid about the left-right axis (an oblique scan)


PROTOCOLS = (
    Protocol("RAS", (1.5, 1.5, 1.5), "t1", 2.0, 1000, 0.02),
    Protocol("LAS", (1.0, 1.0, 4.0), "t2", 1.0, 400, 0.02, tilt=10.0),
    Protocol("LPS", (1.5, 1.5, 2.0), "t1", 3.0, 4000, 0.03, tilt=-5.0),
    Protocol("PIL", (1.2, 1.2, 1.5), "t2", 1.2, 255, 0.02),
    Protocol("RSA", (1.5, 1.5, 1.5), "t1", 1.5, 12000, 0.04),
    Protocol("RAS", (2.0, 2.0, 2.0), "t2", 1.5, 1000, 0.03),
    Protocol("LAS", (1.0, 1.0, 1.2), "t2", 1.0, 600, 0.02),
    Protocol("ASL", (1.5, 1.5, 1.5), "t1", 3.5, 3000, 0.01),
    Protocol("LPS", (1.2, 1.2, 2.0), "t2", 0.8, 2000, 0.02),
    Protocol("RPI", (2.0, 1.5, 1.5), "t1", 2.0, 800, 0.03, tilt=7.0),
    Protocol("LIP", (1.5, 1.5, 2.0), "t1", 3.0, 500, 0.02),
    Protocol("LPS", (1.5, 1.5, 2.0), "t1", 2.2, 1500, 0.02, tilt=6.0),
)


def make_demo_dataset(output_dir: str | os.PathLike, n_subjects: int = 12, seed: int = 0) -> str:
    """Makes the demonstration data set, or reuses the one that is there; returns the absolute path of its folder.

    It holds the images ``images/demo_01.nii.gz`` and so on (the last one as a DICOM series, ``images/demo_NN/``), the
    tissue maps ``labels/demo_01.nii.gz`` and so on (see ``LABELS``), and ``demo.json``, which says what this is and
    lists the files. The same arguments give the same bytes. The folder appears complete or not at all, so several
    processes may ask for it at once.

    Args:
        output_dir: the folder. One made earlier with other arguments is replaced.
        n_subjects: how many subjects, 2 or more.
        seed: of all random choices.

    Raises:
        ValueError: when ``n_subjects`` is below 2, or ``output_dir`` holds files that this function did not make.
        ImportError: when nilearn is not installed.
    """
    if n_subjects < 2:
        raise ValueError(
            f"n_subjects is {n_subjects}, but must be 2 or more: at least one NIfTI and one DICOM subject."
        )
    folder = Path(output_dir).expanduser().absolute()
    wanted = {"version": VERSION, "seed": seed, "n_subjects": n_subjects}
    if _is_complete(folder, wanted):
        return str(folder)
    _refuse_foreign_files(folder)
    template = _load_template()

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as workspace:
        fresh = Path(workspace, "new")
        for i in range(n_subjects):
            _write_subject(fresh, f"demo_{i + 1:02d}", template, i, seed, as_dicom=i == n_subjects - 1)
        files = sorted(path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file())
        about = {"statement": STATEMENT, "source": SOURCE, "licence": LICENCE, "labels": LABELS}
        (fresh / MARKER).write_text(json.dumps({**wanted, **about, "files": files}, indent=2) + "\n", encoding="utf-8")
        if _is_complete(folder, wanted):  # another process was first, and may be reading it by now
            return str(folder)
        try:
            if folder.exists():
                folder.rename(Path(workspace, "old"))
            fresh.rename(folder)
        except OSError:
            if not _is_complete(folder, wanted):
                raise
    return str(folder)


def make_demo_head(output_dir: str | os.PathLike) -> str:
    """Writes the averaged brain itself: T1-weighted, 1 mm, skull-stripped, 8 bit.

    Args:
        output_dir: gets ``mni152.nii.gz``, unless it is there already.

    Returns:
        the absolute path of the file.

    Raises:
        ImportError: when nilearn is not installed.
    """
    path = Path(output_dir).expanduser().absolute() / "mni152.nii.gz"
    if not path.is_file():
        t1, _, affine = _load_template()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as workspace:  # complete or not at all
            _write_nifti(Path(workspace, path.name), t1, affine)
            Path(workspace, path.name).replace(path)
    return str(path)


def _read_marker(folder: Path) -> dict | None:
    """The content of the folder's ``demo.json``; None if there is none that this module wrote."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get("files"), list) else None


def _is_complete(folder: Path, wanted: dict) -> bool:
    """Whether the folder was made with the wanted arguments, and all its files are there."""
    marker = _read_marker(folder)
    if marker is None or any(marker.get(key) != value for key, value in wanted.items()):
        return False
    return all((folder / name).is_file() for name in marker["files"])


def _refuse_foreign_files(folder: Path) -> None:
    """Raises a ValueError unless the folder is absent, empty, or holds nothing but earlier demonstration data."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: give a folder for the demonstration dataset.")
    marker = _read_marker(folder)
    ours = {MARKER, *marker["files"]} if marker else set()
    present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    foreign = sorted(set(present) - ours)
    if foreign:
        raise ValueError(
            f"output_dir {folder} holds {len(foreign)} file(s) that are not the demonstration dataset's, such as "
            f"{foreign[0]}: nothing was changed; give an empty or new folder."
        )


def _load_template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The average brain at 1 mm: T1-weighted image (0 outside the brain) and tissue map (see ``LABELS``), both uint8
    (X, Y, Z), and the affine (4, 4) to RAS mm."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError(
            "the demonstration data are made from a brain in the nilearn package, which is not installed: "
            'pip install "sspformer[demo]", or use your own scans with --dataset_dir FOLDER.'
        ) from error
    head = datasets.load_mni152_template(resolution=1)
    t1 = np.rint(head.get_fdata(dtype=np.float32) * 255).astype(np.uint8)
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
    # What of the brain is neither grey nor white matter is fluid; argmax is 0, 1, 2 and the labels are 1, 2, 3.
    tissue = 1 + np.stack([grey, white, 1 - grey - white]).argmax(0).astype(np.uint8)
    return t1, np.where(t1 > 0, tissue, 0).astype(np.uint8), head.affine


def _write_subject(folder: Path, name: str, template: tuple, index: int, seed: int, as_dicom: bool) -> None:
    """Scans one subject by its protocol, and writes the image (NIfTI or DICOM) and the tissue map (NIfTI)."""
    protocol = PROTOCOLS[index % len(PROTOCOLS)]
    affine, shape = _scan_grid(protocol)
    image, labels = _scan(template, protocol, affine, shape, np.random.default_rng([seed, index]))
    _write_nifti(folder / "labels" / f"{name}.nii.gz", labels, affine)
    if as_dicom:
        write_series(folder / "images" / name, name, image, affine, seed)
    else:
        _write_nifti(folder / "images" / f"{name}.nii.gz", image, affine)


def _scan_grid(protocol: Protocol) -> tuple[np.ndarray, tuple[int, ...]]:
    """The affine (4, 4) to RAS mm and the shape of a scan that covers the field of view."""
    ornt = nib.orientations.axcodes2ornt(protocol.axcodes).astype(int)  # (3, 2): anatomical axis, sign
    shape = tuple(math.ceil(FIELD_OF_VIEW[axis] / s) for (axis, _), s in zip(ornt, protocol.spacing, strict=True))
    directions = np.zeros((3, 3))
    directions[ornt[:, 0], range(3)] = ornt[:, 1]
    axes = _rotation((protocol.tilt, 0, 0)) @ directions * protocol.spacing
    return nib.affines.from_matvec(axes, CENTRE - axes @ ((np.array(shape) - 1) / 2)), shape


def _scan(
    template: tuple, protocol: Protocol, affine: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Makes the template into one subject and scans it: magnitude image int16 and tissue map uint8, (X, Y, Z)."""
    t1, tissue, template_affine = template
    # The shape of this subject: an affine map about the brain's centre, then a smooth displacement of some millimetres.
    shape_change = _rotation(rng.uniform(-6, 6, 3)) * rng.uniform(0.94, 1.06, 3)
    move = nib.affines.from_matvec(shape_change, CENTRE - shape_change @ CENTRE + rng.uniform(-3, 3, 3))
    to_template = np.linalg.inv(template_affine) @ move @ affine
    displacement = 2 * torch.cat([_smooth_field(t1.shape, 20, rng) for _ in range(3)], dim=1)
    bias = torch.exp(rng.uniform(0.08, 0.18) * _smooth_field(t1.shape, 50, rng))
    brightness = torch.from_numpy(_contrast_curve(protocol)[t1])[None, None]
    tissue = torch.from_numpy(tissue)[None, None].float()

    # A thick slice is the mean of thin ones, as a scanner sees it; an odd number of them, so that one is in the middle.
    thick = int(np.argmax(protocol.spacing))
    n_thin = 2 * int(protocol.spacing[thick] / min(protocol.spacing) / 2) + 1
    magnitude = torch.zeros(shape)
    for n in range(n_thin):
        offset = np.zeros(3)
        offset[thick] = (n + 0.5) / n_thin - 0.5
        points = _template_points(to_template, shape, offset, t1.shape, displacement)
        magnitude += _read(brightness, points) * _read(bias, points) / n_thin
        if n == n_thin // 2:
            labels = _read(tissue, points, mode="nearest")

    image = magnitude.numpy()
    noise = protocol.noise * rng.standard_normal((2, *shape), dtype=np.float32)
    image = np.hypot(image + noise[0], noise[1])  # Rician
    return np.rint(image * protocol.peak).clip(0, 32767).astype(np.int16), labels.numpy().astype(np.uint8)


def _contrast_curve(protocol: Protocol) -> np.ndarray:
    """The brightness in 0..1 of each of the template's grey levels, (256,) float32."""
    level = np.linspace(0, 1, 256, dtype=np.float32)
    curve = level**protocol.gamma
    if protocol.contrast == "t2":
        curve = 1 - 0.85 * curve
    curve[0] = 0  # outside the brain
    return curve


def _rotation(degrees) -> np.ndarray:
    """The matrix (3, 3) that rotates by angles in degrees about the first, then the second, then the third axis."""
    return Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()


def _smooth_field(shape: tuple[int, ...], smoothness: float, rng: np.random.Generator) -> torch.Tensor:
    """Gaussian noise over the template's box, smoothed with ``smoothness`` mm, of mean 0 and standard deviation 1;
    (1, 1, X, Y, Z) with a voxel every ``smoothness / 2`` mm."""
    step = smoothness / 2
    noise = rng.standard_normal([math.ceil(side / step) for side in shape], dtype=np.float32)
    field = GaussianFilter(3, smoothness / step)(torch.from_numpy(noise)[None, None])
    return (field - field.mean()) / field.std()


def _template_points(
    to_template: np.ndarray,
    shape: tuple[int, ...],
    offset: np.ndarray,
    template_shape: tuple[int, ...],
    displacement: torch.Tensor,
) -> torch.Tensor:
    """Where the voxels of a scan lie in the template: (1, X, Y, Z, 3) as ``grid_sample`` takes it.

    Args:
        to_template: affine (4, 4) from the scan's voxels to the template's.
        shape: of the scan.
        offset: added to the positions of the voxels, in voxels.
        template_shape: voxels of the template, 1 mm each.
        displacement: added in the template, in mm; (1, 3, ...), spread over the template's box.
    """
    axes = [torch.arange(side, dtype=torch.float32) + shift for side, shift in zip(shape, offset.tolist(), strict=True)]
    voxels = torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1)
    matrix = torch.as_tensor(to_template, dtype=torch.float32)
    per_voxel = 2 / (torch.tensor(template_shape) - 1)
    points = (voxels @ (matrix[:3, :3].T * per_voxel) + (matrix[:3, 3] * per_voxel - 1)).flip(-1)[None]
    bend = F.grid_sample(displacement, points, align_corners=True).movedim(1, -1)
    return points + (bend * per_voxel).flip(-1)


def _read(volume: torch.Tensor, points: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """The values of a volume (1, 1, ...), spread over the template's box, at the points; 0 outside."""
    return F.grid_sample(volume, points, mode=mode, align_corners=True)[0, 0]


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Writes a volume whose affine leads to scanner coordinates in mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)  # nibabel leaves file name and time out of the gzip header: same array, same bytes


def write_series(folder: Path, name: str, image: np.ndarray, affine: np.ndarray, seed: int = 0) -> None:
    """Writes a volume as a DICOM MR series, one file for each index along Z.

    Args:
        folder: is created.
        name: of the patient; with ``seed`` it makes the identifiers.
        image: (X, Y, Z), from 0 to 32767.
        affine: (4, 4), from voxels to RAS, mm.
        seed: see ``name``.
    """
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = to_lps[:3, :3] / spacing
    rescale_slope = 0.5

    folder.mkdir(parents=True)
    for k in range(image.shape[2]):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.ImplementationClassUID = _uid("implementation")
        ds.SOPClassUID = MRImageStorage
        ds.SOPInstanceUID = _uid(name, seed, "slice", k)
        ds.StudyInstanceUID = _uid(name, seed, "study")
        ds.SeriesInstanceUID = _uid(name, seed, "series")
        ds.FrameOfReferenceUID = _uid(name, seed, "frame of reference")
        ds.PatientName = ds.PatientID = name
        ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", 1, k + 1
        ds.PatientBirthDate = ds.PatientSex = ds.StudyDate = ds.StudyTime = ""
        ds.AccessionNumber = ds.ReferringPhysicianName = ds.PositionReferenceIndicator = ""
        ds.Manufacturer = "sspformer"
        ds.Modality = "MR"
        ds.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
        ds.SeriesDescription = "demonstration"
        ds.ImageComments = STATEMENT
        ds.BodyPartExamined = "BRAIN"
        ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "RM", "NONE", "", "3D"
        ds.RepetitionTime = ds.EchoTime = ds.EchoTrainLength = ""

        ds.ImagePositionPatient = decimal_strings(to_lps[:3] @ [0, 0, k, 1])
        ds.ImageOrientationPatient = decimal_strings([*directions[:, 0], *directions[:, 1]])
        ds.PixelSpacing = decimal_strings([spacing[1], spacing[0]])  # between rows, then between columns
        ds.SliceThickness = ds.SpacingBetweenSlices = decimal_strings([spacing[2]])[0]

        ds.Columns, ds.Rows = image.shape[:2]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = rescale_slope, 0, "US"
        ds.PixelData = (image[:, :, k].T / rescale_slope).astype("<u2").tobytes()
        _save_dicom(ds, folder / f"{k + 1:03d}.dcm")


def _save_dicom(ds: Dataset, path: Path) -> None:
    """Writes a DICOM file with the standard's preamble, for which pydicom 3 renamed the argument."""
    if int(pydicom.__version__.split(".")[0]) >= 3:
        ds.save_as(path, enforce_file_format=True)
    else:
        ds.is_little_endian, ds.is_implicit_VR = True, False
        ds.save_as(path, write_like_original=False)


def _uid(*sources) -> str:
    """A DICOM identifier that depends on nothing but ``sources``."""
    return generate_uid(entropy_srcs=["sspformer demo", *map(str, sources)])
