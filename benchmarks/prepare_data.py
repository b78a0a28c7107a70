"""Build the folder that the benchmarks read, from public downloads that are already on this machine.

    python -m benchmarks.prepare_data --msd_hippocampus Task04_Hippocampus.tar --ds000011 ds000011 --out data

Each option takes folders or archives (tar, zip), with their files named as they were published. Nothing is downloaded.
``splits.csv`` says which scans are wanted, with their split, shape and voxel size; the script finds them by name,
copies or converts them, checks them, and writes ``manifest.csv``. It says which scans are still missing and which
benchmarks need them. It keeps what is there, so it can run again after the next download.

Two conversions are made:

- IXI is wanted at 2 mm, 8 bit, with axes towards posterior, superior and right. NiChart publishes that version with its
  labels. From the original scans (``IXI-T1.tar``) the script averages over voxels instead, so scores will differ a bit.
- NiChart's labels are DLMUSE regions, which become the 17 structures of ``STRUCTURES``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import Orientation, ResampleToMatch, Resize

from benchmarks.common import DATA, ROOT, argument_parser, read_csv, save_csv
from sspformer.io import LoadScand

SPLITS = ROOT / "benchmarks" / "splits.csv"
TRAINING = "study, train_models"
#: download: what it is and where, benchmarks that need it
DOWNLOADS = {
    "ixi": (
        "T1 heads of IXI: test_data/processed/IXI in github.com/CBICA/NiChart_Project and its history, at 2 mm, or the "
        "original IXI-T1.tar of brain-development.org/ixi-dataset",
        f"{TRAINING}, study.equal_loss",
    ),
    "ixi_labels": ("DLMUSE labels of IXI, from the same NiChart folder", TRAINING),
    "msd_hippocampus": ("Task04_Hippocampus.tar of medicaldecathlon.com", f"{TRAINING}, study.nnunet"),
    "ds002748": ("openneuro.org/datasets/ds002748", f"restoration, figures.other_scanners, {TRAINING}"),
    "ds000011": ("openneuro.org/datasets/ds000011", f"restoration, figures.other_scanners, {TRAINING}"),
    "open_ms_data": ("github.com/muschellij2/open_ms_data", f"restoration, figures.other_scanners, {TRAINING}"),
    "isles22": ("ISLES-2022.zip of zenodo.org/records/7153326", TRAINING),
    "dcm_qa_decubitus": ("github.com/neurolabusc/dcm_qa_decubitus", f"figures.other_scanners, {TRAINING}"),
    "niivue": ("github.com/niivue/niivue-demo-images", TRAINING),
    "named": ("scans that already have their names in splits.csv", TRAINING),
}
#: names in splits.csv, the download, and names there; {0}, {1}, ... are the groups, contrasts through CONTRASTS
IMAGES = (
    (r"brain_structures/images/(.+)\.nii\.gz", "ixi", ("{0}_T1.nii.gz", "{0}-T1.nii.gz")),
    (r"hippocampus/images/(.+)\.nii\.gz", "msd_hippocampus", ("imagesTr/{0}.nii.gz",)),
    (r"heads/(ds\d+)_(sub-\d+)_(T\d)\.nii\.gz", "{0}", ("{1}/anat/{1}_{2}w.nii.gz", "{1}/anat/{1}_inplane{2}.nii.gz")),
    (
        r"heads/openms-cross_(patient\d+)_(\w+)\.nii\.gz",
        "open_ms_data",
        ("cross_sectional/MNI/{0}/{1}_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz",),
    ),
    (
        r"heads/openms-long_(patient\d+)-(study\d)_(\w+)\.nii\.gz",
        "open_ms_data",
        ("longitudinal/raw/{0}/{1}_{2}W.nii.gz", "longitudinal/raw/{0}/{1}_{2}.nii.gz"),
    ),
    (r"heads/isles22_(sub-strokecase\d+)_(\w+)\.nii\.gz", "isles22", ("{0}_ses-0001_{1}.nii.gz",)),
    (r"heads/dcmqa-decubitus_crlab_T1-(HF\w+)\.nii\.gz", "dcm_qa_decubitus", ("In/{0}/2_t1_fl2d_sag/*.dcm",)),
    (r"heads/niivue_(\w+)\.nii\.gz", "niivue", ("{0}w.nii.gz",)),
    (r"heads/(.+)", "named", ()),
)
LABELS = (
    (r"brain_structures/labels/(.+)\.nii\.gz", "ixi_labels", ("{0}_T1_DLMUSE.nii.gz", "{0}_DLMUSE.nii.gz")),
    (r"hippocampus/labels/(.+)\.nii\.gz", "msd_hippocampus", ("labelsTr/{0}.nii.gz",)),
)
CONTRASTS = {"T1c": "T1POST"}
IXI_AXES, IXI_SPACING = "PSR", 2.0
#: DLMUSE regions of each structure, in the order of its labels, 1 to 17
STRUCTURES: dict[str, Iterable[int]] = {
    "cortical grey matter": range(100, 208),
    "cerebral white matter": range(81, 96),
    "lateral ventricles": range(49, 53),
    "third ventricle": (4,),
    "fourth ventricle": (11,),
    "cortical CSF": (1, 46),
    "thalamus": (59, 60),
    "caudate": (36, 37),
    "putamen": (57, 58),
    "pallidum": (55, 56),
    "hippocampus": (47, 48),
    "amygdala": (31, 32),
    "accumbens": (23, 30),
    "ventral diencephalon and basal forebrain": (61, 62, 69, 75, 76),
    "brain stem": (35,),
    "cerebellar grey matter": (38, 39, 71, 72, 73),
    "cerebellar white matter": (40, 41),
}


class Wanted(NamedTuple):
    """A file to make: its name in the folder, the download and the names there, the row of splits.csv."""

    file: str
    download: str
    names: tuple[str, ...]
    row: Mapping[str, str]


def wanted_files(rows: Sequence[Mapping[str, str]]) -> list[Wanted]:
    """The images and labels of some rows of splits.csv; images first, as labels are put on their grids."""
    images = [(row["file"], row) for row in rows]
    labels = [(file.replace("/images/", "/labels/"), row) for file, row in images if "/images/" in file]
    return [_find(file, row, IMAGES) for file, row in images if _is_read(file)] + [
        _find(file, row, LABELS) for file, row in labels
    ]


def _is_read(file: str) -> bool:
    """Whether a benchmark reads the file; the spinal cord and the DICOM series in splits.csv are for development."""
    return any(re.fullmatch(pattern, file) for pattern, *_ in IMAGES)


def _find(file: str, row: Mapping[str, str], patterns: Sequence[tuple]) -> Wanted:
    for pattern, download, names in patterns:
        if match := re.fullmatch(pattern, file):
            groups = [CONTRASTS.get(group, group) for group in match.groups()]
            return Wanted(file, download.format(*groups), tuple(name.format(*groups) for name in names), row)
    raise ValueError(f"{file} of splits.csv is of no download that this script knows.")


class Download:
    """The files of folders and archives, found by the ends of their paths, whatever the case.

    Args:
        paths: folders, tar and zip archives.

    Raises:
        SystemExit: if a path does not exist, or is no folder and no such archive.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._members: list[tuple[str, Callable[[Path], object]]] = []  # path, what copies it to a file
        for path in paths:
            if path.is_dir():
                found = [file for file in path.rglob("*") if file.is_file()]
                self._members += [(file.as_posix(), lambda to, file=file: shutil.copyfile(file, to)) for file in found]
            elif path.is_file() and zipfile.is_zipfile(path):
                archive = zipfile.ZipFile(path)
                self._add(archive.namelist(), archive.open)
            elif path.is_file() and tarfile.is_tarfile(path):
                archive = tarfile.open(path)
                self._add([member.name for member in archive.getmembers() if member.isfile()], archive.extractfile)
            else:
                raise SystemExit(f"{path} is neither a folder nor a tar or zip archive")

    def _add(self, names: Iterable[str], opener: Callable) -> None:
        def copy(to: Path, name: str) -> None:
            with opener(name) as source, to.open("wb") as target:
                shutil.copyfileobj(source, target)

        self._members += [(name, lambda to, name=name: copy(to, name)) for name in names]

    def fetch(self, names: Sequence[str], folder: Path) -> list[Path]:
        """Copy the files of the first name that there is; ``*`` stands for any file. Nothing found: an empty list."""
        for name in names:
            ending = re.compile(f"(.*/)?{re.escape(name)}".replace(r"\*", "[^/.][^/]*"), re.IGNORECASE)
            if found := [(path, copy) for path, copy in self._members if ending.fullmatch(path)]:
                files = [folder / Path(path).name for path, _ in (found if "*" in name else found[:1])]
                for file, (_, copy) in zip(files, found):
                    copy(file)
                return files
        return []


# ---------------------------------------------------------------------------------------------------------------------
# Conversions
# ---------------------------------------------------------------------------------------------------------------------


def load(scan: Path | Sequence[Path]) -> MetaTensor:
    """A NIfTI file or the files of a DICOM series, ``(1, *S)``."""
    return LoadScand("image")({"image": str(scan) if isinstance(scan, Path) else [str(file) for file in scan]})["image"]


def to_2mm(source: Path, target: Path) -> None:
    """IXI at 2 mm and 8 bit: copied if it is, else averaged over the voxels of the original."""
    image = nib.load(source)
    if image.get_data_dtype() == np.uint8 and np.allclose(image.header.get_zooms(), IXI_SPACING, atol=1e-3):
        shutil.copyfile(source, target)
        return
    volume = Orientation(IXI_AXES, labels=None)(load(source))
    size = [round(side * step / IXI_SPACING) for side, step in zip(volume.shape[1:], volume.pixdim.tolist())]
    save(Resize(size, mode="area")(volume), target, np.uint8)


def merge_regions(source: Path, target: Path, image: Path) -> None:
    """DLMUSE regions as 17 structures, on the grid of the image."""
    regions = ResampleToMatch(mode="nearest", padding_mode="zeros")(load(source), load(image))
    table = np.zeros(max(int(regions.max()), 207) + 1)
    for value, codes in enumerate(STRUCTURES.values(), start=1):
        table[list(codes)] = value
    merged = MetaTensor(table[np.rint(regions.numpy()).astype(int)], affine=regions.affine)
    save(merged, target, np.uint8, scaled=False)


def save(volume: MetaTensor, target: Path, dtype: type, scaled: bool = True) -> None:
    """Write ``(1, *S)`` as NIfTI; ``scaled``: the type's range spans the values, with a slope in the header."""
    voxels = volume[0].numpy()
    image = nib.Nifti1Image(voxels if scaled else voxels.astype(dtype), volume.affine.numpy())
    image.set_data_dtype(dtype)
    nib.save(image, target)


def make(want: Wanted, downloads: Mapping[str, Download], out: Path) -> bool:
    """Make a wanted file, if its download has it; return whether it has."""
    target = out / want.file
    part = target.with_name(f"part_{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if "named" in downloads and (found := downloads["named"].fetch([want.file], Path(folder))):
            shutil.copyfile(found[0], part)
        elif want.download in downloads and (found := downloads[want.download].fetch(want.names, Path(folder))):
            convert(want, found, part, out)
        else:
            return False
    part.replace(target)
    return True


def convert(want: Wanted, sources: Sequence[Path], part: Path, out: Path) -> None:
    """Write a wanted file, from the files of its download, to ``part``."""
    if want.file.startswith("brain_structures/images/"):
        to_2mm(sources[0], part)
    elif want.file.startswith("brain_structures/labels/"):
        merge_regions(sources[0], part, out / want.row["file"])
    elif sources[0].suffix == ".dcm":
        save(load(sorted(sources)), part, np.float32)
    else:
        shutil.copyfile(sources[0], part)


# ---------------------------------------------------------------------------------------------------------------------


def problem_of(path: Path, row: Mapping[str, str]) -> str:
    """How a scan differs from its row of splits.csv; empty if it does not."""
    image = nib.load(path)
    found = {"shape": image.shape[:3], "spacing_mm": [f"{side:.3g}" for side in image.header.get_zooms()[:3]]}
    texts = {name: "x".join(map(str, values)) for name, values in found.items()}
    return ", ".join(f"{name} {text} in place of {row[name]}" for name, text in texts.items() if text != row[name])


def prepare(downloads: Mapping[str, Download], out: Path, rows: Sequence[Mapping[str, str]]) -> list[Wanted]:
    """Make the files that are not there yet, write the manifest, and return what is still missing."""
    missing = []
    for want in wanted_files(rows):
        has_image = want.file == want.row["file"] or (out / want.row["file"]).is_file()  # labels need its grid
        if not (out / want.file).is_file() and not (has_image and make(want, downloads, out)):
            missing.append(want)
        elif problem := problem_of(out / want.file, want.row):
            print(f"{want.file}: {problem}")
    present = [row for row in rows if (out / row["file"]).is_file()]
    save_csv(out / "manifest.csv", present)
    return missing


def report(missing: Sequence[Wanted], rows: Sequence[Mapping[str, str]]) -> None:
    """Print what is missing, by download, and which benchmarks need it."""
    wanted, lacking = defaultdict(list), defaultdict(list)
    for files, group in ((wanted_files(rows), wanted), (missing, lacking)):
        for want in files:
            group[want.download].append(want)
    for download, files in wanted.items():
        absent = lacking[download]
        print(f"{download}: {len(files) - len(absent)} of {len(files)} files")
        if absent:
            about, needed_by = DOWNLOADS[download]
            names = ", ".join(Path(want.file).name for want in absent[:3]) + ", ..." * (len(absent) > 3)
            print(f"  missing {names}\n  needed by {needed_by}\n  from {about}: --{download}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    for name, (about, _) in DOWNLOADS.items():
        parser.add_argument(f"--{name}", type=Path, nargs="+", default=[], metavar="PATH", help=about)
    parser.add_argument("--out", type=Path, default=DATA, help="folder to build (default: $SSPFORMER_DATA, or ./data)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args, rows = parse(arguments), read_csv(SPLITS)
    downloads = {name: Download(paths) for name in DOWNLOADS if (paths := getattr(args, name))}
    report(prepare(downloads, args.out, rows), rows)


if __name__ == "__main__":
    main(sys.argv[1:])
