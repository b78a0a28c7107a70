"""From a folder of scans to a datalist: what users bring, what is refused and why, who is whom, and what is read."""

import csv
import gzip
import json
import logging
import os
import random
import re

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from sspformer import data
from sspformer.data import DatasetOptions, is_label_path, subject_of
from sspformer.io import LoadScand

SHAPE = (12, 10, 9)
MR_STORAGE, ENHANCED_MR_STORAGE = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
PHI = ("Doe^Jane", "MRN-4711", "19700101")


def voxels(shape=SHAPE, seed=0, dtype=np.int16):
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(dtype)


def oblique_affine(spacing=(1.5, 2.0, 3.0)):
    """A right-handed affine, about 20 degrees off the axes."""
    rotation, _ = np.linalg.qr(np.eye(3) + 0.2 * np.random.default_rng(3).standard_normal((3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.array(spacing)
    affine[:3, 3] = (-20, 13, 7)
    return affine


def nifti(path, array=None, affine=None, image_class=nib.Nifti1Image, **header):
    """Writes a NIfTI; `header` sets fields of the file's header afterwards, which nibabel would not write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image_class(voxels() if array is None else array, np.eye(4) if affine is None else affine)
    nib.save(image, path)
    if header:
        opener = gzip.open if path.suffix == ".gz" else open
        content = opener(path, "rb").read()
        edited = nib.Nifti1Header(content[:348], check=False)
        for key, value in header.items():
            edited[key] = value
        with opener(path, "wb") as file:
            file.write(edited.binaryblock + content[348:])
    return path


def set_pixels(ds, pixels, signed, elements):
    """The 16-bit pixels of a slice ``(X, Y)``, then other elements of the header; None deletes one."""
    ds.Columns, ds.Rows = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, int(signed)
    ds.PixelData = np.ascontiguousarray(pixels.T).astype("<i2" if signed else "<u2").tobytes()
    for key, value in elements.items():
        delattr(ds, key) if value is None else setattr(ds, key, value)


def dicom_slice(array, affine, k, series, patient_id=PHI[1], **elements):
    """Slice k of a volume (X, Y, Z) with an affine to RAS mm, as an MR dataset."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MR_STORAGE
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SeriesNumber = series[:5], series, int(series[-1])
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = PHI[0], patient_id, PHI[2]
    ds.Modality = "MR"
    ds.InstanceNumber = 1  # of no use on purpose: order must come from the positions
    ds.ImagePositionPatient = [float(f"{v:.8g}") for v in (lps @ [0, 0, k, 1])[:3]]
    axes = np.concatenate([lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]])
    ds.ImageOrientationPatient = [float(f"{v:.8g}") for v in axes]
    ds.PixelSpacing = [float(spacing[1]), float(spacing[0])]
    set_pixels(ds, array[:, :, k], signed=True, elements=elements)
    return ds


def save_dicom(ds, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True) if int(pydicom.__version__[0]) > 2 else ds.save_as(
        path, write_like_original=False
    )
    return path


def dicom_series(folder, array=None, affine=None, series="1.2.3.4", names=None, **elements):
    """Writes a volume as a DICOM series, under shuffled names without an extension."""
    array = voxels() if array is None else array
    affine = oblique_affine() if affine is None else affine
    names = names or random.Random(series).sample(range(10_000, 99_999), array.shape[2])
    return [
        save_dicom(dicom_slice(array, affine, k, series, **elements), folder / f"IM{names[k]}")
        for k in range(array.shape[2])
    ]


def enhanced_dicom(path, array, affine, series, part=slice(None), **elements):
    """Writes a volume, or a part of its shuffled slices, as one enhanced file; the rest of `dicom_slice` is kept."""
    order = random.Random(0).sample(range(array.shape[2]), array.shape[2])[part]
    slices = [dicom_slice(array, affine, k, series, **elements) for k in order]
    ds = slices[0]
    shared, per_frame = Dataset(), []
    macros = {
        "PixelMeasures": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
        "PlaneOrientation": ("ImageOrientationPatient",),
        "PixelValueTransformation": ("RescaleSlope", "RescaleIntercept"),
    }
    for macro, keywords in macros.items():
        inner = Dataset()
        for keyword in keywords:
            if keyword in ds:
                setattr(inner, keyword, ds[keyword].value)
                delattr(ds, keyword)
        setattr(shared, f"{macro}Sequence", [inner])
    for one in slices:
        frame, plane = Dataset(), Dataset()
        plane.ImagePositionPatient = one.ImagePositionPatient
        frame.PlanePositionSequence = [plane]
        per_frame.append(frame)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ENHANCED_MR_STORAGE
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], per_frame
    ds.NumberOfFrames, ds.PixelData = len(slices), b"".join(one.PixelData for one in slices)
    del ds.ImagePositionPatient
    return save_dicom(ds, path)


def prepare_datalist(*args, **options):
    return data.prepare_datalist(DatasetOptions(*args, **options))


def prepare_test_scans(*args, **options):
    return data.prepare_test_scans(DatasetOptions(*args, **{"skip_unreadable": True, **options}))


def refused(folder, **options):
    """The reasons of a refusal, as text."""
    with pytest.raises(ValueError) as caught:
        prepare_datalist(folder, **options)
    return str(caught.value)


def rows(output_dir):
    with open(output_dir / "scans.csv", newline="") as file:
        return list(csv.DictReader(file))


def names(items):
    return [item["name"] for item in items]


# ---------------------------------------------------------------------------------------------------------------------
# Whose scan is it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "subject"),
    [
        ("ds000011_sub-02_T1.nii.gz", "ds000011_sub-02"),
        ("ds002748_sub-02_T1.nii.gz", "ds002748_sub-02"),
        ("sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz", "sub-02"),
        ("siteA/sub-02/anat/sub-02_T1w.nii.gz", "siteA/sub-02"),
        ("ds000011/sub-02/anat/sub-02_T1w.nii.gz", "ds000011/sub-02"),
        ("ds000011/derivatives/prep/sub-02/sub-02_T1w.nii.gz", "ds000011/sub-02"),
        ("isles22_sub-strokecase0001_ADC.nii.gz", "isles22_sub-strokecase0001"),
        ("T1/sub-9.nii.gz", "sub-9"),
        ("openms-long_patient01-study2_FLAIR.nii.gz", "openms-long_patient01"),
        ("dcmqa-decubitus_crlab_T1-HFDR.nii.gz", "dcmqa-decubitus_crlab"),
        ("BraTS001/flair.nii.gz", "BraTS001"),
        ("BraTS001/BraTS001_t1ce.nii.gz", "BraTS001"),
        ("BraTS-GLI-00005-001-t2f.nii.gz", "BraTS-GLI-00005"),
        ("imagesTr/case_017_0001.nii.gz", "case_017"),
        ("p7/study1/T1.nii.gz", "p7"),
        ("p7/session1/skullfree.nii.gz", "p7"),
        ("p7/T1_1mm_iso.nii", "p7"),
        ("T2/T2_patient07.nii.gz", "patient07"),
        ("images/IXI013-HH-1212.nii.gz", "IXI013-HH-1212"),
        ("images/hippocampus_001.nii.gz", "hippocampus_001"),
        ("torchio_fernando_T2.nii.gz", "torchio_fernando"),
        ("ADNI/002_S_0295/MP-RAGE/2006-04-18/I1372.nii", "002_S_0295"),
        ("OAS30001_MR_d0129_T1w.nii.gz", "OAS30001"),
        ("T1.nii.gz", "root"),
    ],
)
def test_subject_of(path, subject):
    assert subject_of(path, "root") == subject


@pytest.mark.parametrize(
    ("path", "is_label"),
    [
        ("labelsTr/a.nii.gz", True),
        ("data/manual_masks/a.nii.gz", True),
        ("segmentations/a.nii", True),
        ("a_seg.nii.gz", True),
        ("a-seg.nii.gz", True),
        ("sub-1_desc-brain_mask.nii.gz", True),
        ("sub-1_dseg.nii", True),
        ("p1/seg.nii.gz", True),
        ("a_LABEL2.nii.gz", True),
        ("unmasked/a.nii.gz", False),
        ("a_unmasked.nii.gz", False),
        ("image_segment.nii.gz", False),
        ("labelled_data/a.nii.gz", False),
        ("maskell_07_T1.nii.gz", False),
    ],
)
def test_is_label_path(path, is_label):
    assert is_label_path(path) is is_label


def test_subject_pattern(tmp_path):
    for name in ("x-A-1", "x-A-2", "x-B-1"):
        nifti(tmp_path / f"{name}.nii.gz")
    items = prepare_datalist(tmp_path, subject_pattern=r"x-(\w)")
    assert {i["subject"] for items in items.values() for i in items} == {"A", "B"}
    with pytest.raises(ValueError, match=r"does not match the path x-"):
        prepare_datalist(tmp_path, subject_pattern="patient")


def test_scans_of_one_subject_never_straddle_the_split(tmp_path):
    for p in range(10):
        for contrast in ("T1", "T2", "FLAIR"):
            nifti(tmp_path / f"p{p:02}" / f"{contrast}.nii.gz")
    splits = [prepare_datalist(tmp_path, val_fraction=0.3, seed=seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    for split in splits:
        training, validation = ({item["subject"] for item in split[key]} for key in ("training", "validation"))
        assert not training & validation and len(validation) == 3
        assert len(split["training"]) + len(split["validation"]) == 30
    assert not prepare_datalist(tmp_path, val_fraction=0)["validation"]
    with pytest.raises(ValueError, match="val_fraction"):
        prepare_datalist(tmp_path, val_fraction=1.5)


def test_a_single_subject_serves_for_both_with_a_warning(tmp_path, caplog):
    nifti(tmp_path / "head_T1.nii.gz")
    nifti(tmp_path / "fmri" / "head.nii.gz", voxels((*SHAPE, 9)))
    for path, expected in (("head_T1.nii.gz", ["head_T1"]), ("fmri", [f"head_vol{v:03}" for v in (0, 3, 5, 8)])):
        datalist = prepare_datalist(tmp_path / path, tmp_path / f"out of {path}")
        assert datalist["training"] == datalist["validation"] and names(datalist["training"]) == expected
        assert "subject_pattern" in caplog.text
        assert prepare_datalist(tmp_path / f"out of {path}" / "datalist.json") == datalist


# ---------------------------------------------------------------------------------------------------------------------
# Finding and reporting
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_everything(tmp_path, caplog):
    folder, out = tmp_path / "data", tmp_path / "data" / "out"
    nifti(folder / "p1" / "T1.nii.gz")
    nifti(folder / "p2" / "deep" / "er" / "T1.nii")
    nifti(folder / "p3" / "T1.hdr", image_class=nib.Nifti1Pair)
    nifti(folder / "p4" / "fmri.nii.gz", voxels((*SHAPE, 9)))
    nifti(folder / "p5" / "one.nii.gz", voxels((*SHAPE, 1)))
    dicom_series(folder / "p6")
    nifti(folder / "labels" / "p1.nii.gz", np.ones(SHAPE, np.uint8))
    nifti(folder / "p1" / "T1_seg.nii.gz", np.ones(SHAPE, np.uint8))
    (folder / "p1" / "._T1.nii.gz").write_bytes(b"macOS")
    (folder / "readme.txt").write_text("hello")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    os.symlink(folder, folder / "p1" / "loop")
    nifti(out / "prediction.nii.gz")  # what a run wrote is no input of the next

    with caplog.at_level(logging.INFO, "sspformer"):
        datalist = prepare_datalist(folder, out)
    items = sorted(datalist["training"] + datalist["validation"], key=lambda item: item["name"])
    volumes = [f"fmri_vol{v:03}" for v in (0, 3, 5, 8)]
    assert names(items) == sorted(["p1_T1", "er_T1", "p3_T1", "one", "p6_series4", *volumes])
    assert [item["volume"] for item in items if "volume" in item] == [0, 3, 5, 8]
    assert len(next(item["image"] for item in items if item["name"] == "p6_series4")) == SHAPE[2]
    assert json.loads(json.dumps(datalist)) == datalist
    assert all(LoadScand()(item)["image"].shape == (1, *SHAPE) for item in items)

    assert "6 usable scans of 6 subjects (5 training, 1 validation), 0 unusable, " in caplog.text
    assert "2 label maps left out, 1 other files ignored." in caplog.text
    table = {row["name"]: row for row in rows(out)}
    assert table["p1_T1"]["shape"] == "12x10x9" and table["p1_T1"]["orientation"] == "RAS"
    assert table["p6_series4"]["format"] == "DICOM" and table["p6_series4"]["spacing_mm"] == "1.5x2x3"
    assert table["fmri"]["status"] == "usable; volumes 0 3 5 8 of a 4D file"
    assert [row["path"] for row in rows(out) if "label map" in row["status"]] == [
        "labels/p1.nii.gz",
        "p1/T1_seg.nii.gz",
    ]


def test_only_thirty_rows_are_printed(tmp_path, caplog):
    for p in range(32):
        nifti(tmp_path / "data" / f"p{p:02}.nii")
    with caplog.at_level(logging.INFO, "sspformer"):
        prepare_datalist(tmp_path / "data", tmp_path / "out")
    assert "p29" in caplog.text and "p30" not in caplog.text and "... and 2 more" in caplog.text
    assert len(rows(tmp_path / "out")) == 32


def test_names_are_unique(tmp_path):
    for path in ("a/x.nii", "a/x.nii.gz", "b/x.nii", "c/a/x.nii"):
        nifti(tmp_path / path)
    found = prepare_datalist(tmp_path, subject_pattern="x")["training"]
    assert sorted(names(found)) == ["a_x", "a_x-2", "b_x", "c_a_x"]


def test_a_datalist_file_keeps_its_split(tmp_path):
    for name in "abc":
        nifti(tmp_path / "imagesTr" / f"{name}7.nii.gz")
    dicom_series(tmp_path / "dicom")
    lists = {
        "training": [{"image": "./imagesTr/a7.nii.gz", "label": "x"}, "imagesTr/b7.nii.gz"],
        "validation": [{"image": "imagesTr/c7.nii.gz", "subject": "me"}, {"image": "dicom"}],
    }
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(lists))
    datalist = prepare_datalist(file)
    assert names(datalist["training"]) == ["a7", "b7"] and datalist["validation"][1]["subject"] == "me"
    assert datalist["validation"][0]["name"] == "dicom_series4"
    file.write_text(json.dumps({"training": ["imagesTr/a7.nii.gz", "imagesTr/b7.nii.gz", "gone.nii.gz"]}))
    assert "gone.nii.gz: no such file" in refused(file)
    assert len(prepare_datalist(file, skip_unreadable=True)["validation"]) == 1
    file.write_text(json.dumps({"training": ["imagesTr/a7.nii.gz", "imagesTr/b7.nii.gz"], "validation": []}))
    assert [len(items) for items in prepare_datalist(file).values()] == [2, 0]
    file.write_text("[1, 2]")
    assert '"training"' in refused(file)


def test_a_scan_that_is_written_anew_is_of_another_version(tmp_path):
    nifti(tmp_path / "a7.nii.gz")
    dicom_series(tmp_path / "dicom")
    (first, slices), (same, _) = (prepare_datalist(tmp_path, val_fraction=0)["training"] for _ in range(2))
    assert first == same
    nifti(tmp_path / "a7.nii.gz", voxels(seed=1))
    os.utime(slices["image"][-1], ns=(0, 0))
    for old, new in zip((first, slices), prepare_datalist(tmp_path, val_fraction=0)["training"], strict=True):
        assert old | {"version": new["version"]} == new and old["version"] != new["version"]


def test_test_scans_are_evaluated_and_never_trained_on(tmp_path, caplog):
    for i, name in enumerate(["a7", "b7", "c7", "d7", "e7_0000"]):
        nifti(tmp_path / "scans" / f"{name}.nii.gz", voxels(seed=i))
    nifti(tmp_path / "scans" / "a7_seg.nii.gz")
    file = tmp_path / "dataset.json"
    training = [{"image": "scans/a7.nii.gz", "label": "scans/a7_seg.nii.gz"}, {"image": "scans/b7.nii.gz"}]
    test = ["./scans/c7.nii.gz", {"image": "scans/d7.nii.gz", "label": "gone.nii.gz"}, "scans/e7.nii.gz"]

    file.write_text(json.dumps({"training": training, "test": [*test, "gone7.nii.gz"]}))
    last = ("gone7.nii.gz", "test scan, left out")
    for dataset_dir in (file, tmp_path):  # the folder that holds it is the same data set
        found = prepare_datalist(dataset_dir, tmp_path / "out", val_fraction=0.5)
        assert sorted(names(found["training"] + found["validation"])) == ["a7", "b7"]
        assert len(found["validation"]) == 1
        assert (rows(tmp_path / "out")[-1]["path"], rows(tmp_path / "out")[-1]["status"]) == last
        assert sorted(names(prepare_test_scans(dataset_dir, tmp_path / "out"))) == ["c7", "d7", "e7_0000"]
        assert {row["split"] for row in rows(tmp_path / "out")[:3]} == {"test"}
    assert "Unusable: gone7.nii.gz" in caplog.text and "trained on" not in caplog.text
    with pytest.raises(ValueError, match="gone7.nii.gz: no such file"):
        prepare_test_scans(file, skip_unreadable=False)

    file.write_text(json.dumps({"training": training, "validation": test[:1]}))
    assert names(prepare_test_scans(file)) == ["c7"] and "trained on" not in caplog.text
    file.write_text(json.dumps({"training": training}))
    assert names(prepare_test_scans(file)) == ["a7", "b7"]
    assert "including those that may have been trained on" in caplog.text

    file.write_text(json.dumps({"test": test}))
    assert len(prepare_test_scans(file)) == 3
    assert "nothing to train on in" in refused(file)
    file.write_text(json.dumps({"training": training, "test": ["./scans/b7.nii.gz"]}))
    assert "b7.nii.gz twice" in refused(file)
    one = [{"image": f"scans/{name}7.nii.gz", "subject": "me"} for name in "abc"]
    file.write_text(json.dumps({"training": one[:2], "test": one[2:]}))
    prepare_datalist(file, val_fraction=0)
    assert "scans of me in training and in test" in caplog.text


def test_a_folder_of_test_images_is_not_trained_on(tmp_path, caplog):
    for path in ("imagesTr/p1", "imagesTr/p2", "imagesTs/p3", "labelsTs/p3"):
        nifti(tmp_path / f"{path}.nii.gz")
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0}}')  # of nnU-Net's version 2: no lists
    assert names(prepare_datalist(tmp_path, val_fraction=0)["training"]) == ["p1", "p2"]
    assert names(prepare_test_scans(tmp_path)) == names(prepare_datalist(tmp_path / "imagesTs")["training"]) == ["p3"]
    assert "no test split" not in caplog.text


def test_missing_and_empty_folders_are_named(tmp_path):
    (tmp_path / "my_data").mkdir()
    with pytest.raises(FileNotFoundError, match="my_dta does not exist. Did you mean .*my_data"):
        prepare_datalist(tmp_path / "my_dta")
    assert "my_data" in (message := refused(tmp_path / "my_data")) and "*.nii.gz" in message


def test_unchanged_scans_are_not_read_again(tmp_path, monkeypatch, caplog):
    folder, out = tmp_path / "data", tmp_path / "out"
    nifti(folder / "p1.nii.gz")
    nifti(folder / "p2.nii.gz")
    dicom_series(folder / "p3")
    reads = []
    for module, name in (
        (data.check, "check_nifti"),
        (data.check, "check_dicom"),
        (data.series, "dicom_header"),
    ):
        original = getattr(module, name)

        def spy(files, *args, original=original):
            reads.append(files[0].name)
            return original(files, *args)

        spy.__name__ = name
        monkeypatch.setattr(module, name, spy)
    first = prepare_datalist(folder, out)
    assert len(reads) == 2 + 1 + SHAPE[2]
    reads.clear()
    assert prepare_datalist(folder, out) == first and not reads
    nifti(folder / "p2.nii.gz", voxels(seed=5))
    os.utime(folder / "p2.nii.gz", (1, 1))
    second = prepare_datalist(folder, out)
    assert second != first and reads == ["p2.nii.gz"]
    assert "too small" in refused(folder, output_dir=out, min_size=11)  # the question is part of the key
    (out / "scan_check.json").write_text("{ not json")
    reads.clear()
    assert prepare_datalist(folder, out) == second and len(reads) == 2 + 1 + SHAPE[2]
    assert "corrupt" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def write_bad_nifti(kind, folder):
    path, image = folder / "bad.nii.gz", voxels()
    broken = image.astype(np.float32)
    broken[3, 3, 3] = {"inf": np.inf}.get(kind, np.nan)
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    arrays = {
        "nan": broken,
        "inf": broken,
        "constant": np.full(SHAPE, 7, np.int16),
        "rgb": rgb,
        "complex": image.astype(np.complex64),
        "small": voxels((12, 12, 4)),
        "flat": voxels((12, 12)),
        "flat3": voxels((12, 12, 1)),
        "5d": voxels((*SHAPE, 1, 3)),
        "vectors": voxels((*SHAPE, 3)),
    }
    headers = {
        "zero spacing": {"pixdim": [1, 1, 0, 1, 0, 0, 0, 0], "sform_code": 0, "qform_code": 0},
        "vectors": {"intent_code": 1006},
        "nan affine": {"srow_x": [np.nan, 0, 0, 0]},
        "singular": {"srow_x": [1, 1, 0, 0], "srow_y": [1, 1, 0, 0]},
    }
    nifti(path, arrays.get(kind, image), **headers.get(kind, {}))
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "bit rot":
        path.write_bytes(content[:-6] + bytes([content[-6] ^ 255]) + content[-5:])  # in gzip's check sum
    elif kind == "text":
        path.write_bytes(gzip.compress(b"not an image " * 100))
    elif kind == "not gzip":
        path.write_bytes(gzip.decompress(content))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "stub":
        path.write_bytes(gzip.compress(b"abc"))
    elif kind == "link":
        path.unlink()
        os.symlink(folder / "annexed", path)
    elif kind == "plain truncated":
        path.unlink()
        (folder / "bad.nii").write_bytes(gzip.decompress(content)[:1000])
    elif kind == "analyze":
        path.unlink()
        nifti(folder / "bad.nii.hdr", image_class=nib.AnalyzeImage)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "truncated or corrupt"),
        ("plain truncated", "truncated or corrupt"),
        ("bit rot", "truncated or corrupt"),
        ("text", "not a NIfTI file although named so"),
        ("stub", "too short for a header"),
        ("not gzip", "not gzip-compressed although named .gz"),
        ("empty", "empty file"),
        ("link", "broken link"),
        ("constant", "all voxels have the same value"),
        ("nan", "1 voxels are NaN or infinite"),
        ("inf", "1 voxels are NaN or infinite"),
        ("rgb", "a colour image (RGB)"),
        ("complex", "complex numbers"),
        ("small", "too small: 12x12x4 voxels"),
        ("flat", "a 2D image"),
        ("flat3", "a 2D image"),
        ("5d", "5D data (shape 12x10x9x1x3: vectors?)"),
        ("vectors", "4D data (shape 12x10x9x3: a displacement field?)"),
        ("zero spacing", "zero or non-finite voxel spacing (1x0x1 mm)"),
        ("nan affine", "zero or non-finite voxel spacing"),
        ("singular", "singular affine"),
        ("analyze", "Analyze 7.5, not NIfTI"),
    ],
)
def test_an_unusable_nifti_gets_its_reason(tmp_path, kind, reason):
    tmp_path.joinpath("data").mkdir()
    write_bad_nifti(kind, tmp_path / "data")
    assert reason in (message := refused(tmp_path / "data")) and "bad.nii" in message
    assert "--data_options#skip_unreadable true" in message


def test_unusable_scans_can_be_skipped_but_are_named(tmp_path, caplog):
    write_bad_nifti("nan", tmp_path / "data")
    nifti(tmp_path / "data" / "p1.nii.gz")
    nifti(tmp_path / "data" / "p2.nii.gz")
    with caplog.at_level(logging.INFO, "sspformer"):
        datalist = prepare_datalist(tmp_path / "data", tmp_path / "out", skip_unreadable=True)
    assert sorted(names(datalist["training"] + datalist["validation"])) == ["p1", "p2"]
    assert "Unusable: bad.nii.gz: 1 voxels are NaN" in caplog.text and "2 usable" in caplog.text
    assert [row["status"] for row in rows(tmp_path / "out") if row["path"] == "bad.nii.gz"] == [
        "unusable: 1 voxels are NaN or infinite"
    ]


def test_only_twenty_unusable_scans_are_named_in_the_error(tmp_path):
    for i in range(23):
        (tmp_path / f"bad{i:02}.nii").write_bytes(b"")
    message = refused(tmp_path)
    assert "bad19.nii" in message and "bad20.nii" not in message and "... and 3 more" in message
    with pytest.raises(ValueError, match="no usable scan"):
        prepare_datalist(tmp_path, skip_unreadable=True)


def test_constant_volumes_of_a_4d_file_are_passed_over(tmp_path):
    array = voxels((*SHAPE, 4))
    array[..., 0] = 0
    nifti(tmp_path / "bold.nii.gz", array)
    items = prepare_datalist(tmp_path, max_volumes=2, val_fraction=0)["training"]
    assert [item["volume"] for item in items] == [1, 3]
    assert torch.equal(LoadScand()(items[1])["image"][0].as_tensor(), torch.from_numpy(array[..., 3]).float())


def uneven(folder):
    files = dicom_series(folder, voxels((12, 10, 14)))
    files[6].unlink()


def twice(folder):
    dicom_series(folder, names=range(10, 30))
    dicom_series(folder, voxels(seed=1), names=range(30, 50))


def mixed(folder, **change):
    dicom_series(folder)
    save_dicom(dicom_slice(voxels(), oblique_affine(), 2, "1.2.3.4", **change), folder / "odd")


def compressed(folder):
    ds = pydicom.dcmread(get_testdata_file("MR_small_jp2klossless.dcm"))
    for k in range(9):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.ImagePositionPatient = list(np.array([0.0, 0.0, 3.0 * k]))
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.save_as(folder / f"{k}.dcm")


def corrupt(folder):
    files = dicom_series(folder)
    files[3].write_bytes(files[3].read_bytes()[:-60])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda f: dicom_series(f, Modality="CT"), "not MR: the DICOM modality is CT"),
        (lambda f: dicom_series(f, PixelData=None), "no pixel data"),
        (lambda f: dicom_series(f, Rows=None), "no pixel data"),
        (lambda f: dicom_series(f, SamplesPerPixel=3, PhotometricInterpretation="RGB"), "a colour image"),
        (lambda f: dicom_series(f, ImagePositionPatient=None), "no ImagePositionPatient"),
        (lambda f: dicom_series(f, PixelSpacing=[0, 1]), "zero or non-finite PixelSpacing"),
        (lambda f: dicom_series(f, np.full(SHAPE, 5)), "all voxels have the same value"),
        (lambda f: dicom_series(f, voxels((12, 10, 3))), "too small: 12x10x3"),
        (lambda f: dicom_series(f, voxels((12, 10, 1))), "a 2D image"),
        (lambda f: dicom_series(f, NumberOfFrames=2), "multi-frame DICOM without a position"),
        (lambda f: mixed(f, ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), "different orientations"),
        (lambda f: mixed(f, Rows=5), "different shapes"),
        (uneven, "missing slices"),
        (twice, "several images at one slice position (2 on average"),
        (corrupt, "truncated or corrupt"),
        (lambda f: (f / "a.dcm").write_bytes(b"no magic"), "neither NIfTI nor DICOM"),
    ],
)
def test_an_unusable_dicom_series_gets_its_reason(tmp_path, write, reason):
    assert reason in refused((write(tmp_path), tmp_path)[1])


def test_a_compressed_series_names_its_decoder(tmp_path, monkeypatch):
    compressed(tmp_path)
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda self: 1 / 0))  # no decoder, on any machine
    assert "(JPEG 2000" in (message := refused(tmp_path)) and "pip install pylibjpeg" in message


# ---------------------------------------------------------------------------------------------------------------------
# DICOM
# ---------------------------------------------------------------------------------------------------------------------


def assert_twin(loaded, array, affine):
    assert isinstance(loaded, MetaTensor) and loaded.dtype == torch.float32
    assert np.allclose(loaded.affine, affine, atol=1e-4)
    assert np.array_equal(loaded[0].numpy(), array)


def test_a_dicom_series_equals_its_nifti_twin(tmp_path):
    """Two oblique series in one folder, names shuffled, InstanceNumber useless, one rescaled."""
    affine, first, second = oblique_affine(), voxels(seed=1), voxels(seed=2)
    dicom_series(tmp_path / "d" / "p1", first, affine, "1.2.3.4", RescaleSlope=2.0, RescaleIntercept=-5.0)
    dicom_series(tmp_path / "d" / "p1", second, affine, "1.2.3.5")
    nifti(tmp_path / "p1.nii.gz", first * 2.0 - 5, affine)
    twin = LoadScand()({"image": str(tmp_path / "p1.nii.gz")})["image"]
    assert_twin(twin, first * 2.0 - 5, affine)
    items = {item["name"]: item for item in prepare_datalist(tmp_path / "d")["training"]}
    assert list(items) == ["p1_series4", "p1_series5"]
    assert_twin(LoadScand()(items["p1_series4"])["image"], twin[0].numpy(), twin.affine)
    assert_twin(LoadScand()(items["p1_series5"])["image"], second, affine)
    heights = [pydicom.dcmread(f).ImagePositionPatient[2] for f in items["p1_series4"]["image"]]
    assert heights == sorted(heights)


def test_an_enhanced_file_is_a_series(tmp_path):
    array, affine = voxels(), oblique_affine()
    enhanced_dicom(tmp_path / "enhanced.dcm", array, affine, "1.2.3.6")
    (item,) = prepare_datalist(tmp_path)["training"]
    assert_twin(LoadScand()(item)["image"], array, affine)


def test_copies_of_a_slice_are_left_out(tmp_path):
    files = dicom_series(tmp_path / "data")
    (tmp_path / "data" / "copy").write_bytes(files[2].read_bytes())
    datalist = prepare_datalist(tmp_path / "data", tmp_path / "out")
    assert len(datalist["training"][0]["image"]) == SHAPE[2]
    assert rows(tmp_path / "out")[0]["status"] == "usable; 1 duplicate files left out"


def test_dicom_subjects(tmp_path):
    dicom_series(tmp_path / "a", series="1.2.3.1")
    dicom_series(tmp_path / "b", series="1.2.3.2")  # the same PatientID in another folder
    dicom_series(tmp_path / "anon7" / "T1", series="1.2.9.3", patient_id="")
    dicom_series(tmp_path / "z" / "y", series="1.2.9.4", patient_id="")  # the same study
    dicom_series(tmp_path / "sub-05" / "x", series="1.2.8.5", patient_id="P5")
    dicom_series(tmp_path / "v", series="1.2.8.6", patient_id="P5")
    nifti(tmp_path / "P5_FLAIR.nii.gz")  # as dcm2niix names a converted series
    nifti(tmp_path / "P6_T2.nii.gz")
    dicom_series(tmp_path / "w", series="1.2.7.7", patient_id="P6")
    dicom_series(tmp_path / "sub-08", series="1.2.6.8", patient_id="anonymous")
    dicom_series(tmp_path / "sub-09", series="1.2.5.9", patient_id="anonymous")
    datalist = prepare_datalist(tmp_path)
    subjects = {item["name"]: item["subject"] for item in datalist["training"] + datalist["validation"]}
    assert subjects["a_series1"] == subjects["b_series2"] and subjects["a_series1"].startswith("dicom-")
    assert subjects["T1_series3"] == subjects["y_series4"] == "anon7"
    assert subjects["x_series5"] == subjects["v_series6"] == "sub-05"
    assert subjects["P5_FLAIR"] == "sub-05"
    assert subjects["P6_T2"] == subjects["w_series7"]
    assert (subjects["sub-08_series8"], subjects["sub-09_series9"]) == ("sub-08", "sub-09")


def test_no_identity_is_written_anywhere(tmp_path, caplog):
    folder, out = tmp_path / "data", tmp_path / "out"
    dicom_series(folder / "a", series="1.2.3.1")
    dicom_series(folder / "ct", series="1.2.3.7", Modality="CT")
    corrupt(folder / "b")
    with caplog.at_level(logging.DEBUG):
        datalist = prepare_datalist(folder, out, skip_unreadable=True)
    assert re.search(r"ct/ \(DICOM series 7, 9 files such as IM\d+\): not MR", caplog.text)
    written = caplog.text + json.dumps(datalist) + "".join(path.read_text() for path in out.iterdir())
    assert not any(word in written for phi in PHI for word in phi.split("^"))


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def test_loading_agrees_with_monai(tmp_path):
    from monai.transforms import LoadImage

    path = nifti(tmp_path / "a.nii.gz", voxels() / 7.0, oblique_affine())
    ours, theirs = LoadScand()({"image": str(path)})["image"], LoadImage(ensure_channel_first=True)(path)
    assert torch.equal(ours.as_tensor(), theirs.as_tensor().float()) and torch.allclose(ours.affine, theirs.affine)
    assert ours.meta["filename_or_obj"] == str(path)


def test_loading_names_the_file_that_fails(tmp_path):
    with pytest.raises(ValueError, match="gone.nii.gz: no such file"):
        LoadScand()({"image": str(tmp_path / "gone.nii.gz")})
    path = nifti(tmp_path / "a.nii.gz", voxels((*SHAPE, 3)))
    with pytest.raises(ValueError, match="a.nii.gz: its shape 12x10x9x3 .* needs the item's 'volume'"):
        LoadScand()({"image": str(path)})
