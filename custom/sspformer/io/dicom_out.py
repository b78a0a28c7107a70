"""Results as DICOM: label maps as DICOM SEG, restored scans as derived series of MR images.

highdicom writes the SEG. For MR images it only has the base class, so this module adds their attributes. The files
carry the patient's identity, because they must be filed with the scan. Messages do not.
"""

from __future__ import annotations

import datetime
import logging
import shutil
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DA, TM, format_number_as_ds

from .. import __version__
from ..pictures import class_colors
from .dicom_in import DicomStack, quiet_dicom, read_stack
from .errors import Unusable
from .files import digest, part_of, replacing
from .load import is_series

logger = logging.getLogger("sspformer")

PRODUCT, MODEL = "SSPFormer for MONAI", "sspformer_mri"

#: coding scheme of structures without a standard code; the names of private schemes begin with 99
PRIVATE_SCHEME = "99SSPFORMER"

#: keywords in pydicom's SNOMED CT dictionary
STRUCTURE_CODES = {
    "cortical grey matter": "CerebralGrayMatter",
    "cerebral white matter": "CerebralWhiteMatter",
    "lateral ventricles": "LateralVentricle",
    "third ventricle": "ThirdVentricle",
    "fourth ventricle": "FourthVentricle",
    "cortical CSF": "CranialSubarachnoidSpace",
    "thalamus": "Thalamus",
    "caudate": "CaudateNucleus",
    "putamen": "Putamen",
    "pallidum": "GlobusPallidus",
    "hippocampus": "Hippocampus",
    "amygdala": "Amygdala",
    "accumbens": "NucleusAccumbens",
    "brain stem": "BrainStem",
    "cerebellar grey matter": "CerebellarCortex",
    "cerebellar white matter": "CerebellarWhiteMatter",
}


# What results copy from the scan. Other elements, such as private ones, the range of the stored values and the
# acquisition matrix, do not hold for the new voxels.

#: must be there, but may be empty
REQUIRED = """
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName
    PositionReferenceIndicator
""".split()

IDENTITY = """
    StudyInstanceUID FrameOfReferenceUID StudyDescription IssuerOfPatientID OtherPatientIDsSequence PatientAge
    PatientSize PatientWeight EthnicGroup PatientComments PatientIdentityRemoved DeidentificationMethod
    DeidentificationMethodCodeSequence IssuerOfAccessionNumberSequence ClinicalTrialSponsorName ClinicalTrialProtocolID
    ClinicalTrialProtocolName ClinicalTrialSiteID ClinicalTrialSiteName ClinicalTrialSubjectID
    ClinicalTrialSubjectReadingID ClinicalTrialTimePointID ClinicalTrialTimePointDescription
""".split()

EQUIPMENT = """
    Manufacturer ManufacturerModelName SoftwareVersions DeviceSerialNumber InstitutionName InstitutionAddress
    InstitutionalDepartmentName StationName
""".split()

LOSSY = "LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod".split()

ACQUISITION = """
    AcquisitionDate AcquisitionTime AcquisitionDateTime AcquisitionNumber BodyPartExamined AnatomicRegionSequence
    Laterality ImageLaterality PatientPosition ProtocolName ContrastBolusAgent ContrastBolusAgentSequence
    ContrastBolusRoute ContrastBolusVolume ScanningSequence SequenceVariant ScanOptions MRAcquisitionType SequenceName
    AngioFlag RepetitionTime EchoTime EchoTrainLength InversionTime FlipAngle NumberOfAverages ImagingFrequency
    ImagedNucleus EchoNumbers MagneticFieldStrength PixelBandwidth ReceiveCoilName
""".split()

#: raise an error for a value that is not valid
VALID = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM, "PatientSex": ("", "F", "M", "O").index}


class _SaveDicomd(MapTransform):
    """Writes results for scans that came as DICOM series; skips the others."""

    suffix = ""  # of the name

    def __init__(self, keys: KeysCollection, output_dir: str | Path, postfix: str) -> None:
        super().__init__(keys)
        import_highdicom()
        self.output_dir, self.postfix = Path(output_dir), postfix
        self._explained = False

    def path_of(self, item: Mapping[Hashable, Any]) -> Path | None:
        """Path of what is written for an item of :func:`sspformer.data.find_inputs`, or None."""
        return self._path(item["name"]) if is_series(item["image"]) else None

    def _path(self, name: str) -> Path:
        return self.output_dir / f"{name}_{self.postfix}{self.suffix}"

    def _write(self, pred: MetaTensor, files: Sequence[str], path: Path) -> None:
        raise NotImplementedError

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            if data.get("files"):
                try:
                    self._write(data[key], data["files"], self._path(data["name"]))
                except Exception as error:  # its message may quote the header
                    reason = str(error) if isinstance(error, Unusable) else getattr(error, "strerror", None)
                    raise ValueError(
                        f"no DICOM of {data['name']}, only its NIfTI: {reason or type(error).__name__}"
                    ) from error
            elif not self._explained:
                logger.info("dicom: inputs that are no DICOM series get a NIfTI alone")
                self._explained = True
        return dict(data)


class SaveSegmentationDicomd(_SaveDicomd):
    """Writes label maps of DICOM series as DICOM SEG, see :func:`segmentation_to_dicom`.

    Args:
        keys: label map on the file's grid, one key: ``(1, X, Y, Z)`` with the names of its structures in its metadata,
            as :class:`sspformer.transforms.InvertArgmaxd` leaves it.
        output_dir: gets ``<name>_<postfix>.dcm``.
        postfix: of the result.

    Raises:
        ImportError: if highdicom is missing, with what to install.
    """

    suffix = ".dcm"

    def _write(self, pred: MetaTensor, files: Sequence[str], path: Path) -> None:
        labels = pred.detach().cpu().numpy()[0]
        segmentation_to_dicom(labels, files, path, pred.meta["class_names"])
        if not labels.any():
            logger.warning(f"{path.name}: no structure was found, so its segments are empty")


class SaveImageDicomd(_SaveDicomd):
    """Writes restored scans of DICOM series as new series of MR images, see :func:`image_to_dicom`.

    Args:
        keys: restored scan, one key: ``(1, X, Y, Z)`` on the file's axes, with affine to RAS mm.
        output_dir: gets the folder ``<name>_<postfix>``.
        postfix: of the result, also at the end of the series description.
        method: see :func:`image_to_dicom`.
        number: see :func:`image_to_dicom`.

    Raises:
        ImportError: if highdicom is missing, with what to install.
    """

    def __init__(self, keys: KeysCollection, output_dir: str | Path, postfix: str, method: str, number: int) -> None:
        super().__init__(keys, output_dir, postfix)
        self.method, self.number = method, number

    def _write(self, pred: MetaTensor, files: Sequence[str], path: Path) -> None:
        voxels, affine = pred.detach().cpu().numpy()[0], np.asarray(pred.affine.cpu())
        image_to_dicom(voxels, affine, files, path, self.method, self.postfix, self.number)


def import_highdicom():
    """Import highdicom, or raise an ``ImportError`` that says what to install."""
    try:
        import highdicom

        if tuple(int(part) for part in highdicom.__version__.split(".")[:2]) < (0, 28):
            raise ImportError(f"found {highdicom.__version__}")
    except ImportError as error:
        raise ImportError(
            f"--dicom true needs highdicom ({error}): pip install highdicom==0.28.2, which needs pydicom 3, or leave "
            "--dicom out for NIfTI alone."
        ) from error
    return highdicom


@quiet_dicom()
def segmentation_to_dicom(
    labels: np.ndarray, files: Sequence[str | Path], path: str | Path, names: Sequence[str]
) -> None:
    """Write a label map as a DICOM SEG in the scan's study, with a binary segment for each name.

    Each frame shows one structure in one slice, and refers to the image of that slice. Empty frames are left out. A SEG
    must have frames, so an empty label map becomes one slice that is empty in all segments.

    Args:
        labels: ``(X, Y, Z)`` uint8, 0 for background, on the grid of :func:`sspformer.io.read_dicom`.
        files: of the series, classic or enhanced, in any order.
        path: of the file to write.
        names: of the labels 1, 2, ...; those in :data:`STRUCTURE_CODES` get SNOMED CT codes, others private ones.

    Raises:
        Unusable: if the files are no series that a result can refer to, or their grid is another one.
    """
    hd = import_highdicom()
    stack, frames, first = _read_sources(files)
    planes = np.ascontiguousarray(labels.T)  # slices, rows, columns
    if planes.shape != (shape := (len(frames), int(first.Rows), int(first.Columns))):
        raise Unusable(f"the label map has {planes.shape} slices, rows and columns, the series {shape}")
    algorithm = hd.AlgorithmIdentificationSequence(PRODUCT, codes.DCM.ArtificialIntelligence, __version__)
    segments = []
    for number, (name, color) in enumerate(zip(names, class_colors(len(names)), strict=True), 1):
        category, kind = codes_of(name)
        segments.append(
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type="AUTOMATIC",
                algorithm_identification=algorithm,
                display_color=hd.color.CIELabColor.from_string(color),
            )
        )
    n_planes = len(planes) if planes.any() else 1
    sources = [_seg_source(stack, file) for file in dict.fromkeys(frame["file"] for frame in frames)]
    enhanced = "PerFrameFunctionalGroupsSequence" in first  # of which highdicom takes one, and more besides
    segmentation = hd.seg.Segmentation(
        source_images=sources[:1] if enhanced else sources,
        further_source_images=sources[1:] if enhanced else None,
        pixel_array=planes[:n_planes],
        plane_positions=[hd.PlanePositionSequence("PATIENT", frame["position"]) for frame in frames[:n_planes]],
        segmentation_type="BINARY",  # read by more programs than LABELMAP
        segment_descriptions=segments,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        content_label="SEGMENTATION",
        content_creator_name="",  # no person, but the attribute must be there
        **_new_series(first, "seg", 1),
    )
    with replacing(path) as part:
        segmentation.save_as(part)


@quiet_dicom()
def image_to_dicom(
    voxels: np.ndarray,
    affine: np.ndarray,
    files: Sequence[str | Path],
    folder: str | Path,
    method: str,
    label: str,
    number: int,
) -> None:
    """Write a restored scan as a new series of MR images in the scan's study, one file for each slice.

    Values are rounded to multiples of the scan's rescale slope, so unchanged voxels keep their values exactly. If the
    slope differs between slices, or 16 bits cannot hold the result, its range is divided into 65535 steps.

    Args:
        voxels: ``(X, Y, Z)`` float32, X along the rows of an image.
        affine: to RAS mm, ``(4, 4)``.
        files: of the series, classic or enhanced, in any order.
        folder: gets ``001.dcm``, ...; replaces the images of an earlier run.
        method: name of what was done, such as "denoising", for the derivation description.
        label: goes in brackets at the end of the series description.
        number: series number less 100 times that of the scan; 1 is the segmentation's.

    Raises:
        Unusable: if a result cannot refer to the files, or the folder holds other files.
    """
    hd = import_highdicom()
    stack, frames, first = _read_sources(files)
    is_short = int(first.get("BitsAllocated") or 16) <= 16
    rescalings = {(frame["slope"], frame["intercept"]) for frame in frames} if is_short else set()
    stored, slope, intercept = _quantized(voxels, rescalings)
    low, high = np.percentile(voxels, [0.5, 99.5])

    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    axes = to_lps[:3, :2] / spacing[:2]
    spacing = spacing.round(7)  # ImageOrientationPatient has no more digits
    distance, distance_before = _slice_distance(affine), _slice_distance(stack.affine)
    thickness = frames[0]["thickness"] or distance_before
    made_by = f"{PRODUCT} {__version__}, {method} by a neural network. Research only."
    series = _new_series(first, label, number)
    resampled = voxels.shape != (int(first.Columns), int(first.Rows), len(frames))

    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and all(_is_ours(path) for path in folder.iterdir())):
        raise Unusable(f"{folder} holds files that are not images of ours, and is not replaced: move it away")
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for k, plane in enumerate(stored):
        nearest = np.linalg.solve(stack.affine, affine @ [0, 0, k, 1])[2]
        frame = frames[int(np.clip(np.rint(nearest), 0, len(frames) - 1))]
        source = stack.datasets[frame["file"]]
        ds = hd.SOPClass(
            study_instance_uid=source.StudyInstanceUID,
            sop_class_uid=MRImageStorage,
            sop_instance_uid=generate_uid(),
            instance_number=k + 1,
            modality="MR",
            transfer_syntax_uid=ExplicitVRLittleEndian,
            **series,
        )
        ds.update(_mr_header(source, frame["number"]))
        ds.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
        ds.BurnedInAnnotation = "NO"
        ds.DerivationDescription = made_by
        if resampled:  # the standard has no code for denoising
            ds.DerivationCodeSequence = [hd.sr.CodedConcept.from_code(codes.DCM.SpatialResampling)]
        ds.SourceImageSequence = [_reference(source, frame["number"], "SourceImageForImageProcessingOperation")]
        references = Dataset()
        references.SeriesInstanceUID = source.SeriesInstanceUID
        references.ReferencedInstanceSequence = [_reference(source)]
        ds.ReferencedSeriesSequence = [references]
        if item := _acquisition_equipment(source):
            ds.ContributingEquipmentSequence = [item]

        ds.ImagePositionPatient = decimal_strings((to_lps @ [0, 0, k, 1])[:3])
        ds.ImageOrientationPatient = decimal_strings(axes.T.ravel())
        ds.PixelSpacing = decimal_strings([spacing[1], spacing[0]])  # between rows, then between columns
        ds.SpacingBetweenSlices, ds.SliceThickness = decimal_strings([distance, thickness * distance / distance_before])
        ds.set_pixel_data(plane, "MONOCHROME2", bits_stored=16, generate_instance_uid=False)
        if (slope, intercept) != (1, 0):
            ds.RescaleSlope, ds.RescaleIntercept = decimal_strings([slope, intercept])
            ds.RescaleType = "US"  # unspecified
        ds.WindowCenter, ds.WindowWidth = decimal_strings([(low + high) / 2, max(high - low, 1)])
        ds.save_as(part / f"{k + 1:03d}.dcm", enforce_file_format=True)

    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _is_ours(path: Path) -> bool:
    """Whether this module wrote the file, or it is a hidden file of the file system."""
    if path.name.startswith("."):
        return True
    try:
        return pydicom.dcmread(path, stop_before_pixels=True).get("ManufacturerModelName") == MODEL
    except (OSError, pydicom.errors.InvalidDicomError):
        return False


def _read_sources(files: Sequence[str | Path]) -> tuple[DicomStack, list[dict], Dataset]:
    """Headers of the series, its frames in the order of the stack, and the header of the first frame.

    Raises `Unusable` if a header lacks an identifier that results refer to, or if one is repeated.
    """
    stack = read_stack(files, pixels=False)
    frame_of_reference = generate_uid()  # of a series that has none
    for ds in stack.datasets:
        for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
            if not ds.get(keyword):
                raise Unusable(f"no {keyword} in the DICOM header, so no result can refer to the series")
        ds.FrameOfReferenceUID = ds.get("FrameOfReferenceUID") or frame_of_reference
    instances, series = ({ds[uid].value for ds in stack.datasets} for uid in ("SOPInstanceUID", "SeriesInstanceUID"))
    if len(instances) < len(stack.datasets) or len(series) > 1:
        raise Unusable(
            "its slices have one SOPInstanceUID, or a SeriesInstanceUID each, so no result can refer to the series"
        )
    frames = [stack.frames[i] for i in stack.order]
    return stack, frames, stack.datasets[frames[0]["file"]]


def _header(ds: Dataset, number: int, keywords: Sequence[str]) -> Dataset:
    """Elements with these keywords and valid values; in an enhanced file, also from the groups of the frame."""
    holders = [ds]
    if frames := ds.get("PerFrameFunctionalGroupsSequence"):
        for groups in (frames[number - 1], *(ds.get("SharedFunctionalGroupsSequence") or ())):
            holders += [element.value[0] for element in groups if element.VR == "SQ" and element.value]
    header = Dataset()
    for keyword in keywords:
        try:
            element = next(holder[keyword] for holder in holders if keyword in holder)
            VALID.get(keyword, str)(element.value or "")
            header.add(element)
        except Exception:  # absent or not valid; pydicom raises many types
            continue
    for keyword in REQUIRED:
        if keyword not in header:
            setattr(header, keyword, None)
    return header


def _mr_header(ds: Dataset, number: int) -> Dataset:
    """What a classic MR image copies from a frame."""
    header = _header(ds, number, [*REQUIRED, *IDENTITY, *LOSSY, *ACQUISITION])
    enhanced = _header(ds, number, ["EffectiveEchoTime", "EchoPulseSequence", "FrameLaterality"])
    known = {
        "ScanningSequence": {"SPIN": "SE", "GRADIENT": "GR"}.get(enhanced.get("EchoPulseSequence"), "RM"),  # research
        "SequenceVariant": "NONE",
        "ScanOptions": None,
        "MRAcquisitionType": None,
        "RepetitionTime": None,
        "EchoTime": enhanced.get("EffectiveEchoTime"),
        "EchoTrainLength": None,
        "PatientPosition": None,
    }
    if side := enhanced.get("FrameLaterality"):
        known["ImageLaterality"] = side
    elif "BodyPartExamined" not in header:
        known["Laterality"] = None  # required unless the body part is known not to be a paired one
    for keyword, value in known.items():  # all are required
        if keyword not in header:
            setattr(header, keyword, value)
    if "IR" not in header.ScanningSequence and "InversionTime" in header:
        del header.InversionTime  # only allowed with inversion recovery
    return header


def _seg_source(stack: DicomStack, file: int) -> Dataset:
    """A header for highdicom to refer to: the file's identity, and the geometry that the series was read with.

    Files may keep their geometry elsewhere, differ in the last digits, or state another slice distance.
    """
    ds = stack.datasets[file]
    header = _header(ds, 1, [*REQUIRED, *IDENTITY, *EQUIPMENT, *LOSSY])
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "Rows", "Columns"):
        header.add(ds[keyword])
    header.SpecificCharacterSet = "ISO_IR 192"
    frames = [frame for frame in stack.frames if frame["file"] == file]
    distance = _slice_distance(stack.affine)

    hd = import_highdicom()
    shared, per_frame = Dataset(), [Dataset() for _ in frames]
    thickness = frames[0]["thickness"] or distance
    shared.PixelMeasuresSequence = hd.PixelMeasuresSequence(stack.frames[0]["spacing"], thickness, distance)
    shared.PlaneOrientationSequence = hd.PlaneOrientationSequence("PATIENT", stack.frames[0]["orientation"])
    for groups, frame in zip(per_frame, frames, strict=True):
        groups.PlanePositionSequence = hd.PlanePositionSequence("PATIENT", frame["position"])
    if "PerFrameFunctionalGroupsSequence" in ds:
        header.NumberOfFrames = len(frames)
        header.SharedFunctionalGroupsSequence, header.PerFrameFunctionalGroupsSequence = [shared], per_frame
    else:
        for macro in (*shared, *per_frame[0]):
            header.update(macro.value[0])
    return header


def _new_series(source: Dataset, label: str, number: int) -> dict[str, Any]:
    """Arguments that highdicom's classes share for all instances of a new series; text is UTF-8."""
    now = datetime.datetime.now()
    end = f" ({label})"
    return {
        "series_instance_uid": generate_uid(),
        "series_number": abs(int(source.get("SeriesNumber") or 0)) % 10**7 * 100 + number,
        "series_description": f"{source.get('SeriesDescription') or 'MR'}"[: 64 - len(end)] + end,
        "manufacturer": PRODUCT,
        "manufacturer_model_name": MODEL,
        "software_versions": __version__,
        "device_serial_number": __version__,  # required
        **{f"{what}_date": now.date() for what in ("content", "series")},
        **{f"{what}_time": now.time() for what in ("content", "series")},
        "specific_character_set": "ISO_IR 192",
    }


def codes_of(name: str) -> tuple[Code, Code]:
    """Category and type of a structure."""
    if name in STRUCTURE_CODES:
        return codes.SCT.AnatomicalStructure, getattr(codes.SCT, STRUCTURE_CODES[name])
    return codes.SCT.Tissue, Code(digest(name), PRIVATE_SCHEME, name[:64])


def _reference(ds: Dataset, number: int | None = None, purpose: str | None = None) -> Dataset:
    """Reference to an instance, or to a frame of an enhanced one; ``purpose`` is the keyword of a code."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    if number and "PerFrameFunctionalGroupsSequence" in ds:
        item.ReferencedFrameNumber = number
    if purpose:
        code = import_highdicom().sr.CodedConcept.from_code(getattr(codes.DCM, purpose))
        item.PurposeOfReferenceCodeSequence = [code]
    return item


def _acquisition_equipment(ds: Dataset) -> Dataset | None:
    """The scanner; the elements in the header itself now name our software."""
    item = _header(ds, 1, EQUIPMENT)
    for keyword in REQUIRED:
        delattr(item, keyword)
    if not item.get("Manufacturer"):
        return None
    code = import_highdicom().sr.CodedConcept.from_code(codes.DCM.AcquisitionEquipment)
    item.PurposeOfReferenceCodeSequence = [code]
    return item


def _quantized(voxels: np.ndarray, rescalings: set[tuple[float, float]]) -> tuple[np.ndarray, float, float]:
    """Stored values ``(slices, rows, columns)``, uint16 or int16, with their rescale slope and intercept.

    Args:
        voxels: ``(columns, rows, slices)``.
        rescalings: slopes and intercepts of the scan's images; kept if there is one pair and the values fit.
    """
    slope, intercept = next(iter(rescalings)) if len(rescalings) == 1 else (0.0, 0.0)
    ends = np.array([voxels.min(), voxels.max()], dtype=np.float64)
    if slope > 0:
        low, high = np.rint((ends - intercept) / slope)
    if slope <= 0 or low < -(2**15) or high >= (2**16 if low >= 0 else 2**15):
        slope, intercept = (float(number) for number in decimal_strings([np.ptp(ends) / (2**16 - 1) or 1.0, ends[0]]))
        low = 0
    dtype = np.uint16 if low >= 0 else np.int16
    limits = np.iinfo(dtype)
    stored = np.empty(voxels.shape[::-1], dtype)
    for plane, image in zip(stored, voxels.T):
        plane[:] = np.clip(np.rint((image.astype(np.float64) - intercept) / slope), limits.min, limits.max)
    return stored, slope, intercept


def _slice_distance(affine: np.ndarray) -> float:
    """Distance of neighbouring slices along their normal, in mm."""
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    return round(float(abs(affine[:3, 2] @ normal) / np.linalg.norm(normal)), 7)


def decimal_strings(numbers: Sequence[float]) -> list[str]:
    """DICOM decimal strings, at most 16 characters each."""
    return [format_number_as_ds(float(number)) for number in numbers]
