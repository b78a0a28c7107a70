"""What the tests of this folder share: inputs made on the spot, the entry points, and how an outcome is judged.

The entry points are called through here, so that a change of their form is met in one place."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import gzip
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from test_data import set_pixels
from torch import nn

from sspformer.data import DatasetOptions, find_inputs, prepare_datalist, prepare_pairs
from sspformer.io import LoadScand

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundle"
CONFIGS = BUNDLE / "configs"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT / "custom"),
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


# --- outcomes


@dataclasses.dataclass
class Outcome:
    """What a call came to: its value, or the error that a user is shown."""

    value: Any = None
    error: str = ""
    kind: str = ""  # the error's type, "hang" or "memory"
    named: bool = False  # the error is of a kind that names what is wrong
    trace: str = ""
    grown: int = 0  # bytes of memory, of a child

    def __bool__(self) -> bool:
        return not self.kind


def cause_of(error: BaseException) -> BaseException:
    """The error below what MONAI wraps around it."""
    wrappers = ("Failed to evaluate", "Failed to instantiate component", "applying transform", "'query key")
    while error.__cause__ is not None and str(error).startswith(wrappers):
        error = error.__cause__
    return error


def outcome(function, *args, **kwargs) -> Outcome:
    try:
        return Outcome(value=function(*args, **kwargs))
    except (Exception, SystemExit) as raised:
        error = cause_of(raised)
        named = isinstance(error, (ValueError, FileNotFoundError, SystemExit)) and not isinstance(error, UnicodeError)
        return Outcome(error=str(error), kind=type(error).__name__, named=named, trace=traceback.format_exc())


def refused(function, *args, says=(), **kwargs) -> str:
    """The message of a named error with all these words; of a tuple of words one is enough. Upper case is the same."""
    found = outcome(function, *args, **kwargs)
    assert found.kind, f"accepted: {str(found.value)[:300]}"
    assert found.named, f"unnamed error {found.kind}: {found.error}\n{found.trace[-1500:]}"
    assert_says(found.error, says)
    return found.error


def accepted(function, *args, **kwargs):
    """The value; an error is a failure of the test."""
    found = outcome(function, *args, **kwargs)
    assert found, f"{found.kind}: {found.error}\n{found.trace[-1500:]}"
    return found.value


def assert_says(text: str, words) -> None:
    for word in [words] if isinstance(words, str) else words:
        any_of = (word,) if isinstance(word, str) else word
        assert any(one.lower() in text.lower() for one in any_of), f"says nothing of {any_of}: {text}"


def in_child(function, *args, seconds: float = 20, memory: int = 2 << 30, user: int | None = None, **kwargs) -> Outcome:
    """The outcome in a process of its own, which is killed when it hangs and has so much more memory, in bytes."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            before = _peak()
            if user is not None:
                os.setgid(user)
                os.setuid(user)
            found = outcome(function, *args, **kwargs)
            found.grown = _peak() - before
            if found.kind == "MemoryError" or "can't allocate memory" in found.error:
                found.kind, found.named = "memory", False
            try:
                packed = pickle.dumps(found)
            except Exception:
                found.value = repr(found.value)
                packed = pickle.dumps(found)
            with os.fdopen(write, "wb") as pipe:
                pipe.write(packed)
        finally:
            os._exit(0)
    os.close(write)
    packed, deadline = b"", time.monotonic() + seconds
    with os.fdopen(read, "rb") as pipe:
        while select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
            if not (part := os.read(pipe.fileno(), 1 << 20)):
                break
            packed += part
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Outcome(kind="hang", error=f"still running after {seconds} s")
    os.waitpid(pid, 0)
    return pickle.loads(packed) if packed else Outcome(kind="death", error="the process ended without a word")


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0


# --- inputs


def head(shape=(24, 22, 20), seed=0, peak=1000.0, noise=20.0) -> np.ndarray:
    """A magnitude image: a bright ball off the centre of a dim one, in air, with noise; float32, not below 0."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), -1)
    image = 0.6 * ((grid**2).sum(-1) < 0.7) + 0.4 * (((grid - [0.2, -0.1, 0.15]) ** 2).sum(-1) < 0.15)
    noisy = peak * image + np.random.default_rng(seed).normal(0, noise, shape)
    return np.abs(noisy).astype(np.float32)


def nifti(path, array=None, affine=None, units=None, image_class=nib.Nifti1Image, **header) -> Path:
    """Writes a NIfTI; `header` sets fields of the file's header afterwards, unchecked."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = head().astype(np.int16) if array is None else array
    image = image_class(array, np.diag([2.0, 2, 2, 1]) if affine is None else affine)
    if units:
        image.header.set_xyzt_units(units)
    nib.save(image, path)
    if header:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            content = file.read()
        kind = nib.Nifti2Header if image_class is nib.Nifti2Image else nib.Nifti1Header
        size = kind.template_dtype.itemsize
        edited = kind(content[:size], check=False)
        for key, value in header.items():
            edited[key] = value
        with opener(path, "wb") as file:
            file.write(edited.binaryblock + content[size:])
    return path


def dicom_slice(array, k, patient="P1", series="1.2.3.4", spacing=(2.0, 2.0, 3.0), **elements) -> Dataset:
    """Slice k of a volume (X, Y, Z) as an MR dataset; an element of None is left out."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
    ds.SOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = series + ".1", series, series + ".2"
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "MR", 3, k + 1
    ds.PatientID = ds.PatientName = patient
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-20, -20, k * spacing[2]]
    ds.PixelSpacing, ds.SliceThickness = list(spacing[1::-1]), spacing[2]
    set_pixels(ds, array[:, :, k], signed=False, elements=elements)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID") or generate_uid()
    return ds


def save_dicom(ds, path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if int(pydicom.__version__[0]) > 2:
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
    else:
        ds.save_as(path, write_like_original=False)
    return path


def dicom_series(folder, array=None, only=None, elements_of=None, **elements) -> list[Path]:
    """A series in a folder, `001.dcm` and so on; `elements_of(k)` gives a slice elements of its own."""
    array = head().astype(np.uint16) if array is None else array
    slices = range(array.shape[2]) if only is None else only
    return [
        save_dicom(
            dicom_slice(array, k, **{**elements, **(elements_of(k) if elements_of else {})}),
            Path(folder) / f"{k + 1:03}.dcm",
        )
        for k in slices
    ]


# --- entry points


def datalist(dataset_dir, output_dir=None, **options) -> dict[str, list[dict]]:
    return prepare_datalist(DatasetOptions(dataset_dir, output_dir, **options))


def pairs(dataset_dir, output_dir=None, **options) -> dict[str, list[dict]]:
    return prepare_pairs(DatasetOptions(dataset_dir, output_dir, **options))


def items_of(lists) -> list[dict]:
    return [item for items in lists.values() for item in items]


def load(image, **item):
    return LoadScand("image")({"image": str(image) if isinstance(image, Path) else image, **item})["image"]


def rows(output_dir, name="scans.csv") -> list[dict[str, str]]:
    with open(Path(output_dir) / name, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def overlays_of(*names) -> list[str]:
    """The files of a command: an overlay of restoration comes after restoration.json, where there is one."""
    chain = []
    for name in names:
        if name in ("denoising.json", "super_resolution.json") and (CONFIGS / "restoration.json").exists():
            chain.append("restoration.json")
        chain.append(name)
    return [str(CONFIGS / name) for name in chain]


def stand_in(folder, classes=2, factor=1.0, bias=0.0) -> dict:
    """Options of a 1x1x1 convolution in place of the network: a threshold at 0.5 for 2 classes, a gain for 1."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    network = nn.Conv3d(1, classes, 1)
    weight, offset = ([0.0, 2.0], [0.0, -1.0]) if classes == 2 else ([factor], [bias])
    network.load_state_dict({"weight": torch.tensor(weight).reshape(-1, 1, 1, 1, 1), "bias": torch.tensor(offset)})
    torch.save(network.state_dict(), folder / f"stand_in_{classes}.pt")
    options = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": classes, "kernel_size": 1}
    names = {"class_names": ["bright"]} if classes == 2 else {}
    return {"network_def": options, "weights": str(folder / f"stand_in_{classes}.pt"), **names}


def unblended() -> dict:
    """Denoising gives what the network gives, also of a scan with little noise."""
    name = "blend_by_noise" if "blend_by_noise" in (CONFIGS / "denoising.json").read_text() else "leave_quiet"
    return {name: []}


def workflow(kind, dataset_dir, output_dir, *overlays, initialize=True, **overrides) -> ConfigWorkflow:
    """A workflow of the bundle in this process, initialised: "pretrain", "train", "evaluate" or "inference"."""
    settings = {
        "bundle_root": str(BUNDLE),
        "dataset_dir": dataset_dir if isinstance(dataset_dir, int) else str(dataset_dir),
        "output_dir": output_dir if isinstance(output_dir, int) else str(output_dir),
        "device": "cpu",
        "amp": False,
        "num_workers": 0,
    }
    names, run_id = {
        "pretrain": (["pretrain.json", *overlays], "training"),
        "train": (["train.json", *overlays], "training"),
        "evaluate": (["evaluate.json", *overlays], "evaluating"),
        "inference": (["inference.json", *overlays], "inference"),
    }[kind]
    if kind == "evaluate" and _evaluate_is_an_overlay():
        names = ["train.json", *overlays, "evaluate.json"]
    made = ConfigWorkflow(
        config_file=overlays_of(*names),
        run_id=run_id,
        workflow_type="inference" if kind == "inference" else "training",
        logging_file=False,
        **{**settings, **overrides},
    )
    if initialize:
        made.initialize()
    return made


def _evaluate_is_an_overlay() -> bool:
    return "imports" not in json.loads((CONFIGS / "evaluate.json").read_text())


def run(kind, dataset_dir, output_dir, *overlays, **overrides) -> ConfigParser:
    """A whole workflow; returns its parser."""
    made = workflow(kind, dataset_dir, output_dir, *overlays, **overrides)
    made.run()
    made.finalize()
    return made.parser


def option_of(kind: str, name: str) -> str:
    """How an option is called on the command line: some stand in a part of the config. Empty where there is none."""
    names = ["train.json", "evaluate.json"] if kind == "evaluate" and _evaluate_is_an_overlay() else [f"{kind}.json"]
    config: dict = {}
    for file in names:
        config |= json.loads((CONFIGS / file).read_text())
    parts = ("", "data_options#", "inferer#", "optimizer#", "lr_scheduler#")
    for part in parts:
        holder = config.get(part[:-1], {}) if part else config
        if name in holder or part + name in config:
            return part + name
    return ""


def infer(dataset_dir, output_dir, *overlays, **overrides) -> dict[str, dict[str, str]]:
    """Inference in this process: the rows of `inference.csv` by name, also where scans failed."""
    small = {"roi_size": [24, 24, 24]}
    found = outcome(run, "inference", dataset_dir, output_dir, *overlays, **{**small, **overrides})
    assert found or "scans failed" in found.error, f"the batch ended with {found.kind}: {found.error}\n{found.trace}"
    return {row["name"]: row for row in rows(output_dir, "inference.csv")}


def tiny(kind) -> dict:
    """Settings with which training of a kind takes seconds."""
    prefix = "encoder" if "encoder" in json.loads((CONFIGS / f"{kind}.json").read_text()) else "network_def"
    encoder = {f"{prefix}#dim": 48, f"{prefix}#depth": 2, f"{prefix}#num_heads": 2}
    common = {"epochs": 1, "batch_size": 2, "crops_per_scan": 1, "val_fraction": 0.34, "val_interval": 1, **encoder}
    if kind == "pretrain":
        crop = "crop_size" if "crop_size" in json.loads((CONFIGS / "pretrain.json").read_text()) else "image_size"
        return {**common, crop: [24, 24, 24]}
    return {
        **common,
        "pretrained": None,
        "roi_size": [24, 24, 24],
        "spacing": [2.0, 2.0, 2.0],
        "class_names": ["ball"],
        "network_def#out_channels": 2,
        "network_def#features": 4,
    }


def labelled(folder, n=3, seed=0, shape=(24, 24, 24)) -> Path:
    """`images/` and `labels/` of n subjects, with one class."""
    for i in range(n):
        image = head(shape, seed=seed + i)
        nifti(Path(folder) / "images" / f"p{i}.nii.gz", image.astype(np.int16))
        nifti(Path(folder) / "labels" / f"p{i}.nii.gz", (image > 800).astype(np.uint8))
    return Path(folder)


def command(kind, dataset_dir, output_dir, *overlays, **overrides) -> list[str]:
    """The same as a command line."""
    run_id = {"evaluate": "evaluating", "inference": "inference"}.get(kind, "training")
    names = [f"{kind}.json", *overlays]
    if kind == "evaluate" and _evaluate_is_an_overlay():
        names = ["train.json", *overlays, "evaluate.json"]
    line = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(overlays_of(*names))]
    settings = {"bundle_root": BUNDLE, "dataset_dir": dataset_dir, "output_dir": output_dir, "device": "cpu"}
    for key, value in {**settings, "num_workers": 0, "amp": False, **overrides}.items():
        line += [f"--{key}", str(value) if isinstance(value, (str, Path)) else json.dumps(value)]
    return line


def start(log: Path, *args, **overrides) -> subprocess.Popen:
    """A command in the background; what it says goes to a file."""
    with log.open("w") as file:
        return subprocess.Popen(
            command(*args, **overrides),
            cwd=log.parent,
            env=ENVIRONMENT,
            stdout=file,
            stderr=file,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),  # it ends with the tests, also if stopped
        )


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def inputs(dataset_dir, output_dir=None) -> list[dict]:
    return find_inputs(dataset_dir, output_dir)


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))
