"""Inputs drawn at random, by family: each ends in a named error, or in what nibabel, pydicom or the generator say.

2,000 inputs, or as many as SSPFORMER_FUZZ says, always the same. A failure prints family and number;
`SSPFORMER_FUZZ_ONE=nifti:17 pytest tests/robustness/test_fuzz.py` draws that one alone."""

import contextlib
import gzip
import json
import os
import pickle
import resource
import select
import shutil
import signal
import time
import zlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from odd_inputs import (
    Outcome,
    datalist,
    dicom_slice,
    inputs,
    items_of,
    labelled,
    load,
    option_of,
    outcome,
    pairs,
    save_dicom,
    workflow,
)
from torch import nn

from sspformer.data import CachedDataset
from sspformer.engines import StrictCheckpointLoader
from sspformer.networks import SSPFormerEncoder, load_pretrained

TOTAL = int(os.environ.get("SSPFORMER_FUZZ", 2000))
SHARES = {"nifti": 0.32, "dicom": 0.16, "label": 0.16, "list": 0.18, "weights": 0.14, "options": 0.04}
SECONDS = 15  # of one input
MEMORY = 2 << 30

#: What fails today, by family: remove a line with the fault. A line that no input needs fails the test.
KNOWN: dict[str, dict[str, str]] = {}


class Fault(Exception):
    """What is wrong: a kind, and how it shows."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def judge(found: Outcome, *names: str) -> None:
    """An error must be of a kind that names the cause, with one of the names."""
    if found:
        return
    if found.kind == "MemoryError" or "MemoryError" in found.error:
        raise Fault("memory", found.error[-200:])
    if not found.named or not any(name in found.error for name in names):
        raise Fault("unnamed", f"{found.kind}: {found.error[:300]} ... {found.trace[-300:]}")
    if "cannot be read (" in found.error:
        raise Fault("vague", found.error[-200:])


def pick(rng, *choices):
    return choices[rng.integers(len(choices))]


def odd_number(rng) -> float:
    return float(
        pick(rng, 0, -1, 1, 1e-10, 1e-3, 1e3, 1e20, 1e30, -1e30, 3e38, np.nan, np.inf, -np.inf, rng.normal(0, 100))
    )


def damaged(rng, content: bytes, first=0, last=None) -> bytes:
    """With a few bits flipped, a piece cut off, or a piece overwritten."""
    last = min(last or len(content), len(content))
    out = bytearray(content)
    what = rng.integers(4)
    if what < 2:
        for at in rng.integers(first * 8, last * 8, rng.integers(1, 4)):
            out[at // 8] ^= 1 << at % 8
    elif what == 2:
        del out[int(rng.integers(first, last)) :]
    else:
        at = int(rng.integers(first, last))
        out[at : at + 8] = rng.bytes(8)
    return bytes(out)


# --- NIfTI

FIELDS = [name for name in nib.Nifti1Header.template_dtype.names if name not in ("sizeof_hdr", "magic")]
BOUNDS = {"spacing": (0.01, 20), "field of view": (2, 2500), "origin": 1e4, "axes": 0.5}


def impossible(affine, shape) -> str:
    """What of a geometry is beyond the bounds of docs/inputs.md; empty if nothing is."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = BOUNDS["spacing"]
    if not (spacing > 0.99 * low).all() or not (spacing < 1.01 * high).all():
        return f"spacing {spacing}"
    view = (spacing * shape).max()
    if not BOUNDS["field of view"][0] * 0.99 < view < BOUNDS["field of view"][1] * 1.01:
        return f"field of view {view}"
    if not np.abs(affine[:3, 3]).max() < 1.01 * BOUNDS["origin"]:
        return f"origin {affine[:3, 3]}"
    if not abs(np.linalg.det(affine[:3, :3] / spacing)) > 0.99 * BOUNDS["axes"]:
        return f"axes {affine[:3, :3]}"
    return ""


def draw_nifti(rng, folder) -> tuple[Path, bytes]:
    """A file, and what it holds, unpacked."""
    shape = tuple(int(n) for n in rng.integers(8, 13, 3)) + pick(rng, (), (), (), (1,), (2,), (1, 3))
    dtype = np.dtype(pick(rng, "i2", "i2", "u1", "f4", "f8", "u2", "i4", "i1", "c8", "f4"))
    voxels = rng.integers(0, 100, shape).astype(dtype)
    if rng.random() < 0.1:
        voxels.flat[rng.integers(voxels.size)] = pick(rng, 0, 1, np.nan, np.inf) if dtype.kind == "f" else 0
    affine = np.eye(4)
    affine[:3, :3] = np.diag(rng.uniform(0.5, 4, 3)) + (rng.random() < 0.3) * rng.normal(0, 0.3, (3, 3))
    affine[:3, 3] = rng.normal(0, 50, 3)
    image = pick(rng, nib.Nifti1Image, nib.Nifti1Image, nib.Nifti2Image)(voxels, affine)
    image.set_qform(affine, int(rng.integers(0, 5)), strip_shears=True)
    image.set_sform(affine, int(rng.integers(0, 5)))
    image.header.set_xyzt_units(pick(rng, None, "mm", "mm", "mm", "meter", "micron"))
    content = image.to_bytes()
    size = image.header.template_dtype.itemsize
    what = rng.integers(5)
    if what < 3:
        header = type(image.header)(content[:size], check=False)
        for _ in range(rng.integers(1, 3)):
            field = pick(rng, *FIELDS, "pixdim", "srow_x", "srow_y", "srow_z", "scl_slope", "dim", "xyzt_units")
            with contextlib.suppress(ValueError, OverflowError, TypeError, KeyError):
                if header[field].ndim:
                    values = header[field].copy()
                    values[rng.integers(values.size)] = odd_number(rng)
                    header[field] = values
                else:
                    header[field] = odd_number(rng)
        content = header.binaryblock + content[size:]
    elif what == 3:
        content = damaged(rng, content, 0, size + 4)
    path = folder / pick(rng, "scan.nii", "scan.nii.gz", "scan.nii.gz")
    stored = content
    if path.suffix == ".gz":
        stored = gzip.compress(content, 1)
        if rng.random() < 0.3:
            stored = damaged(rng, stored, 10)
    path.write_bytes(stored)
    return path, content


def nifti_family(rng, folder) -> None:
    (folder / "in").mkdir()
    path, content = draw_nifti(rng, folder / "in")
    listed = outcome(datalist, path, val_fraction=0)
    judge(listed, path.name)
    found = outcome(inputs, path)
    judge(found, path.name, "label map")
    if found and "cannot be read (" in found.value[0].get("reason", ""):
        raise Fault("vague", found.value[0]["reason"])
    for item in [*(items_of(listed.value) if listed else []), *(found.value if found else [])]:
        if "image" not in item:
            continue
        read = outcome(load, item["image"], **({"volume": item["volume"]} if "volume" in item else {}))
        judge(read, path.name)
        if read:
            stored = path.read_bytes()
            whole = path.suffix != ".gz" or outcome(gzip.decompress, stored).value == content
            compare_with_nibabel(read.value, content, item.get("volume"), folder, "voxels" if whole else "bits")


def compare_with_nibabel(image, content, volume, folder, kind) -> None:
    """`kind` is that of a fault of the voxels: "bits" where the file's check sum shows that they were changed."""
    plain = folder / "plain.nii"
    plain.write_bytes(content)
    reading = outcome(nib.load, plain)
    if not reading:
        raise Fault(kind, f"nibabel reads nothing: {reading.error[:200]}")
    voxels = outcome(lambda: np.asarray(reading.value.dataobj, np.float32))
    if not voxels:
        raise Fault(kind, f"nibabel reads no voxels: {voxels.error[:200]}")
    expected = voxels.value[..., volume] if volume is not None else voxels.value
    if not np.array_equal(image[0].numpy(), expected.reshape(image.shape[1:]), equal_nan=True):
        raise Fault(kind, "other voxels than nibabel's")
    affine = np.array(reading.value.affine)
    factor = {1: 1e3, 3: 1e-3}.get(int(reading.value.header["xyzt_units"]) & 7, 1)
    affine[:3] *= factor
    if not np.allclose(image.affine, affine, rtol=1e-4, atol=1e-5):
        raise Fault("units" if factor != 1 else "affine", f"{image.affine} for {affine}")
    if wrong := impossible(affine, image.shape[1:]):
        raise Fault("geometry", wrong)


# --- DICOM

PATIENT = "Zqx^Wvu"
KEYWORDS = {
    "Rows": "US",
    "Columns": "US",
    "Modality": "CS",
    "SeriesNumber": "IS",
    "NumberOfFrames": "IS",
    "PixelSpacing": "DS",
    "ImagePositionPatient": "DS",
    "ImageOrientationPatient": "DS",
    "RescaleSlope": "DS",
    "RescaleIntercept": "DS",
    "SliceThickness": "DS",
    "BitsAllocated": "US",
    "BitsStored": "US",
    "PixelRepresentation": "US",
    "SamplesPerPixel": "US",
    "PhotometricInterpretation": "CS",
    "SOPInstanceUID": "UI",
    "SeriesInstanceUID": "UI",
    "StudyInstanceUID": "UI",
    "FrameOfReferenceUID": "UI",
    "PatientID": "LO",
    "SOPClassUID": "UI",
}


def draw_value(rng, keyword, kind):
    n = {"PixelSpacing": 2, "ImagePositionPatient": 3, "ImageOrientationPatient": 6}.get(keyword, 1)
    if kind == "DS":
        values = [f"{pick(rng, 0, 1, -1, 1e-6, 1e6, 2, rng.normal()):.6g}" for _ in range(n)]
        return values if n > 1 else values[0]
    if kind in ("US", "IS"):
        return int(pick(rng, 0, 1, 2, 8, 9, 16, 32, 255, 65535))
    if kind == "UI":
        return pick(rng, "1.2.3", "1.2.3.4.5", "", "x", f"1.{rng.integers(1000)}")
    return pick(rng, "", "MR", "CT", "RGB", "MONOCHROME1", PATIENT, "P2", "P1")


def dicom_family(rng, folder) -> None:
    shape = (8, 9, 5)
    volumes = [rng.integers(0, 900, shape).astype(np.uint16) for _ in range(pick(rng, 1, 1, 2))]
    files, same_uids = [], rng.random() < 0.4
    for v, volume in enumerate(volumes):
        shared = {"PatientName": PATIENT, "RescaleSlope": 1}
        if v and rng.random() < 0.5:
            shared |= {pick(rng, "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"): "9.8.7"}
        where = folder / "in" / pick(rng, "a", f"v{v}", f"v{v}")
        for k in range(shape[2]):
            own = {"SOPInstanceUID": f"1.2.{k}"} if same_uids else {}
            ds = dicom_slice(volume, k, **shared, **own)
            files.append((ds, where / f"{v}{k}.dcm"))
    for _ in range(rng.integers(0, 3)):
        keyword = pick(rng, *KEYWORDS)
        value = draw_value(rng, keyword, KEYWORDS[keyword])
        chosen = files if rng.random() < 0.5 else [pick(rng, *files)]
        for ds, _ in chosen:
            with contextlib.suppress(Exception):
                setattr(ds, keyword, value)
    if rng.random() < 0.2:
        files.pop(rng.integers(len(files)))
    for ds, path in files:
        with contextlib.suppress(Exception):  # pydicom does not write all that may be drawn
            save_dicom(ds, path)
    written = sorted((folder / "in").rglob("*.dcm")) if (folder / "in").exists() else []
    if not written:
        return
    if rng.random() < 0.3:
        path = pick(rng, *written)
        path.write_bytes(damaged(rng, path.read_bytes(), 128))
    out = folder / "out"
    listed = outcome(datalist, folder / "in", out, val_fraction=0, min_size=4)
    if "Zqx" in listed.error or any(b"Zqx" in path.read_bytes() for path in out.rglob("*") if path.is_file()):
        raise Fault("privacy", listed.error[:200])
    judge(listed, ".dcm", "no usable scan", "no scan")
    if not listed:
        return
    used = []
    for item in items_of(listed.value):
        read = outcome(load, item["image"])
        judge(read, ".dcm", "/in/")
        if read:
            used += item["image"]
            compare_with_pydicom(read.value, item["image"])
    contents = {_identity(path) for path in used}
    for path in written:
        if str(path) not in used and _identity(path) not in contents and _identity(path) is not None:
            if path.name not in (out / "scans.csv").read_text():
                raise Fault("dropped", f"{path.name} of {len(written)}, {len(used)} are used")


def _identity(path):
    """Pixels and place of a slice; None for what is no image."""
    found = outcome(pydicom.dcmread, path)
    if not found or found.value.get("Modality") != "MR" or "PixelData" not in found.value:
        return None
    return bytes(found.value.PixelData), str(found.value.get("ImagePositionPatient")), found.value.get("PatientID")


def compare_with_pydicom(image, files) -> None:
    sets = [pydicom.dcmread(path) for path in files]
    whose = {(ds.get("PatientID"), ds.get("StudyInstanceUID"), ds.get("FrameOfReferenceUID")) for ds in sets}
    if len(whose) > 1:
        raise Fault("mixed", str(whose))
    slices = [
        ds.pixel_array.astype(np.float32) * np.float32(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
        for ds in sets
    ]
    if not np.allclose(image[0].numpy(), np.stack(slices, -1).transpose(1, 0, 2), rtol=1e-5, atol=1e-3):
        raise Fault("voxels", "other voxels than pydicom's")
    lps = np.array(image.affine)[:3, 3] * [-1, -1, 1]
    if not np.allclose(lps, [float(x) for x in sets[0].ImagePositionPatient], atol=1e-3):
        raise Fault("affine", f"{lps} for {sets[0].ImagePositionPatient}")
    if wrong := impossible(np.array(image.affine), image.shape[1:]):
        raise Fault("geometry", wrong)


# --- label maps


def label_family(rng, folder) -> None:
    shape = (9, 8, 10)
    values = rng.integers(0, 3, shape).astype(float)
    spoilt = pick(rng, None, None, 0.5, 0.3, 3, -1, 255, np.nan, 1e9)
    if spoilt is not None:
        values.flat[rng.integers(values.size)] = spoilt
    dtype = np.dtype(pick(rng, "u1", "i2", "f4", "f8", "i4"))
    scale = pick(rng, 1, 1, 1, 2, 0.5) if dtype.kind in "iu" else 1
    stored = np.nan_to_num(values / scale, nan=0) if dtype.kind in "iu" else values
    limits = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else (-np.inf, np.inf)
    stored = stored.clip(*limits).astype(dtype)
    spacing = pick(rng, 1.0, 2.0, 1e-4, 500.0)
    for name, array in (("images", rng.integers(0, 900, shape).astype(np.int16)), ("labels", stored)):
        (folder / "in" / name).mkdir(parents=True)
        image = nib.Nifti1Image(array, np.diag([spacing, 1, 1, 1]))
        path = folder / "in" / name / "p1.nii"
        nib.save(image, path)
        if name == "labels" and scale != 1:
            content = bytearray(path.read_bytes())
            content[112:120] = np.array([scale, 0], "<f4").tobytes()
            path.write_bytes(bytes(content))
    if rng.random() < 0.2:
        path.write_bytes(damaged(rng, path.read_bytes()))
    found = outcome(pairs, folder / "in", classes=3, val_fraction=0)
    judge(found, "p1.nii")
    if not found:
        return
    reading = np.asarray(nib.load(path).dataobj)
    if not np.isfinite(reading).all() or np.abs(reading - reading.round()).max() > 0.26:
        raise Fault("accepted", "labels that are no integers")
    if not set(np.unique(reading.round())) <= {0, 1, 2}:
        raise Fault("accepted", f"values {np.unique(reading)}")
    if wrong := impossible(nib.load(path).affine, shape):
        raise Fault("geometry", wrong)


# --- lists

SYNONYMS = {
    "training": ("training", "train"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


def list_family(rng, folder) -> None:
    root = folder / "in"
    (root / "images").mkdir(parents=True)
    for i in range(5):
        nib.save(
            nib.Nifti1Image(rng.integers(0, 900, (8, 8, 8)).astype(np.int16), np.eye(4)), root / f"images/s{i}.nii"
        )
    names = list(rng.permutation(5))
    content, known, unknown = {}, {}, []
    for split in ("training", pick(rng, "validation", "test", "holdout", "folds", "validation")):
        name = pick(rng, *SYNONYMS.get(split, (split,)), split.title(), split)
        taken = [f"images/s{names.pop()}.nii" for _ in range(2)]
        content[name] = [pick(rng, {"image": path}, path, {"image": [path]}) for path in taken]
        if split in SYNONYMS:
            known[split] = sorted(Path(path).stem for path in taken)
        else:
            unknown.append(name)
    spoilt = ""
    if rng.random() < 0.4:
        name = pick(rng, *(name for name in content if name not in unknown))
        spoilt = pick(rng, "text", "mapping", "number", "empty path", "twice", "missing", "bytes", "null item")
        if spoilt == "text":
            content[name] = "abc"  # no "/": that would walk the machine
        elif spoilt == "mapping":
            content[name] = {"image": "images/s0.nii"}
        elif spoilt == "number":
            content[name] = 3
        elif spoilt == "empty path":
            content[name].append({"image": pick(rng, "", ".", "images/..")})
        elif spoilt == "twice":
            content[name].append(content[next(iter(content))][0])
        elif spoilt == "missing":
            name = next(iter(content))  # the scans of "test" are not looked at here
            content[name].append("images/gone.nii")
        elif spoilt == "null item":
            content[name].append(pick(rng, None, 3, {}, [], {"image": None}))
    text = json.dumps(content).encode()
    path = root / "list.json"
    path.write_bytes(damaged(rng, text) if spoilt == "bytes" else pick(rng, b"", b"", b"\xef\xbb\xbf") + text)
    found = outcome(datalist, path, val_fraction=0)
    if spoilt in ("text", "empty path") and (found or "list.json" not in found.error or "twice" in found.error):
        raise Fault("walked", f"{spoilt}: {found.error[:200]}")
    if spoilt in ("mapping", "number") and (found or not found.named or "list" not in found.error):
        raise Fault("unnamed", f"{spoilt}: {found.kind} {found.error[:200]}")
    if spoilt == "bytes":
        judge(found, "list.json", "images", "s0", "s1", "s2", "s3", "s4", str(root))
        return
    if spoilt or unknown:
        if found:
            raise Fault("unknown list" if unknown else "accepted", f"{content}")
        judge(found, "list.json", "gone.nii")
        return
    if not found:
        raise Fault("unknown list", f"{list(content)}: {found.error[:200]}")
    for split in ("training", "validation"):
        got = sorted(item["name"] for item in found.value[split])
        if got != known.get(split, []):
            raise Fault("unknown list", f"{content}: {split} is {got}")


# --- weights, checkpoints, cache

ENCODER = {"patch_size": 8, "dim": 24, "depth": 1, "num_heads": 2}


def weights_family(rng, folder) -> None:
    torch.manual_seed(int(rng.integers(1000)))
    what = rng.integers(4)
    path = folder / "file.pt"
    network = SSPFormerEncoder(3, 1, **ENCODER) if what == 1 else nn.Linear(30, 30)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    if what == 3:
        return cache_family(rng, folder)
    content = pick(rng, state, {"network": state}, {"state_dict": state} if what == 1 else state)
    name = next(name for name, value in state.items() if value.is_floating_point())
    odd = pick(rng, None, None, None, None, "name", "value", "shape", "nan", "object", "dtype")
    if odd == "name":
        content = {**state, pick(rng, 3, ("a",), "", "x" * 3000): torch.zeros(2)}
    elif odd == "value":
        content = {**state, name: pick(rng, None, 3, "x", [1.0], {})}
    elif odd == "shape":
        content = {**state, name: torch.zeros(3)}
    elif odd == "nan":
        content = {**state, name: torch.full_like(state[name], float("nan"), dtype=torch.float32)}
    elif odd == "object":
        content = pick(rng, [], {}, 3, torch.zeros(2), "x", [state], {"network": 3})
    elif odd == "dtype":
        content = {**state, name: state[name].to(pick(rng, torch.int64, torch.bool, torch.complex64))}
    torch.save(content, path)
    harmed = odd is None and rng.random() < 0.7
    if harmed:
        path.write_bytes(damaged(rng, path.read_bytes()))
    fresh = SSPFormerEncoder(3, 1, **ENCODER) if what == 1 else nn.Linear(30, 30)
    found = outcome(load_pretrained, fresh, path) if what == 1 else outcome(StrictCheckpointLoader(fresh, path))
    judge(found, "file.pt")
    if found:
        if odd in ("value", "shape", "nan", "object", "dtype") and odd != "name":
            raise Fault("unnamed", f"{odd} is accepted")
        if not all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items()):
            raise Fault("bits", "other numbers than were written")


def cache_family(rng, folder) -> None:
    data = [{"a": torch.from_numpy(rng.normal(size=50)), "version": "x"}]
    before = CachedDataset(data, _as_it_is, folder / "cache")[0]["a"]
    (file,) = (folder / "cache").glob("*.pt")
    file.write_bytes(damaged(rng, file.read_bytes()))
    found = outcome(lambda: CachedDataset(data, _as_it_is, folder / "cache")[0]["a"])
    if not found:
        raise Fault("unnamed", f"cache: {found.kind}: {found.error[:200]}")
    if not torch.equal(torch.as_tensor(found.value), torch.as_tensor(before)):
        raise Fault("bits", "other numbers than were cached")


def _as_it_is(item):
    return item


# --- options

COUNTS = ("epochs", "batch_size", "crops_per_scan", "val_interval")
RANGES = {
    "train": {
        **{name: (1, np.inf, int) for name in COUNTS},
        "seed": (0, np.inf, int),
        "val_fraction": (0, 0.999, float),
        "strip_prob": (0, 1, float),
        "flip_prob": (0, 1, float),
        "freeze_epochs": (0, np.inf, int),
    },
    "pretrain": {**{name: (1, np.inf, int) for name in COUNTS}, "mask_ratio": (0.001, 0.999, float)},
    "inference": {"overlap": (0, 0.999, float), "sw_batch_size": (1, np.inf, int), "num_workers": (0, np.inf, int)},
}


def options_family(rng, folder) -> None:
    kind = pick(rng, *RANGES)
    name = pick(rng, *(name for name in RANGES[kind] if option_of(kind, name)))
    low, high, type_ = RANGES[kind][name]
    value = pick(rng, 1, 0.5, 2, 0, -1, 7, 1e9, float("nan"), float("inf"), "x", "", "none?", [1], {"a": 1}, 2.5, True)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    valid = number and low <= value <= high and np.isfinite(value) and (type_ is float or float(value).is_integer())
    found = outcome(workflow, kind, DATA, folder / "out", **{option_of(kind, name): value})
    if valid and not found:
        raise Fault("refused", f"--{name} {value}: {found.error[:200]}")
    if not valid and not isinstance(value, bool):
        if found:
            raise Fault("accepted", f"--{name} {value!r} of {kind}")
        if not found.named or name not in found.error:
            raise Fault("unnamed", f"--{name} {value!r} of {kind}: {found.kind}: {found.error[:100]}")


DATA: Path = Path()
FAMILIES = {
    "nifti": nifti_family,
    "dicom": dicom_family,
    "label": label_family,
    "list": list_family,
    "weights": weights_family,
    "options": options_family,
}


# --- the runner


def draw(family: str, i: int, folder: Path) -> tuple[str, str]:
    """The fault of one input, its kind and text; empty without one."""
    folder = folder / f"{family}{i}"
    folder.mkdir()
    rng = np.random.default_rng([zlib.crc32(family.encode()), i])
    try:
        FAMILIES[family](rng, folder)
    except Fault as fault:
        return fault.kind, str(fault)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return "", ""


def faults_of(family: str, numbers: range, folder: Path) -> list[tuple[int, str, str]]:
    """The faults of many inputs, drawn in a process with a limit to its memory, which is replaced when one hangs."""
    faults, start = [], numbers.start
    while start < numbers.stop:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _draw_all(family, range(start, numbers.stop), folder, write)
        os.close(write)
        deadline, rest = time.monotonic() + SECONDS, b""
        while select.select([read], [], [], max(0, deadline - time.monotonic()))[0]:
            if not (part := os.read(read, 1 << 16)):
                break
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                i, kind, text = json.loads(line)
                faults += [(i, kind, text)] if kind else []
                start = i + 1
            deadline = time.monotonic() + SECONDS
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        if start < numbers.stop:
            faults.append((start, "hang", f"no end within {SECONDS} s, or the process died"))
            start += 1
    return faults


def _draw_all(family, numbers, folder, pipe) -> None:
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        for i in numbers:
            try:
                kind, text = draw(family, i, folder)
            except MemoryError:
                kind, text = "memory", "MemoryError"
            except BaseException as error:  # a fault of the test
                kind, text = "broken test", f"{type(error).__name__}: {error}"
            os.write(pipe, json.dumps([i, kind, text[:600]]).encode() + b"\n")
    finally:
        os._exit(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_input_ends_in_a_named_error_or_in_the_right_result(family, tmp_path_factory):
    global DATA
    folder = tmp_path_factory.mktemp(f"fuzz-{family}")
    DATA = labelled(folder / "data", 2)
    numbers = range(round(TOTAL * SHARES[family]))
    if one := os.environ.get("SSPFORMER_FUZZ_ONE"):
        name, number = one.split(":")
        numbers = range(int(number), int(number) + 1) if name == family else range(0)
    faults = faults_of(family, numbers, folder)
    kinds = Counter(kind for _, kind, _ in faults)
    new = [f"{family}:{i} {text}" for i, kind, text in faults if kind not in KNOWN.get(family, {})]
    assert not new, f"{len(new)} of {len(numbers)}, such as\n" + "\n".join(new[:12])
    gone = [kind for kind in KNOWN.get(family, {}) if not kinds[kind]] if TOTAL >= 2000 and not one else []
    assert not gone, f"no input fails with {gone} any more: remove them from KNOWN"
    assert pickle.dumps(faults)
