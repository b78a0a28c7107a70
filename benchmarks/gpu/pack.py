"""Packs what a bare GPU machine needs into one file: code, wheels and scans, at most 55 MB.

    python -m benchmarks.gpu.pack --data ../shared/data --out study.tar
    python -m benchmarks.gpu.pack --data ../shared/data --out check.tar --max_scans 4 --tests
    python -m benchmarks.gpu.pack --data ../shared/data --out hippocampus.tar --sets hippocampus --no_wheels

``study.tar`` is for ``run.sh ... study``, ``check.tar`` for ``run.sh ... check speed``: it has the tests, what they
import and the weights that ship, and few scans. On the GPU machine: ``tar -xf study.tar -C work && bash
work/benchmarks/gpu/run.sh OUT MINUTES study``. Several packs may be unpacked into one folder; ``run.sh`` uses the scans
that are there. That machine has Python 3.12, PyTorch, numpy, scipy, scikit-image, matplotlib, tensorboard and einops,
and no network.

What is lost: air outside the head becomes 0, voxels have 40 levels between 0 and the 99.5th percentile (a rounding
error of 0.7 % of that, standard deviation), grids are those of the 2 mm preprocessing. Pictures are stored as
lossless WebP, one mosaic of slices a scan. Label maps are exact. The splits are those of ``benchmarks/splits.csv``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 55e6  # bytes
LEVELS = 40
#: what the GPU machine lacks; versions are those of constraints.txt
WHEELS = (
    "monai",
    "nibabel",
    "pydicom",
    "pytorch-ignite",
    "fire",
    "termcolor",
    "tqdm",
    "packaging",
    "importlib-resources",
)
CODE = ("custom", "bundle/configs", "benchmarks", "pyproject.toml", "setup.cfg")
#: with --tests
TEST_WHEELS = ("pytest", "pluggy", "iniconfig", "pygments")
TEST_CODE = ("tests", "scripts", "constraints.txt", "bundle/models/model.pt", "bundle/models/pretrained")
#: set: which rows of the manifest belong to it
SETS = {
    "brain": lambda row: row["file"].startswith("brain_structures/") and row["split"] in ("train", "val"),
    "mixed": lambda row: row["file"].startswith("heads/") and row["split"] == "train",
    "hippocampus": lambda row: row["file"].startswith("hippocampus/") and row["split"] != "fold4",
}
#: split of the manifest: list of a datalist
LISTS = (
    {"train": "training", "val": "validation"} | {f"fold{n}": "training" for n in range(3)} | {"fold3": "validation"}
)


def head_mask(voxels: np.ndarray) -> np.ndarray:
    """The largest bright region with its holes filled: what is not air around the head."""
    bright, n = ndimage.label(voxels > 0.5 * voxels.mean())
    largest = bright == 1 + np.argmax(np.bincount(bright.ravel())[1:]) if n else bright > 0
    wide = np.pad(ndimage.binary_dilation(largest), 4)
    return ndimage.binary_fill_holes(ndimage.binary_closing(wide, iterations=3))[4:-4, 4:-4, 4:-4]


def encode(voxels: np.ndarray) -> bytes:
    """Slices ``(X, Y, Z)`` uint8 side by side in one lossless WebP."""
    columns = int(np.ceil(np.sqrt(len(voxels))))
    rows = -(-len(voxels) // columns)
    sheet = np.zeros((rows * columns, *voxels.shape[1:]), np.uint8)
    sheet[: len(voxels)] = voxels
    sheet = sheet.reshape(rows, columns, *voxels.shape[1:]).swapaxes(1, 2).reshape(rows * voxels.shape[1], -1)
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "WEBP", lossless=True, quality=90, method=5)
    return file.getvalue()


def decode(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Inverse of :func:`encode`."""
    sheet = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    columns = sheet.shape[1] // shape[2]
    sheet = sheet.reshape(-1, shape[1], columns, shape[2]).swapaxes(1, 2)
    return sheet.reshape(-1, *shape[1:])[: shape[0]]


def quantize(voxels: np.ndarray, keep_air: bool = False) -> np.ndarray:
    """Voxels in ``LEVELS`` steps up to their 99.5th percentile; air outside the head is 0."""
    voxels = np.asarray(voxels, np.float32)
    scaled = np.clip(voxels / max(np.percentile(voxels, 99.5), 1e-6), 0, 1)
    return np.round(scaled * (1 if keep_air else head_mask(voxels)) * (LEVELS - 1)).astype(np.uint8)


def preprocessed(path: Path, spacing: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a scan, brought to ``spacing`` mm where it is finer."""
    image = nib.load(path)
    voxels, affine = np.asarray(image.dataobj, np.float32), image.affine
    if spacing:
        sides = nib.affines.voxel_sizes(affine)
        zoom = np.minimum(sides / spacing, 1.0)
        if (zoom < 0.95).any():
            shape = np.maximum(np.round(np.array(voxels.shape) * zoom), 1).astype(int)
            blurred = ndimage.gaussian_filter(voxels, np.where(zoom < 1, 0.42 / zoom, 0))
            step = np.array(voxels.shape) / shape
            at = [(np.arange(n) + 0.5) * s - 0.5 for n, s in zip(shape, step)]
            voxels = ndimage.map_coordinates(blurred, np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")
            affine = affine @ np.diag([*step, 1.0])
            affine[:3, 3] = (image.affine @ np.array([*((step - 1) / 2), 1.0]))[:3]
    return voxels, affine


def add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    return len(content)


def add_scans(tar: tarfile.TarFile, data: Path, name: str, limit: int | None) -> int:
    """One set: WebP files and an index with what it takes to make NIfTI files of them again. Returns the bytes."""
    with (data / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if SETS[name](row)]
    images = [row for row in rows if "/labels/" not in row["file"]]
    splits = {split: [row for row in images if row["split"] == split][:limit] for split in LISTS}
    images = [row for of_split in splits.values() for row in of_split]
    index, size = [], 0
    for row in images:
        source = data / row["file"]
        small = name == "hippocampus"  # crops without air, 1 mm
        voxels, affine = preprocessed(source, None if small else 2.0)
        entry = {"path": row["file"], "split": row["split"], "subject": row["subject"]}
        entry |= {"shape": list(voxels.shape), "affine": np.asarray(affine).tolist(), "label": None}
        size += add(tar, f"packed/{name}/{row['file']}.webp", encode(quantize(voxels, keep_air=small)))
        label = Path(row["file"].replace("/images", "/labels"))
        if label != Path(row["file"]) and (data / label).is_file():
            size += add(
                tar, f"packed/{name}/{label}.webp", encode(np.asarray(nib.load(data / label).dataobj, np.uint8))
            )
            entry["label"] = str(label)
        index.append(entry)
    return size + add(tar, f"packed/{name}/index.json", json.dumps(index).encode())


def unpack(folder: Path, out: Path) -> None:
    """NIfTI files of all sets in ``folder``/packed, laid out as ``--data`` was, with a datalist of each set.

    A set that has been unpacked is left as it is, unless another pack has replaced it.
    """
    for index in sorted((folder / "packed").glob("*/index.json")):
        entries, lists, done = json.loads(index.read_text()), {}, out / f"{index.parent.name}_index.json"
        if done.is_file() and done.read_text() == index.read_text():
            continue
        for entry in entries:
            affine = np.array(entry["affine"])
            item = {"image": entry["path"], "subject": entry["subject"]}
            for key, path in (("image", entry["path"]), ("label", entry["label"])):
                if path:
                    voxels = decode((index.parent / f"{path}.webp").read_bytes(), tuple(entry["shape"]))
                    (out / path).parent.mkdir(parents=True, exist_ok=True)
                    nib.save(nib.Nifti1Image(voxels, affine), out / path)
                    item[key] = path
            lists.setdefault(LISTS[entry["split"]], []).append(item)
        (out / f"{index.parent.name}.json").write_text(json.dumps(lists))
        done.write_text(index.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of benchmarks/prepare_data.py")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=["brain"])
    parser.add_argument("--out", type=Path, default=Path("gpu_pack.tar"))
    parser.add_argument("--max_scans", type=int, help="of each split of a set, for a trial")
    parser.add_argument("--tests", action="store_true", help="the tests, what they import, and the weights that ship")
    parser.add_argument("--no_wheels", action="store_true", help="for a machine that has them")
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="make NIfTI files of FOLDER/packed under --out")
    options = parser.parse_args()
    if options.unpack:
        unpack(options.unpack, options.out)
        return
    sizes = {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(options.out, "w") as tar, tempfile.TemporaryDirectory() as folder:
        tracked = ["git", "ls-files", *CODE, *(TEST_CODE if options.tests else ())]
        files = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        sizes["code"] = sum(add(tar, name, (ROOT / name).read_bytes()) for name in files if not name.endswith(".png"))
        if not options.no_wheels:
            pip = [sys.executable, "-m", "pip", "-q", "download", "--no-deps", "--only-binary=:all:"]
            pip += ["--python-version", "3.12", "-c", str(ROOT / "constraints.txt"), "-d", folder]
            pip += [*WHEELS, *(TEST_WHEELS if options.tests else ())]
            subprocess.run(pip, check=True)
            wheels = sorted(Path(folder).glob("*.whl"))
            sizes["wheels"] = sum(add(tar, f"wheels/{wheel.name}", wheel.read_bytes()) for wheel in wheels)
        for name in options.sets:
            sizes[name] = add_scans(tar, options.data, name, options.max_scans)
    total = options.out.stat().st_size
    print("\n".join(f"{name:<12} {size / 1e6:6.1f} MB" for name, size in [*sizes.items(), ("total", total)]))
    if total > LIMIT:
        sys.exit(f"{options.out} has {total / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}: pack fewer sets at a time.")


if __name__ == "__main__":
    main()
