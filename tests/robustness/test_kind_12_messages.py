"""Messages that say what a file is and what to do with it."""

import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from odd_inputs import datalist, dicom_series, head, infer, inputs, nifti, outcome, pairs, refused, stand_in
from torch import nn

from sspformer.engines import StrictCheckpointLoader
from sspformer.networks import SSPFormerEncoder, load_pretrained

ENCODER = {"patch_size": 8, "dim": 24, "depth": 2, "num_heads": 2}


def write_mgz(path):
    nib.save(nib.MGHImage(head(), np.diag([2.0, 2, 2, 1])), path)


def write_nrrd(path):
    header = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: raw\nendian: little\n\n"
    path.write_bytes(header + bytes(128))


def write_mha(path):
    path.write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
        + bytes(128)
    )


def write_dicom_gz(path):
    (first,) = dicom_series(path.parent / "tmp", only=[0])
    path.write_bytes(gzip.compress(first.read_bytes()))
    shutil.rmtree(path.parent / "tmp")


def write_minc(path):
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))


def write_npy(path):
    with open(path, "wb") as file:  # np.save would add its suffix
        np.save(file, head())


def write_zip(path):
    path.write_bytes(b"PK\x03\x04" + bytes(600))


def write_parrec(path):
    path.write_text("# === DATA DESCRIPTION FILE ===\n")


FORMATS = {
    "a.mgz": (write_mgz, "mri_convert"),
    "a.mgh": (write_mgz, "mri_convert"),
    "a.nrrd": (write_nrrd, "SimpleITK"),
    "a.nhdr": (write_nrrd, "SimpleITK"),
    "a.mha": (write_mha, "SimpleITK"),
    "a.mhd": (write_mha, "SimpleITK"),
    "a.dcm.gz": (write_dicom_gz, ("gunzip", "gzip")),
    "a.mnc": (write_minc, ("mnc2nii", "nibabel", "SimpleITK")),
    "a.npy": (write_npy, ("nibabel", "NIfTI")),
    "a.npz": (write_npy, ("nibabel", "NIfTI")),
    "a.zip": (write_zip, ("unzip", "unpack")),
    "a.PAR": (write_parrec, ("dcm2niix", "parrec2nii")),
    "a.BRIK": (write_npy, ("3dAFNItoNIFTI", "AFNI")),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
def test_an_image_of_another_format_says_what_to_do(name, as_folder, tmp_path):
    write, says = FORMATS[name]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / name)
    where = tmp_path / "in" if as_folder else tmp_path / "in" / name
    for function in (datalist, inputs):
        found = outcome(function, where)
        text = found.error or " ".join(item.get("reason", "") for item in found.value)
        assert found.kind != "" or all("reason" in item for item in found.value)
        assert name.split(".", 1)[1].lower() in text.lower(), text
        assert any(word.lower() in text.lower() for word in ((says,) if isinstance(says, str) else says)), text


@pytest.mark.parametrize("name", ["a.mgz", "a.nrrd", "a.mha", "a.dcm.gz"])
def test_an_image_of_another_format_beside_scans_is_listed(name, tmp_path, caplog):
    nifti(tmp_path / "in" / "p1.nii.gz")
    FORMATS[name][0](tmp_path / "in" / name)
    with caplog.at_level("INFO"):
        datalist(tmp_path / "in", tmp_path / "out", val_fraction=0, skip_unreadable=True)
    assert name in caplog.text or name in (tmp_path / "out" / "scans.csv").read_text()


CONTENTS = {
    "gzip inside .nii": ("a.nii", lambda whole: gzip.compress(whole), ["gzip", (".nii.gz", "gunzip")]),
    "gzip twice": ("a.nii.gz", lambda whole: gzip.compress(gzip.compress(whole)), ["gzip", ("twice", "gunzip")]),
    "MGH inside .nii.gz": ("a.nii.gz", None, ["mri_convert"]),
    "DICOM inside .nii": ("a.nii", None, ["DICOM", (".dcm", "rename")]),
    "HTML inside .nii.gz": (
        "a.nii.gz",
        lambda whole: b"<!DOCTYPE html><html>" + bytes(500),
        [("HTML", "web page")],
    ),
    "a Git LFS pointer": (
        "a.nii.gz",
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        [("git lfs", "LFS")],
    ),
    "an annex pointer": ("a.nii.gz", lambda whole: b"/annex/objects/MD5E-s1--aa.nii.gz\n", [("annex", "datalad")]),
    "zstandard": ("a.nii.gz", lambda whole: b"\x28\xb5\x2f\xfd" + bytes(500), [("zst", "zstandard")]),
    "bzip2": ("a.nii.gz", lambda whole: b"BZh91AY" + bytes(500), ["bzip2"]),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_is_something_else_than_its_name_says_is_named_as_that(case, tmp_path):
    name, make, says = CONTENTS[case]
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if case.startswith("MGH"):
        write_mgz(tmp_path / "in" / "x.mgz")
        (tmp_path / "in" / "x.mgz").rename(path)
    elif case.startswith("DICOM"):
        dicom_series(tmp_path / "in" / "s", only=[0])[0].rename(path)
    else:
        nib.save(nib.Nifti1Image(head(), np.diag([2.0, 2, 2, 1])), tmp_path / "whole.nii")
        path.write_bytes(make((tmp_path / "whole.nii").read_bytes()))
    refused(datalist, tmp_path / "in", says=[name, *says])
    (item,) = inputs(tmp_path / "in")
    assert "reason" in item and "Error)" not in item["reason"], item


def test_a_nan_origin_is_called_an_origin(tmp_path):
    nifti(tmp_path / "p1.nii.gz", sform_code=1, srow_x=[2, 0, 0, np.nan])
    text = refused(datalist, tmp_path, says=["p1.nii.gz", "origin"])
    assert "spacing" not in text


@pytest.mark.parametrize(
    "header",
    [
        {"dim": [3, 24, 22, -20, 1, 1, 1, 1]},
        {"dim": [0, 0, 0, 0, 0, 0, 0, 0]},
        {"dim": [9, 24, 22, 20, 1, 1, 1, 1]},
        {"datatype": 9999},
        {"datatype": 0},
        {"vox_offset": -5},
        {"vox_offset": 1e9},
        {"vox_offset": np.nan},
        {"magic": b"xyz"},
        {"bitpix": 3},
        {"sizeof_hdr": 0},
        {"sizeof_hdr": 349},
        {"sform_code": 99},
        {"qform_code": -3},
        {"quatern_b": 5, "sform_code": 0, "qform_code": 1},
        {"quatern_b": np.nan, "sform_code": 0, "qform_code": 1},
    ],
    ids=str,
)
def test_a_broken_header_is_read_as_nibabel_does_or_refused_with_a_cause(header, tmp_path, request):
    path = nifti(tmp_path / "p1.nii", **header)
    found, item = outcome(datalist, tmp_path, val_fraction=0), inputs(tmp_path)[0]
    if not found:
        assert found.named and "p1.nii" in found.error
    else:
        assert np.array_equal(np.asarray(nib.load(path).dataobj), head().astype(np.int16))
        assert "reason" not in item


@pytest.mark.parametrize("header", [{"vox_offset": -5}, {"dim": [3, 24, 22, -20, 1, 1, 1, 1]}], ids=str)
def test_a_broken_header_says_which_field(header, tmp_path):
    nifti(tmp_path / "p1.nii", **header)
    text = refused(datalist, tmp_path, says=["p1.nii", (*header, "header", "shape", "size")])
    assert "Error)" not in text


VALUES = {
    "RescaleSlope": b"one ",
    "RescaleIntercept": b"1e ",
    "ImagePositionPatient": b"1\\2 ",
    "ImageOrientationPatient": b"1\\0\\0\\0\\1\\x ",
    "PixelSpacing": b"2 ",
    "Rows": b"\1",
    "Columns": b"\1\2\3",
    "SamplesPerPixel": b"\1",
}


@pytest.mark.parametrize("keyword", VALUES)
def test_a_value_of_a_dicom_header_that_is_no_number_is_named_and_not_quoted(keyword, tmp_path):
    """Also where pydicom does not read its bytes."""
    files = dicom_series(tmp_path / "s", only=range(8), PatientName="Zqx^Wvu")
    for path in files:
        ds = pydicom.dcmread(path)
        tag, kind = pydicom.datadict.tag_for_keyword(keyword), pydicom.datadict.dictionary_VR(keyword)
        value = VALUES[keyword] + b"\0" * (len(VALUES[keyword]) % 2 and kind == "DS")
        ds._dict[pydicom.tag.Tag(tag)] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(tag), kind, len(value), value, 0, False, True
        )
        ds.save_as(path)
    text = refused(datalist, tmp_path / "s", says=keyword)
    assert "Error)" not in text and "Exception)" not in text and "Zqx" not in text


# --- lists


def test_moved_data_of_a_datalist_say_where_it_looked_and_what_to_do(tmp_path):
    """The list was taken elsewhere without its scans: one cause, said once."""
    names = [f"images/p{i}.nii.gz" for i in range(5)]
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": name} for name in names]}))
    text = refused(datalist, tmp_path / "list.json", says=["list.json", ("relative", "folder of the list", "moved")])
    assert text.count("no such file") <= 1


def test_absolute_paths_that_are_gone_say_so(tmp_path):
    lists = {"training": [{"image": f"/data/elsewhere/p{i}.nii.gz"} for i in range(5)]}
    (tmp_path / "list.json").write_text(json.dumps(lists))
    refused(datalist, tmp_path / "list.json", says=["list.json", "/data/elsewhere", ("moved", "another machine")])


def test_a_folder_that_is_not_there_names_the_one_that_may_be_meant(tmp_path):
    (tmp_path / "scans").mkdir()
    refused(datalist, tmp_path / "scams", says=["scams", "scans"])


def test_pairs_that_do_not_fit_name_both_and_the_difference(tmp_path):
    nifti(tmp_path / "images" / "p1.nii.gz")
    nifti(tmp_path / "labels" / "p1.nii.gz", np.ones((24, 22, 21), np.uint8))
    refused(pairs, tmp_path, says=["p1.nii.gz", "24x22x21", "24x22x20"])


# --- weights


def weights_of_swin(path):
    """Names and shapes as MONAI's SwinUNETR has them."""
    from monai.networks.nets import SwinUNETR

    torch.save(SwinUNETR(1, 2, feature_size=12).state_dict(), path)


@pytest.mark.parametrize("kind", ["SwinUNETR", "UNet", "nnU-Net"])
def test_weights_of_another_network_say_whose_they_are(kind, tmp_path):
    path = tmp_path / "other.pt"
    if kind == "SwinUNETR":
        weights_of_swin(path)
    elif kind == "UNet":
        from monai.networks.nets import UNet

        torch.save(UNet(3, 1, 2, (4, 8), (2,)).state_dict(), path)
    else:
        torch.save(
            {"network_weights": {"encoder.stages.0.0.convs.0.conv.weight": torch.zeros(2)}, "init_args": {}}, path
        )
    nifti(tmp_path / "in" / "a.nii.gz")
    from odd_inputs import run

    options = {"weights": str(path), "roi_size": [24, 24, 24]}
    text = refused(run, "inference", tmp_path / "in", tmp_path / "out", **options, says=["other.pt", kind])
    assert "overlay" not in text  # none of ours would help


ODD_WEIGHTS = {
    "no tensors": {},
    "a tensor alone": torch.zeros(3),
    "a list": [torch.zeros(3)],
    "numbers as names": {0: torch.zeros(3), 1: torch.zeros(2)},
    "tuples as names": {("a", "b"): torch.zeros(3)},
    "nested": {"network": {"encoder": {"weight": torch.zeros(3)}}},
    "values that are no tensors": {"weight": 3, "bias": "x"},
    "some values that are no tensors": {"weight": torch.zeros(2, 2), "bias": None},
    "integers": {"weight": torch.zeros(2, 2, dtype=torch.int64), "bias": torch.zeros(2, dtype=torch.int64)},
    "complex": {"weight": torch.zeros(2, 2, dtype=torch.complex64), "bias": torch.zeros(2)},
    "booleans": {"weight": torch.zeros(2, 2, dtype=torch.bool), "bias": torch.zeros(2)},
    "sparse": {"weight": torch.eye(2).to_sparse(), "bias": torch.zeros(2)},
    "meta": {"weight": torch.zeros(2, 2, device="meta"), "bias": torch.zeros(2)},
    "quantized": {"weight": torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8), "bias": torch.zeros(2)},
    "strange names": {"": torch.zeros(2), ".": torch.zeros(2), "a" * 5000: torch.zeros(2)},
    "a network of that name": {"network": torch.zeros(2)},
    "an empty network": {"network": {}},
}


@pytest.mark.parametrize("reader", ["StrictCheckpointLoader", "load_pretrained"])
@pytest.mark.parametrize("case", ODD_WEIGHTS)
def test_odd_weight_files_are_refused_by_name(case, reader, tmp_path):
    path = tmp_path / "odd.pt"
    torch.save(ODD_WEIGHTS[case], path)
    if reader == "load_pretrained":
        text = refused(load_pretrained, SSPFormerEncoder(3, 1, **ENCODER), path, says="odd.pt")
    else:
        text = refused(StrictCheckpointLoader(nn.Linear(2, 2), path), says="odd.pt")
    assert len(text) < 1000


def test_weights_of_half_precision_and_of_wrappers_are_no_odd_ones(tmp_path):
    state = SSPFormerEncoder(3, 1, **ENCODER).half().state_dict()
    torch.save({"state_dict": {f"module.backbone.{name}": value for name, value in state.items()}}, tmp_path / "a.pt")
    load_pretrained(SSPFormerEncoder(3, 1, **ENCODER), tmp_path / "a.pt")


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Bad()}, tmp_path / "bad.pt")
    refused(load_pretrained, SSPFormerEncoder(3, 1, **ENCODER), tmp_path / "bad.pt", says="bad.pt")
    refused(StrictCheckpointLoader(nn.Linear(2, 2), tmp_path / "bad.pt"), says="bad.pt")
    assert not (tmp_path / "ran").exists()


def test_a_batch_names_the_cause_of_each_scan(tmp_path):
    nifti(tmp_path / "in" / "good.nii.gz")
    (tmp_path / "in" / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "in" / "text.nii").write_text("hello")
    nifti(tmp_path / "in" / "flat.nii.gz", head()[:, :, :1])
    table = infer(tmp_path / "in", tmp_path / "out", **stand_in(tmp_path))
    reasons = {name: row["reason"] for name, row in table.items()}
    assert reasons["good"] == "" and "empty file" in reasons["empty"] and "2D" in reasons["flat"]
    assert "not a NIfTI" in reasons["text"]
