"""DICOM as hospitals have it: what is read agrees with dcm2niix, what is written with dcmqi, dcm2niix and dciodvfy.

Tools that are not installed are skipped. highdicom writes the results, so it is no independent reader of them."""

import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from monai.bundle import ConfigParser
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from test_data import dicom_series, dicom_slice, enhanced_dicom, nifti, oblique_affine, save_dicom
from test_inference import BUNDLE, gain, infer, report, threshold  # noqa: F401 (a fixture)

from sspformer.data import DatasetOptions, find_inputs, prepare_datalist
from sspformer.engines import ScansFailed
from sspformer.io import LoadScand, read_dicom
from sspformer.io import dicom_out as dicom

try:
    import highdicom as hd
except ImportError:  # it needs a newer pydicom than MONAI Label has
    hd = None

needs_highdicom = pytest.mark.skipif(hd is None, reason="needs highdicom: pip install highdicom==0.28.2")
SHAPE = (24, 20, 16)
#: method, label and number of the series
DENOISING = ("denoising", "denoised", 2)
SERIES = "1.2.826.0.1.3680043.8.498.4"


def tool(name, package):
    """The path of a program that a wheel brings; skips without it."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"needs {name}: pip install {package}")


def dcm2niix(folder, out):
    """The one volume that dcm2niix makes of a folder."""
    out.mkdir()
    command = [tool("dcm2niix", "dcm2niix"), "-b", "n", "-z", "n", "-p", "n", "-f", "scan", "-o", str(out), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (path,) = out.glob("*.nii")
    assert done.returncode == 0, done.stdout
    return nib.load(path)


def assert_valid(*paths):
    """dciodvfy, which checks files against the standard's definitions of their objects, finds no error."""
    program = tool("dciodvfy", "dicom3tools")
    for path in paths:
        said = subprocess.run([program, "-new", str(path)], capture_output=True, text=True, timeout=60)
        errors = [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]
        assert not errors and said.returncode == 0, "\n".join(errors)


def assert_same(image, voxels, affine, atol=0.0):
    """The same values at the same places of the patient, whatever the order of the axes."""
    image, expected = (nib.as_closest_canonical(i) for i in (image, nib.Nifti1Image(voxels.astype(float), affine)))
    assert image.shape == expected.shape
    assert np.allclose(image.affine, expected.affine, atol=1e-3)
    assert np.abs(image.get_fdata() - expected.get_fdata()).max() <= atol


def image(seed=0, peak=900, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, peak, shape).astype(np.int16)


def labels(n_structures=3, shape=SHAPE):
    """A box of each structure, the last in one slice alone, and none in the outermost slices."""
    volume = np.zeros(shape, np.uint8)
    for label in range(1, n_structures + 1):
        ends = 4, 3 if label == n_structures else 8
        volume[4 * label : 4 * label + 3, 3 : 9 + label, ends[0] - 2 : ends[1]] = label
    return volume


def write_series(folder, kind, array, affine=None, **elements):
    """A classic series, an enhanced file, or an enhanced one in two parts; returns the files."""
    affine = oblique_affine() if affine is None else affine
    elements = {
        "FrameOfReferenceUID": SERIES + ".1",
        "StudyDate": "20031127",
        "SliceThickness": 2.5,
        "SpacingBetweenSlices": 3,
        **elements,
    }
    if kind == "classic":
        return dicom_series(folder, array, affine, SERIES, **elements)
    n = array.shape[2]
    if kind == "enhanced":
        return [enhanced_dicom(folder / "IM1", array, affine, SERIES, **elements)]
    elements["ConcatenationUID"] = SERIES + ".2"
    parts = (slice(n // 2), slice(n // 2, n))
    return [enhanced_dicom(folder / f"IM{i}", array, affine, SERIES, part, **elements) for i, part in enumerate(parts)]


# ---------------------------------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [1, -1])
def test_dcm2niix_reads_the_same(tmp_path, flip):
    """Oblique, shuffled names without extension, order by position; dcm2niix turns the rows around."""
    array, affine = image(), oblique_affine() @ np.diag([1, 1, flip, 1])
    files = write_series(tmp_path / "in", "classic", array, affine, RescaleSlope=0.5, RescaleIntercept=-3)
    voxels, found, _ = read_dicom(files)
    assert np.array_equal(voxels, array[:, :, ::flip] * 0.5 - 3) or flip > 0
    assert_same(dcm2niix(tmp_path / "in", tmp_path / "out"), voxels, found, atol=1e-4)


def test_dcm2niix_reads_the_same_of_an_enhanced_file(tmp_path):
    files = write_series(tmp_path / "in", "enhanced", image())
    assert_same(dcm2niix(tmp_path / "in", tmp_path / "out"), *read_dicom(files)[:2])


@pytest.fixture
def philips(tmp_path):
    """A real enhanced file's header (Philips, 24 of its frames), which nibabel's wheel brings; its pixels are noise."""
    path = Path(nib.__file__).parent / "nicom" / "tests" / "data" / "philips_mprage.dcm.gz"
    if not path.exists():
        pytest.skip(f"needs nibabel's test file {path.name}")
    ds = pydicom.dcmread(gzip.open(path), stop_before_pixels=True)
    ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:24]
    ds.NumberOfFrames, ds.Rows, ds.Columns, ds[0x20011018].value = 24, 20, 16, 24  # Philips counts once more
    noise = np.random.default_rng(0).integers(0, 4000, (24, 20, 16)).astype("<u2")
    ds.PixelData = noise.tobytes()
    ds["PixelData"].VR = "OW"
    return save_dicom(ds, tmp_path / "philips" / "IM_0001"), noise


def test_dcm2niix_reads_the_same_of_a_real_enhanced_header(tmp_path, philips):
    path, noise = philips
    voxels, affine, _ = read_dicom([path])
    assert np.allclose(voxels.max(), noise.max() * 2.1079365079365)
    assert_same(dcm2niix(path.parent, tmp_path / "out"), voxels, affine, atol=0.01)


@needs_highdicom
def test_results_of_a_real_enhanced_header(tmp_path, philips):
    path, _ = philips
    voxels, affine, _ = read_dicom([path])
    labels = (voxels > 4000).astype(np.uint8)
    dicom.segmentation_to_dicom(labels, [path], tmp_path / "seg.dcm", ["brain stem"])
    dicom.image_to_dicom(voxels, affine, [path], tmp_path / "den", *DENOISING)
    assert np.array_equal(volume_of(hd.seg.segread(tmp_path / "seg.dcm"), affine, labels.shape), labels)
    images = sorted((tmp_path / "den").iterdir())
    again, found, _ = read_dicom(images)
    assert np.array_equal(again, voxels) and np.allclose(found, affine, atol=1e-4)
    ds = pydicom.dcmread(images[3])
    assert (ds.ScanningSequence, ds.MagneticFieldStrength, ds.ImageLaterality) == ("GR", 3, "U") and ds.EchoTime > 3
    assert_valid(tmp_path / "seg.dcm", images[3])


def test_each_slice_has_its_own_rescaling(tmp_path):
    array, affine = image(), oblique_affine()
    for k in range(SHAPE[2]):
        ds = dicom_slice(array, affine, k, SERIES, RescaleSlope=1 + k / 8, RescaleIntercept=k)
        save_dicom(ds, tmp_path / "in" / f"IM{k}")
    voxels, found, _ = read_dicom(sorted((tmp_path / "in").iterdir()))
    k = np.arange(SHAPE[2])
    assert np.allclose(voxels, array * (1 + k / 8) + k) and np.allclose(found, affine, atol=1e-4)


@pytest.mark.parametrize("name", ["MR_small_implicit", "MR_small_bigendian", "MR_small_RLE", "MR_small_jp2klossless"])
def test_transfer_syntaxes(tmp_path, name):
    plain = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array
    ds = pydicom.dcmread(get_testdata_file(f"{name}.dcm"))
    for k in range(9):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0.0, 0.0, 3.0 * k], [1, 0, 0, 0, 1, 0]
        ds.save_as(tmp_path / f"{k}.dcm")
    (item,) = find_inputs(tmp_path)
    assert np.array_equal(LoadScand()(item)["image"][0], np.repeat(plain.T[:, :, None], 9, axis=2))


def test_an_enhanced_image_in_several_files_is_one_scan(tmp_path):
    array = image()
    write_series(tmp_path / "in", "concatenation", array)
    write_series(tmp_path / "in" / "other", "enhanced", array[:, :, ::-1], SeriesNumber=7)
    items = {item["name"]: item for item in find_inputs(tmp_path / "in")}
    assert set(items) == {"in_series4", "other_series7"}
    assert np.array_equal(LoadScand()(items["in_series4"])["image"][0], array)


def test_a_study_as_it_is_exported(tmp_path):
    """Two usable series in one folder, and all that comes with them."""
    folder, affine = tmp_path / "DICOM", oblique_affine()
    dicom_series(folder, image(0), affine, "1.2.3.4", names=range(16))
    dicom_series(folder, image(1), affine, "1.2.3.5", names=range(20, 36))
    shutil.copy(get_testdata_file("DICOMDIR"), folder / "DICOMDIR")
    shutil.copy(get_testdata_file("DICOMDIR"), folder / "index")
    shutil.copy(get_testdata_file("reportsi.dcm"), folder / "report")
    shutil.copy(get_testdata_file("CT_small.dcm"), folder / "ct")
    shutil.copy(get_testdata_file("SC_rgb_rle.dcm"), folder / "screen")
    shutil.copy(get_testdata_file("no_meta.dcm"), folder / "raw.dcm")
    (folder / "IM").write_bytes(b"")
    (folder / "IM.dcm").write_bytes(b"")
    for k, axes in enumerate(([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])):
        localizer = dicom_slice(image(), affine, k, "1.2.3.1", ImageOrientationPatient=axes)
        save_dicom(localizer, folder / f"loc{k}")
    datalist = prepare_datalist(DatasetOptions(folder, tmp_path / "out", skip_unreadable=True))
    assert {item["name"] for item in datalist["training"]} == {"DICOM_series4", "DICOM_series5"}
    said = (tmp_path / "out" / "scans.csv").read_text()
    for reason in (
        "not MR: the DICOM modality is CT",
        "not MR: the DICOM modality is OT",
        "different orientations (a localizer",
        "dcmconv repairs",
        "empty file (0 bytes)",
    ):
        assert reason in said, reason
    assert "report" not in said and "index" not in said
    assert len(find_inputs(folder)) == 7


# ---------------------------------------------------------------------------------------------------------------------
# Segmentations
# ---------------------------------------------------------------------------------------------------------------------


def volume_of(seg, affine, shape=SHAPE):
    """The label map in a SEG as highdicom reads it, on the grid of an affine."""
    part = seg.get_volume(combine_segments=True)
    step = np.linalg.solve(affine, np.diag([-1, -1, 1, 1]) @ part.affine)
    whole = np.zeros(shape, np.uint8)
    places = np.rint(nib.affines.apply_affine(step, np.argwhere(part.array))).astype(int)
    whole[tuple(places.T)] = part.array[part.array > 0]
    return whole


@needs_highdicom
@pytest.mark.parametrize("kind", ["classic", "enhanced", "concatenation"])
def test_a_segmentation_refers_to_its_series(tmp_path, kind):
    files = write_series(
        tmp_path / "in",
        kind,
        image(),
        SeriesDescription="T1 sag",
        PatientName="Müller^Jürgen",
        SpecificCharacterSet="ISO_IR 100",
        PatientSex="unknown",
        StudyTime="late",
    )
    _, affine, _ = read_dicom(files)
    truth = labels()
    dicom.segmentation_to_dicom(truth, files[::-1], tmp_path / "out" / "a_seg.dcm", ["thalamus", "tumour, left", "x"])
    seg = hd.seg.segread(tmp_path / "out" / "a_seg.dcm")
    assert np.array_equal(volume_of(seg, affine), truth)

    source = pydicom.dcmread(files[0])
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "StudyDate"):
        assert seg[keyword].value == source[keyword].value, keyword
    assert str(seg.PatientName) == "Müller^Jürgen" and seg.PatientSex == "" and not seg.get("AccessionNumber")
    assert (seg.Modality, seg.SegmentationType, seg.SeriesNumber) == ("SEG", "BINARY", 401)
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID and seg.SeriesDescription == "T1 sag (seg)"
    assert {uid for *_, uid in seg.get_source_image_uids()} == {pydicom.dcmread(file).SOPInstanceUID for file in files}
    assert len(seg.PerFrameFunctionalGroupsSequence) == 6 + 6 + 1  # none empty

    first, second, _ = seg.SegmentSequence
    kinds = [item.SegmentedPropertyTypeCodeSequence[0] for item in (first, second)]
    assert (kinds[0].CodeValue, kinds[0].CodingSchemeDesignator) == ("42695009", "SCT")
    assert (kinds[1].CodeMeaning, kinds[1].CodingSchemeDesignator) == ("tumour, left", "99SSPFORMER")
    assert first.SegmentLabel == "thalamus" and first.SegmentAlgorithmName == "SSPFormer for MONAI"
    assert hd.color.CIELabColor.from_dicom_value(first.RecommendedDisplayCIELabValue).to_rgb() == (230, 89, 76)
    if kind == "classic":  # each slice with the image of that slice
        for path in files:
            place = int(np.rint(np.linalg.solve(affine, [*lps(path), 1])[2]))
            uid = pydicom.dcmread(path).SOPInstanceUID
            plane = seg.get_pixels_by_source_instance(
                [uid], combine_segments=True, assert_missing_frames_are_empty=True
            )
            assert np.array_equal(plane[0], truth[:, :, place].T)


def lps(path):
    """Where the image of a file lies, in RAS mm."""
    return np.array(pydicom.dcmread(path).ImagePositionPatient, float) * [-1, -1, 1]


@needs_highdicom
@pytest.mark.parametrize("kind", ["classic", "enhanced"])
def test_dcmqi_reads_the_segmentation_as_the_nifti_is(tmp_path, kind):
    program = tool("segimage2itkimage", "dcmqi")
    files = write_series(tmp_path / "in", kind, image(), AccessionNumber="")
    truth, (_, affine, _) = labels(), read_dicom(files)
    truth[0, 0, [0, -1]] = 1  # it writes the slices from the first to the last that has a segment
    dicom.segmentation_to_dicom(truth, files, tmp_path / "a_seg.dcm", ["putamen", "caudate", "mine"])
    command = [program, "--inputDICOM", str(tmp_path / "a_seg.dcm"), "--outputDirectory", str(tmp_path)]
    done = subprocess.run([*command, "--outputType", "nii"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    for number in (1, 2, 3):
        assert_same(nib.load(tmp_path / f"{number}.nii.gz"), np.where(truth == number, number, 0), affine)
    described = json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"]
    assert [item[0]["SegmentLabel"] for item in described] == ["putamen", "caudate", "mine"]


@needs_highdicom
@pytest.mark.parametrize("kind", ["classic", "enhanced"])
def test_an_empty_segmentation_is_a_valid_one(tmp_path, kind):
    files = write_series(tmp_path / "in", kind, image())
    path = tmp_path / "a_seg.dcm"
    dicom.segmentation_to_dicom(np.zeros(SHAPE, np.uint8), files, path, ["thalamus", "other"])
    seg = hd.seg.segread(path)
    assert seg.number_of_segments == 2 and not seg.pixel_array.any()
    assert {uid for *_, uid in seg.get_source_image_uids()} == {pydicom.dcmread(file).SOPInstanceUID for file in files}
    assert_valid(path)


@needs_highdicom
def test_every_structure_of_the_bundle_has_its_own_code():
    parser = ConfigParser()
    parser.read_meta(str(BUNDLE / "configs" / "metadata.json"))
    names = list(parser["_meta_"]["network_data_format"]["outputs"]["pred"]["channel_def"].values())[1:]
    found = [dicom.codes_of(name)[1] for name in names]
    assert len(set(found)) == len(names) == 17
    assert [name for name, code in zip(names, found) if code.scheme_designator != "SCT"] == [
        "ventral diencephalon and basal forebrain"  # of the two together there is none
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def finer(affine, factor):
    return affine @ np.diag([*(1 / np.array(factor)), 1])


@needs_highdicom
@pytest.mark.parametrize("kind", ["classic", "enhanced", "concatenation"])
def test_a_restored_image_is_a_series_of_its_own(tmp_path, kind):
    array, factor = image(), (2, 1, 3)
    elements = {
        "RescaleSlope": 0.5,
        "SmallestImagePixelValue": 3,
        "PixelPaddingValue": 0,
        "MagneticFieldStrength": 3,
        "RepetitionTime": 9.5,
        "SeriesDescription": "x" * 70,
        "Manufacturer": "Scanner AG",
        "BodyPartExamined": "HEAD",
    }
    files = write_series(tmp_path / "in", kind, array, **elements)
    before, affine, _ = read_dicom(files)
    voxels = np.random.default_rng(1).uniform(-20, 460, np.multiply(SHAPE, factor)).astype(np.float32)
    out = tmp_path / "out" / "a_sr"
    for _ in range(2):  # the second time it is replaced
        dicom.image_to_dicom(voxels, finer(affine, factor), files, out, "super-resolution", "sr", 3)
    (item,) = find_inputs(out)
    assert len(item["image"]) == SHAPE[2] * 3 == len(list(out.iterdir())) and not list(out.parent.glob("*.part"))
    again = LoadScand()(item)["image"]
    assert np.allclose(again.affine, finer(affine, factor), atol=1e-4)
    assert np.abs(again[0].numpy() - voxels).max() <= 0.5 / 2 + 1e-4  # half a step of the slope

    sources, images = map(pydicom.dcmread, files), list(map(pydicom.dcmread, item["image"]))
    uids = {ds.SOPInstanceUID: ds for ds in sources}
    first = pydicom.dcmread(files[0])
    assert (
        len({ds.SOPInstanceUID for ds in images}) == len(images) and len({ds.SeriesInstanceUID for ds in images}) == 1
    )
    for ds in images:
        for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientName", "PatientID", "MagneticFieldStrength"):
            assert ds[keyword].value == first[keyword].value, keyword
        assert ds.SeriesInstanceUID != first.SeriesInstanceUID and ds.SeriesNumber == 403
        assert ds.SOPClassUID.name == "MR Image Storage" and ds.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert "super-resolution" in ds.DerivationDescription and ds.SoftwareVersions == dicom.__version__
        assert ds.DerivationCodeSequence[0].CodeMeaning == "Spatial resampling" and ds.BurnedInAnnotation == "NO"
        assert len(ds.SeriesDescription) == 64 and ds.SeriesDescription.endswith("x (sr)")
        assert "SmallestImagePixelValue" not in ds and "PixelPaddingValue" not in ds
        assert ds.ContributingEquipmentSequence[0].Manufacturer == "Scanner AG"
        assert np.allclose(ds.PixelSpacing, [2, 0.75]) and ds.SpacingBetweenSlices == 1
        assert abs(ds.SliceThickness - 2.5 / 3) < 1e-6 and 0 < ds.WindowCenter < ds.WindowWidth < 500
    nearest = [ds.SourceImageSequence[0] for ds in images[::3]]  # those that lie where a slice of the scan lies
    if kind == "classic":
        places = [uids[item.ReferencedSOPInstanceUID].ImagePositionPatient for item in nearest]
        assert np.allclose(places, [ds.ImagePositionPatient for ds in images[::3]], atol=1e-3)
    else:
        for item, ds in zip(nearest, images[::3]):
            groups = uids[item.ReferencedSOPInstanceUID].PerFrameFunctionalGroupsSequence
            place = groups[item.ReferencedFrameNumber - 1].PlanePositionSequence[0].ImagePositionPatient
            assert np.allclose(place, ds.ImagePositionPatient, atol=1e-3)
    assert_same(dcm2niix(out, tmp_path / "nii"), again[0].numpy(), again.affine.numpy(), atol=1e-4)
    assert_valid(*sorted(out.iterdir())[::20])


@needs_highdicom
@pytest.mark.parametrize(
    ("elements", "low", "high", "step"),
    [
        ({}, 0, 900, 1),  # as the scan, without any rescaling
        ({"RescaleSlope": 0.25, "RescaleIntercept": -10}, -10, 400, 0.25),
        ({}, -50.0, 30000, 1),  # needs a sign
        ({}, 0, 200000, 200000 / 65535),  # does not fit in 16 bits
        ({"RescaleSlope": 1e-9}, 0, 1, 1 / 65535),
        ({"RescaleSlope": -1}, -900, 0, 900 / 65535),
    ],
)
def test_values_come_back_within_half_a_step(tmp_path, elements, low, high, step):
    files = write_series(tmp_path / "in", "classic", image(), **elements)
    voxels = np.random.default_rng(1).uniform(low, high, SHAPE).astype(np.float32)
    voxels[0, 0, :2] = low, high
    dicom.image_to_dicom(voxels, read_dicom(files)[1], files, tmp_path / "out", *DENOISING)
    again = read_dicom(sorted((tmp_path / "out").iterdir()))[0]
    assert np.abs(again - voxels).max() <= step / 2 + 1e-6 * max(-low, high)  # they are float32
    rescaled = elements or step != 1
    assert all(("RescaleSlope" in pydicom.dcmread(path)) == bool(rescaled) for path in (tmp_path / "out").iterdir())


@needs_highdicom
def test_a_scan_that_is_not_changed_comes_back_exactly_and_so_do_several_rescalings_nearly(tmp_path):
    files = write_series(tmp_path / "a", "classic", image(), RescaleSlope=0.123456789, RescaleIntercept=-7.7)
    before, affine, _ = read_dicom(files)
    dicom.image_to_dicom(before, affine, files, tmp_path / "out", *DENOISING)
    assert np.array_equal(read_dicom(sorted((tmp_path / "out").iterdir()))[0], before)
    for k, path in enumerate(files):
        ds = pydicom.dcmread(path)
        ds.RescaleSlope = 1 + k / 8
        ds.save_as(path)
    before, affine, _ = read_dicom(files)
    dicom.image_to_dicom(before, affine, files, tmp_path / "out", *DENOISING)
    assert np.abs(read_dicom(sorted((tmp_path / "out").iterdir()))[0] - before).max() < np.ptp(before) / 65535 * 0.51


@needs_highdicom
def test_files_of_others_in_the_folder_are_not_deleted(tmp_path):
    files = write_series(tmp_path / "a", "classic", image())
    voxels, affine, _ = read_dicom(files)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for _ in ("notes.txt", "of_a_scanner.dcm"):
        with pytest.raises(ValueError, match="out holds files that are not images of ours"):
            dicom.image_to_dicom(voxels, affine, files, tmp_path / "out", *DENOISING)
        assert len(list((tmp_path / "out").iterdir())) == 1 and not list(tmp_path.glob("*.part"))
        (tmp_path / "out" / "notes.txt").unlink(missing_ok=True)
        shutil.copy(files[0], tmp_path / "out" / "of_a_scanner.dcm")


# ---------------------------------------------------------------------------------------------------------------------
# The workflow
# ---------------------------------------------------------------------------------------------------------------------


@needs_highdicom
def test_inference_writes_dicom_beside_the_nifti_of_all_tasks(tmp_path, threshold, caplog):  # noqa: F811
    scans, out = tmp_path / "scans", tmp_path / "out"
    write_series(scans / "s", "classic", (image() // 450 * 900).astype(np.int16), np.diag([2.0, 2, 2, 1]))
    write_series(scans / "e", "enhanced", image(1), np.diag([2.0, 2, 2, 1]), SeriesNumber=9)
    nifti(scans / "n.nii.gz", image(2), np.diag([2.0, 2, 2, 1]))
    with caplog.at_level(logging.INFO):
        infer(scans, out, dicom="true", roi_size=[24, 24, 24], **threshold)
    assert caplog.text.count("get a NIfTI alone") == 1
    assert sorted(path.name for path in out.glob("*.dcm")) == ["e_series9_seg.dcm", "s_series4_seg.dcm"]
    for name in ("e_series9", "s_series4"):
        written = nib.load(out / f"{name}_seg.nii.gz")
        seg = hd.seg.segread(out / f"{name}_seg.dcm")
        assert np.array_equal(volume_of(seg, written.affine), np.asarray(written.dataobj)) and seg.pixel_array.any()
        assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["bright"]

    for overlay, postfix in (("denoising.json", "denoised"), ("super_resolution.json", "sr")):
        infer(scans, out, "restoration.json", overlay, dicom=True, roi_size=[24, 24, 24], **gain(tmp_path, 1.1))
        for name in ("e_series9", "s_series4"):
            written = nib.load(out / f"{name}_{postfix}.nii.gz")
            voxels, affine, _ = read_dicom(sorted((out / f"{name}_{postfix}").iterdir()))
            assert np.allclose(affine, written.affine, atol=1e-4)
            assert np.abs(voxels - written.get_fdata()).max() <= 0.5 + 1e-3
    assert not (out / "n_sr").exists() and (out / "n_sr.nii.gz").exists()

    # A DICOM output that is missing, or of another result, is not done; and with dicom false it is not asked for.
    overlay = ("restoration.json", "super_resolution.json")
    shutil.rmtree(out / "s_series4_sr")
    infer(scans, out, *overlay, roi_size=[24, 24, 24], **gain(tmp_path, 1.1))
    assert {row["status"] for row in report(out).values()} <= {"already there", "written"}
    assert not (out / "s_series4_sr").exists()
    infer(scans, out, *overlay, dicom=True, roi_size=[24, 24, 24], **gain(tmp_path, 1.1))
    assert (out / "s_series4_sr").is_dir() and report(out)["n"]["status"] != "failed"


def test_without_highdicom_the_batch_does_not_begin(tmp_path, threshold, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "highdicom", None)
    nifti(tmp_path / "scans" / "n.nii.gz", image(), np.diag([2.0, 2, 2, 1]))
    with pytest.raises(Exception) as caught:
        infer(tmp_path / "scans", tmp_path / "out", dicom="true", **threshold)
    error = caught.value
    while error.__cause__ is not None and "pip install highdicom" not in str(error):
        error = error.__cause__
    assert "--dicom true needs highdicom" in str(error)
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {".lock"}  # of the folder, and no result
    infer(tmp_path / "scans", tmp_path / "out", dicom="false", **threshold)
    assert report(tmp_path / "out")["n"]["status"] == "written"


# ---------------------------------------------------------------------------------------------------------------------
# Whose scan it is
# ---------------------------------------------------------------------------------------------------------------------

MARK = "Zq7"
DATES = {"DA": "19620914", "DT": "19620914031537", "TM": "031537.2468"}


def plant_identity(folder, series, rescale="1"):
    """A series with a mark in every text element of the header that may say who, where or when."""
    elements = {}
    for tag, (vr, _, _, retired, keyword) in pydicom.datadict.DicomDictionary.items():
        if tag >> 16 in (0x8, 0x10, 0x12, 0x20, 0x32, 0x38, 0x40) and keyword and not retired:
            if vr in ("PN", "LO", "SH", "ST", "LT", "UT"):
                elements[keyword] = MARK + f"{tag:08x}"
            elif vr in DATES:
                elements[keyword] = DATES[vr]
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        elements[keyword] = SERIES + ".770077"
    elements["PatientBirthDate"] = "1962.9.14"  # pydicom's warnings quote what is not valid
    affine = np.diag([2.0, 2, 2, 1])
    for k in range(SHAPE[2]):
        ds = dicom_slice(image(), affine, k, f"{SERIES}.7700.{series}", **elements)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{SERIES}.7700.{series}.{k}"
        ds.add_new("RescaleSlope", "LO", rescale)  # a text where a number should be
        save_dicom(ds, folder / f"{k:03d}")
    return folder


@needs_highdicom
def test_nothing_of_the_patient_is_said(tmp_path, threshold):  # noqa: F811
    """Marks in the header appear neither in what is printed nor in any file but the DICOM of the patient."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    plant_identity(scans / "good", 1)
    plant_identity(scans / "odd", 2, rescale=MARK)
    for path in sorted(plant_identity(scans / "short", 3).iterdir())[:1]:
        path.write_bytes(path.read_bytes()[:-200])
    options = {"dataset_dir": str(scans), "output_dir": str(out / "inference"), "bundle_root": str(BUNDLE)}
    options |= {"dicom": "true", "pictures": "true", "roi_size": [24, 24, 24], **threshold}
    script = f"""
from sspformer.data import DatasetOptions, prepare_datalist
prepare_datalist(DatasetOptions({str(scans)!r}, {str(out / "training")!r}, skip_unreadable=True, val_fraction=0))
from monai.bundle import run
logging = {str(BUNDLE / "configs" / "logging.conf")!r}
config = {str(BUNDLE / "configs" / "inference.json")!r}
run("infer", config_file=config, logging_file=logging, **{options})
"""
    environment = {**os.environ, "PYTHONPATH": str(BUNDLE.parent / "custom")}
    command = [sys.executable, "-W", "always::UserWarning", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "2 of 3 scans failed" in done.stderr, done.stdout + done.stderr
    assert {"good_series1": "written", "odd_series2": "failed", "short_series3": "failed"} == {
        name: row["status"] for name, row in report(out / "inference").items()
    }
    of_patient = out / "inference" / "good_series1_seg.dcm"
    files = [path for path in out.rglob("*") if path.is_file() and path != of_patient]
    assert {".csv", ".json", ".gz", ".png"} <= {path.suffix for path in files}
    words = [MARK, *DATES.values(), "1962.9.14", SERIES + ".77"]
    assert all(word.encode() in of_patient.read_bytes() for word in (MARK + "00100010", DATES["DA"], SERIES + ".77"))
    texts = {str(path): path.read_bytes() for path in files}
    texts |= {name: gzip.decompress(text) for name, text in texts.items() if name.endswith(".gz")}
    texts |= {"printed": (done.stdout + done.stderr).encode()}
    for name, text in texts.items():
        assert not [word for word in words if word.encode() in text], name


@needs_highdicom
def test_an_unforeseen_error_is_not_quoted(tmp_path, threshold, monkeypatch):  # noqa: F811
    write_series(tmp_path / "s", "classic", image(), np.diag([2.0, 2, 2, 1]))
    for error, said in ((TypeError("Doe^Jane"), "TypeError"), (OSError(28, "No space left"), "No space left")):
        monkeypatch.setattr(dicom, "segmentation_to_dicom", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ScansFailed, match=f"no DICOM of s_series4, only its NIfTI: {said}") as caught:
            infer(tmp_path / "s", tmp_path / "out", dicom=True, roi_size=[24, 24, 24], **threshold)
        assert "Doe" not in str(caught.value) and "Doe" not in (tmp_path / "out" / "inference.csv").read_text()
