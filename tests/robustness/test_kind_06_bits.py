"""Flipped bits: gzip and zip carry check sums, the weights that ship have a SHA-256; all of them are verified."""

import gzip
import io
import json
import pickle
import random
import shutil
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from odd_inputs import (
    BUNDLE,
    datalist,
    flip_bit,
    head,
    infer,
    items_of,
    labelled,
    load,
    nifti,
    outcome,
    refused,
    run,
    stand_in,
    tiny,
)
from torch import nn

from sspformer.data import CachedDataset
from sspformer.engines import StrictCheckpointLoader
from sspformer.networks import SSPFormerEncoder, load_pretrained, read_weights

ENCODER = {"patch_size": 8, "dim": 24, "depth": 2, "num_heads": 2}


def test_no_flipped_bit_of_a_nii_gz_changes_what_is_read(tmp_path):
    path = nifti(tmp_path / "a.nii.gz")
    whole, voxels = path.read_bytes(), load(path)[0].numpy()
    bits, accepted = random.Random(0).sample(range(8 * 10, 8 * len(whole)), 60), []
    for bit in bits:
        path.write_bytes(whole)
        flip_bit(path, bit)
        found = outcome(load, path)
        if found:
            accepted += [] if np.array_equal(found.value[0].numpy(), voxels) else [bit]
        else:
            assert found.named and "a.nii.gz" in found.error
    assert not accepted, f"{len(accepted)} of {len(bits)} flipped bits changed the voxels"


def test_the_same_under_another_name(tmp_path):
    nifti(tmp_path / "a.nii.gz")
    path = (tmp_path / "a.nii.gz").rename(tmp_path / "a.nii.GZ")
    flip_bit(path, 8 * (path.stat().st_size - 6))  # in the check sum
    refused(load, path, says="a.nii.GZ")


@pytest.mark.parametrize("damage", ["check sum", "length", "no trailer", "half a trailer"])
def test_a_damaged_end_of_a_nii_gz_fails_one_scan_of_a_batch(damage, tmp_path):
    for name in ("bad", "good"):
        nifti(tmp_path / "in" / f"{name}.nii.gz")
    path = tmp_path / "in" / "bad.nii.gz"
    whole = path.read_bytes()
    cut = {"no trailer": whole[:-8], "half a trailer": whole[:-4]}
    path.write_bytes(cut.get(damage, whole))
    if damage not in cut:
        flip_bit(path, 8 * (len(whole) - (7 if damage == "check sum" else 3)))
    table = infer(tmp_path / "in", tmp_path / "out", **stand_in(tmp_path))
    assert table["good"]["status"] == "written" and table["bad"]["status"] == "failed"
    assert "corrupt" in table["bad"]["reason"] or "damaged" in table["bad"]["reason"]


@pytest.mark.parametrize("more", [b"", b"\0" * 100, gzip.compress(b"", mtime=0)])
def test_what_tools_append_to_a_gzip_file_is_no_damage(more, tmp_path):
    """Zeros of a tape's block, an empty member."""
    path = nifti(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes() + more)
    assert np.array_equal(load(path)[0].numpy(), head().astype(np.int16))
    assert len(items_of(datalist(tmp_path, val_fraction=0))) == 1


def data_bits(content: bytes, n: int, seed=0) -> list[int]:
    """Bits in the middle of a file, where tensors are."""
    return random.Random(seed).sample(range(8 * len(content) // 4, 8 * len(content) * 3 // 4), n)


READERS = {
    "StrictCheckpointLoader": lambda path: StrictCheckpointLoader(SSPFormerEncoder(3, 1, **ENCODER), path)(),
    "load_pretrained": lambda path: load_pretrained(SSPFormerEncoder(3, 1, **ENCODER), path),
}


@pytest.mark.parametrize("reader", READERS)
def test_weights_with_a_flipped_bit_are_refused(reader, tmp_path):
    path = tmp_path / "encoder.pt"
    torch.save(SSPFormerEncoder(3, 1, **ENCODER).state_dict(), path)
    READERS[reader](path)
    whole = path.read_bytes()
    for bit in data_bits(whole, 10):
        path.write_bytes(whole)
        flip_bit(path, bit)
        refused(READERS[reader], path, says=["encoder.pt", ("damaged", "corrupt", "check sum")])


@pytest.mark.parametrize("weights", ["model.pt", "pretrained/encoder.pt", "denoising/model.pt"])
def test_other_weights_under_the_name_of_those_that_ship_are_loaded_and_the_log_says_so(weights, tmp_path, caplog):
    """Written anew with other numbers, so that the zip's own check sums are right. MONAI Label may have done that."""
    shutil.copytree(BUNDLE / "models", tmp_path / "models")
    path = tmp_path / "models" / weights
    state = read_weights(path, "")
    assert "SHA-256" not in caplog.text
    name = next(name for name, value in state.items() if value.is_floating_point())
    torch.save({**state, name: state[name] * 1.01}, path)
    read_weights(path, "")
    assert str(path) in caplog.text and "SHA-256" in caplog.text
    caplog.clear()
    read_weights(path.rename(tmp_path / "models" / "mine.pt"), "")
    assert not caplog.text


@pytest.mark.parametrize("place", ["start", "header", "data", "check sums", "directory", "end"])
def test_a_bit_flipped_anywhere_changes_no_number_that_is_read(place, tmp_path):
    path, network = tmp_path / "a.pt", nn.Linear(30, 30)
    torch.save(network.state_dict(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory, tensor = archive.start_dir, next(i for i in archive.infolist() if i.filename.endswith("data/0"))
    first, last = {
        "start": (0, 40),
        "header": (tensor.header_offset, tensor.header_offset + 60),
        "data": (tensor.header_offset + 128, tensor.header_offset + 3000),
        "check sums": (directory + 16, directory + 20),
        "directory": (directory, len(whole) - 22),
        "end": (len(whole) - 22, len(whole)),
    }[place]
    accepted = 0
    for bit in random.Random(place).sample(range(8 * first, 8 * last), 25):
        path.write_bytes(whole)
        flip_bit(path, bit)
        found = outcome(read_weights, path, "copy it again")
        if found:
            accepted += 1
            assert all(torch.equal(value, network.state_dict()[name]) for name, value in found.value.items()), bit
        else:
            assert found.named and "a.pt" in found.error and "copy it again" in found.error
    assert not accepted or place not in ("data", "check sums")


NO_WEIGHTS = {
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "half": (lambda path: path.write_bytes(zipped(nn.Linear(2, 2).state_dict())[:700]), "damaged"),
    "the end": (lambda path: path.write_bytes(zipped(nn.Linear(2, 2).state_dict())[700:]), "damaged"),
    "zeros": (lambda path: path.write_bytes(bytes(2000)), "damaged"),
    "a zip of other files": (lambda path: zipfile.ZipFile(path, "w").writestr("configs/a.json", "{}"), "unpacked"),
    "TorchScript": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), "torch.jit.load"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>no</html>"), "web page"),
    "a Git LFS pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a folder": (lambda path: path.mkdir(), "no weights at"),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_what_is_no_file_of_torch_is_named_as_what_it_is(case, tmp_path):
    write, says = NO_WEIGHTS[case]
    write(tmp_path / "a.pt")
    for reader in READERS.values():
        refused(reader, tmp_path / "a.pt", says=["a.pt", says])


@pytest.mark.parametrize("name", ["a.safetensors", "a.onnx", "a.h5", "a.npz", "a.engine"])
def test_weights_of_another_format_are_named_by_their_ending(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x10" + bytes(1000))
    says = {"a.safetensors": "load_file", "a.onnx": "ONNX", "a.h5": "Keras", "a.npz": "numpy", "a.engine": "TensorRT"}
    refused(READERS["load_pretrained"], tmp_path / name, says=[name, says[name]])


def test_a_damaged_checkpoint_names_itself_and_the_way_out(tmp_path):
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    settings = {**tiny("train"), "epochs": 1}
    run("train", data, output, **settings)
    path = output / "models" / "checkpoint.pt"
    whole = path.read_bytes()
    damages = {"a bit": None, "half": whole[: len(whole) // 2], "nothing": b"", "another file": b"PK no checkpoint"}
    for damage, content in damages.items():
        path.write_bytes(whole if content is None else content)
        if content is None:
            flip_bit(path, data_bits(whole, 1)[0])
        says = ["checkpoint.pt", "--resume false", ("damaged", "corrupt")]
        assert refused(run, "train", data, output, **settings, says=says), damage


def voxels_of(item):
    return {"image": load(item["image"]).as_tensor()}


def cached(folder):
    return CachedDataset([{"image": str(folder / "a1.nii.gz")}], voxels_of, folder / "cache")


def zipped(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


DAMAGED_CACHES = {
    "empty": b"",
    "no zip": b"x" * 1000,
    "a pickle": pickle.dumps({"image": 1}),
    "another object": zipped([1, 2]),
    "of another item": zipped({"image": torch.zeros(1, 2, 2, 2)}),
    "a pickle that ends early": b"\x80\x02}q\x00",
    "a text": b"cos\nsystem\n(S'true'\ntR.",
    "a number": zipped(3),
    "a key is missing": zipped({"label": torch.zeros(1)}),
}


@pytest.mark.parametrize("damage", DAMAGED_CACHES)
def test_a_damaged_cache_file_is_made_anew_whatever_the_error(damage, tmp_path):
    nifti(tmp_path / "a1.nii.gz")
    expected = cached(tmp_path)[0]["image"]
    (file,) = (tmp_path / "cache").glob("*.pt")
    file.write_bytes(DAMAGED_CACHES[damage])
    found = outcome(lambda: cached(tmp_path)[0]["image"])
    assert found, f"{found.kind}: {found.error}"
    assert torch.equal(torch.as_tensor(found.value), torch.as_tensor(expected))


def test_a_flipped_bit_of_a_cache_file_makes_it_anew(tmp_path):
    nifti(tmp_path / "a1.nii.gz")
    expected = torch.as_tensor(cached(tmp_path)[0]["image"])
    (file,) = (tmp_path / "cache").glob("*.pt")
    whole = file.read_bytes()
    for bit in [*data_bits(whole, 10), *random.Random(1).sample(range(8 * len(whole)), 20)]:
        file.write_bytes(whole)
        flip_bit(file, bit)
        found = outcome(lambda: torch.as_tensor(cached(tmp_path)[0]["image"]))
        assert found, f"{found.kind}: {found.error}"
        assert torch.equal(found.value, expected), bit


def test_a_damaged_scan_check_is_ignored(tmp_path):
    nifti(tmp_path / "in" / "a1.nii.gz")
    first = datalist(tmp_path / "in", tmp_path / "out", val_fraction=0)
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 3}'):
        (tmp_path / "out" / "scan_check.json").write_bytes(content)
        assert datalist(tmp_path / "in", tmp_path / "out", val_fraction=0) == first


def test_a_scan_check_whose_entries_are_broken_is_ignored(tmp_path):
    nifti(tmp_path / "in" / "a1.nii.gz", np.stack([head().astype(np.int16)] * 5, -1))
    first = datalist(tmp_path / "in", tmp_path / "out", val_fraction=0)
    path = tmp_path / "out" / "scan_check.json"
    entries = json.loads(path.read_text())
    for broken in ({}, {"shape": "x"}, {"volumes": [77]}, {"volumes": "abc"}):
        path.write_text(json.dumps(dict.fromkeys(entries, broken)))
        found = outcome(datalist, tmp_path / "in", tmp_path / "out", val_fraction=0)
        assert found and found.value == first, found.error


def test_bits_of_a_network_file_that_is_whole_are_loaded(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    StrictCheckpointLoader(nn.Linear(2, 2), tmp_path / "a.pt")()
    torch.save({"network": nn.Linear(2, 2).state_dict()}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    StrictCheckpointLoader(nn.Linear(2, 2), tmp_path / "a.pt")()  # the format of before has no check sum


def test_nibabel_reads_what_was_written(tmp_path):
    """The reader's own reading is what nibabel reads, of each type."""
    for dtype in (np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64):
        path = nifti(tmp_path / "a.nii.gz", head().astype(dtype) if dtype != np.uint8 else (head() / 8).astype(dtype))
        assert np.array_equal(load(path)[0].numpy(), np.asarray(nib.load(path).dataobj, np.float32))
