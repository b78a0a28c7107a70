"""Memory and disk: what a small file claims is not believed; a full disk names the file, the room and what is safe."""

import gzip
import os
import resource
import signal

import nibabel as nib
import numpy as np
import pytest
import torch
from odd_inputs import (
    accepted,
    datalist,
    dicom_series,
    head,
    in_child,
    infer,
    inputs,
    items_of,
    labelled,
    load,
    nifti,
    pairs,
    refused,
    run,
    stand_in,
    tiny,
    unblended,
)

from sspformer.compat import ResampleSpacingd
from sspformer.engines import save_atomically

HUGE = (1000, 1000, 2000)


def claims(path, shape=HUGE, dtype=np.int16, image_class=nib.Nifti1Image, content=b"\0" * 5000):
    """A header of a large scan, and hardly any voxels."""
    header = image_class.header_class()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.diag([0.2, 0.2, 0.2, 1]), 1)
    header["vox_offset"], header["magic"] = (544, header["magic"]) if image_class is nib.Nifti2Image else (352, b"n+1")
    path.parent.mkdir(parents=True, exist_ok=True)
    binary = header.binaryblock + b"\0" * 4 + content
    path.write_bytes(gzip.compress(binary) if path.suffix == ".gz" else binary)
    return path


CLAIMS = {
    "int16": {},
    "float64": {"dtype": np.float64},
    "4D": {"shape": (500, 500, 500, 32)},
    "NIfTI-2": {"image_class": nib.Nifti2Image, "shape": (3000, 3000, 3000)},
    "beyond all memory": {"shape": (32000, 32000, 32000)},
}


@pytest.mark.parametrize("read", ["load", "datalist", "label map"])
@pytest.mark.parametrize("case", CLAIMS)
def test_a_small_gzip_file_that_claims_a_large_scan_is_refused_before_it_is_allocated(case, read, tmp_path):
    """No gzip file unpacks to more than 1,032 times its size."""
    path = claims(tmp_path / "images" / "big.nii.gz", **CLAIMS[case])
    if read == "label map":
        nifti(tmp_path / "images" / "big.nii.gz")
        path = claims(tmp_path / "labels" / "big.nii.gz", **CLAIMS[case])
        found = in_child(pairs, tmp_path, val_fraction=0, seconds=20)
    elif read == "load":
        item = {"volume": 3} if case == "4D" else {}
        found = in_child(load, path, seconds=20, **item)
    else:
        found = in_child(datalist, tmp_path, val_fraction=0, seconds=20)
    assert not found and found.named and "big.nii.gz" in found.error, f"{found.kind}: {found.error}"
    assert found.grown < 200 << 20, f"{found.grown >> 20} MB"
    assert any(word in found.error for word in ("truncated", "corrupt", "claims")), found.error


@pytest.mark.parametrize("case", CLAIMS)
def test_the_same_without_gzip(case, tmp_path):
    path = claims(tmp_path / "big.nii", **CLAIMS[case])
    for function, arguments in ((load, [path]), (datalist, [tmp_path])):
        found = in_child(function, *arguments, seconds=20)
        assert not found and found.named and "big.nii" in found.error and found.grown < 200 << 20


def test_a_scan_that_compresses_as_well_as_gzip_can_is_read(tmp_path):
    """A large field of view of air: a thousandth of its voxels' size."""
    array = np.zeros((160, 160, 160), np.int16)
    array[80, 80, 80] = 9
    path = tmp_path / "air1.nii.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        nib.Nifti1Image(array, np.diag([1.0, 1, 1, 1])).to_stream(file)
    assert array.nbytes / path.stat().st_size > 500
    assert np.array_equal(load(path)[0].numpy(), array)
    assert len(items_of(datalist(tmp_path, val_fraction=0))) == 1


@pytest.mark.parametrize(
    "elements", [{"Rows": 65535, "Columns": 65535}, {"NumberOfFrames": 10**6}, {"BitsAllocated": 32}], ids=str
)
def test_dicom_that_claims_more_than_it_holds_is_refused(elements, tmp_path):
    dicom_series(tmp_path / "s", **elements)
    found = in_child(datalist, tmp_path, val_fraction=0, seconds=20)
    assert not found and found.named and "DICOM series" in found.error, f"{found.kind}: {found.error}"
    assert found.grown < 500 << 20


@pytest.mark.parametrize("workers", [1])
def test_the_rest_of_a_batch_is_written_beside_a_file_that_claims_too_much(workers, tmp_path):
    claims(tmp_path / "in" / "big.nii.gz")
    nifti(tmp_path / "in" / "good.nii.gz")
    found = in_child(infer, tmp_path / "in", tmp_path / "out", **stand_in(tmp_path), seconds=60, memory=3 << 30)
    assert found, found.error
    assert found.value["good"]["status"] == "written" and found.value["big"]["status"] == "failed"
    assert "DefaultCPUAllocator" not in found.value["big"]["reason"] and found.grown < 1 << 30


def test_the_scores_of_all_classes_count_as_memory(tmp_path, monkeypatch):
    """18 channels of float32 at 2 mm: 104 bytes a voxel, and not 32; 90 were measured."""
    path = nifti(tmp_path / "in" / "a.nii.gz", np.zeros((24, 22, 20), np.int16) + head().astype(np.int16))
    image = {"image": load(path)}
    monkeypatch.setattr("sspformer.geometry.free_memory", lambda: 24 * 22 * 20 * 60)
    accepted(ResampleSpacingd("image", pixdim=(2, 2, 2)), image)
    refused(ResampleSpacingd("image", pixdim=(2, 2, 2), class_names=["x"] * 17), image, says=["GB", "2 x 2 x 2 mm"])
    table = infer(tmp_path / "in", tmp_path / "out", **stand_in(tmp_path), spacing=[1.0, 1.0, 1.0])
    assert table["a"]["status"] == "failed" and "GB of memory" in table["a"]["reason"]


def on_a_full_disk(function, *args, room, **kwargs):
    """No file can grow beyond so many bytes: torch and nibabel meet it as they meet a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    return function(*args, **kwargs)


def test_a_checkpoint_on_a_full_disk_names_the_file_the_room_and_what_is_safe(tmp_path):
    path = tmp_path / "models" / "checkpoint.pt"
    save_atomically({"a": torch.zeros(10)}, path)
    before = path.read_bytes()
    state = {str(i): torch.zeros(100_000) for i in range(10)}
    found = in_child(on_a_full_disk, save_atomically, state, path, room=1 << 20)
    assert not found and found.kind != "death"
    assert str(path) in found.error and "unexpected pos" not in found.error, found.error
    assert "free" in found.error or "room" in found.error
    assert path.read_bytes() == before and not list(path.parent.glob("*.part"))
    assert "checkpoint" in found.error.replace(str(path), "")  # that of before is whole


@pytest.mark.parametrize("room, file", [(300_000, "model.pt"), (1_000_000, "checkpoint.pt")])
def test_a_training_on_a_full_disk_ends_with_that_and_goes_on_later(room, file, tmp_path):
    """`model.pt` has 0.5 MB here and is written first, `checkpoint.pt` has 1.5 MB."""
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    settings = {**tiny("train"), "epochs": 2}
    found = in_child(on_a_full_disk, run, "train", data, output, room=room, **settings, seconds=90)
    assert not found and file in found.error and "unexpected pos" not in found.error, found.error
    run("train", data, output, **settings)
    assert not list(output.rglob("*.part"))


def test_a_full_disk_fails_a_scan_of_inference_and_leaves_nothing_half(tmp_path):
    rng = np.random.default_rng(0)
    nifti(tmp_path / "in" / "a.nii.gz", rng.integers(0, 30000, (40, 40, 40)).astype(np.int16))
    options = {**stand_in(tmp_path, 1), **unblended()}
    found = in_child(
        on_a_full_disk, infer, tmp_path / "in", tmp_path / "out", "denoising.json", room=50_000, **options, seconds=60
    )
    assert found, found.error
    assert found.value["a"]["status"] == "failed" and found.value["a"]["reason"]
    assert not list((tmp_path / "out").glob("*.part")) and not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_full_disk_in_inference_names_the_file_and_the_room(tmp_path):
    rng = np.random.default_rng(0)
    nifti(tmp_path / "in" / "a.nii.gz", rng.integers(0, 30000, (40, 40, 40)).astype(np.int16))
    options = {**stand_in(tmp_path, 1), **unblended()}
    found = in_child(
        on_a_full_disk, infer, tmp_path / "in", tmp_path / "out", "denoising.json", room=50_000, **options, seconds=60
    )
    reason = found.value["a"]["reason"]
    assert "a_denoised.nii.gz" in reason and ("free" in reason or "room" in reason), reason


def test_a_cache_that_cannot_be_written_is_no_end(tmp_path):
    """The scans train without it, or an error names the folder."""
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    (tmp_path / "cache").write_text("a file where the folder should be")
    found = in_child(run, "train", data, output, cache_dir=str(tmp_path / "cache"), **tiny("train"), seconds=90)
    assert found or "cache" in found.error, f"{found.kind}: {found.error}"


def test_many_small_files_are_found_in_time(tmp_path):
    path = nifti(tmp_path / "p0.nii", np.arange(512, dtype=np.int16).reshape(8, 8, 8))
    for i in range(1, 300):
        os.link(path, tmp_path / f"p{i}.nii")
    found = in_child(inputs, tmp_path, seconds=20)
    assert found and len(found.value) == 300 and head().any()
