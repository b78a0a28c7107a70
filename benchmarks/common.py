"""What the benchmarks share: paths, arguments, the data, timings in turn, facts about the machine, tables."""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from monai.bundle import create_workflow
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, CropForegroundd, Orientationd, Spacingd
from torch import nn

from sspformer import __version__ as sspformer_version
from sspformer.intensity import above_mean
from sspformer.io import LoadScand, write_csv
from sspformer.transforms import ScaleByPercentilesd

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundle"
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
DATA = Path(os.environ.get("SSPFORMER_DATA", "data"))

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def argument_parser(description: str, output: Path | str | None = None, data: bool = False) -> argparse.ArgumentParser:
    """A parser with ``--output``, if there is a default for it, and ``--data``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if output is not None:
        parser.add_argument("--output", type=Path, default=output, help="file to write (default: %(default)s)")
    if data:
        told = "folder that prepare_data.py made (default: $SSPFORMER_DATA, or ./data)"
        parser.add_argument("--data", type=Path, default=DATA, help=told)
    return parser


def add_rounds(parser: argparse.ArgumentParser, rounds: int, warmup: int = 3) -> None:
    """Add ``--rounds`` and ``--warmup``."""
    parser.add_argument("--rounds", type=int, default=rounds, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=warmup, help="calls before them (default: %(default)s)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--threads``."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: all)")


def add_runs(parser: argparse.ArgumentParser, work_dir: str, jobs: int) -> None:
    """Add ``--work_dir``, a folder below ``output``, and ``--jobs``."""
    parser.add_argument("--work_dir", type=Path, default=ROOT / "output" / work_dir, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time, each on its share of the cores")


def prepare_machine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set the number of threads; stop if the device is missing, warn if the machine is busy."""
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, f"no GPU: --device {args.device} needs one and a CUDA build of PyTorch; try --device cpu\n")
    if args.threads:
        torch.set_num_threads(args.threads)
    warn_if_busy()


def warn_if_busy() -> None:
    """Print a line if other processes use the CPU now."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.3 * (os.cpu_count() or 1):
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores): timings will be noisy")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def read_manifest(data: Path) -> list[dict[str, str]]:
    """Rows of ``manifest.csv``, one per scan.

    Raises:
        SystemExit: if the folder has no such file.
    """
    if not (data / "manifest.csv").is_file():
        raise SystemExit(f"no manifest.csv in {data}: make that folder with benchmarks/prepare_data.py, or set --data")
    return read_csv(data / "manifest.csv")


def scans(data: Path, split: str, folder: str = "heads", max_spacing: float = math.inf) -> list[dict[str, str]]:
    """Rows of the manifest in a folder and split, without voxel sides above ``max_spacing`` mm.

    ``image`` has the path. Subjects of ``heads`` get their data set's name: several sets have a ``sub-07``.
    """
    rows = []
    for row in read_manifest(data):
        sides = [float(side) for side in row["spacing_mm"].split("x")]
        if row["file"].startswith(f"{folder}/") and row["split"] == split and max(sides) <= max_spacing:
            rows.append({**row, "image": str(data / row["file"]), "subject": subject_of(row)})
    return rows


def subject_of(row: Mapping[str, str]) -> str:
    """A subject's name that no other data set has."""
    file = Path(row["file"])
    return f"{file.name.split('_')[0]}_{row['subject']}" if file.parts[0] == "heads" else row["subject"]


def head_loader(images: Sequence[str], spacing: float) -> DataLoader:
    """Batches of one whole head each, ``image`` (1, 1, *S): RAS, isotropic ``spacing`` in mm, cropped, in [0, 1]."""
    foreground = {"source_key": "image", "select_fn": above_mean, "margin": 4, "allow_smaller": True}
    steps = [
        LoadScand("image"),
        Orientationd("image", "RAS", labels=None),
        Spacingd("image", [spacing] * 3),
        CropForegroundd("image", **foreground, start_coord_key=None, end_coord_key=None),
        ScaleByPercentilesd("image", 0.5, 99.5),
    ]
    return DataLoader(Dataset([{"image": image} for image in images], Compose(steps)), batch_size=1)


def segment(image: str | Path, output_dir: str | Path, **options) -> None:
    """Run the bundle's ``inference.json`` on a file, with the weights that ship."""
    infer(image, output_dir, **options)


def infer(image: str | Path, output_dir: str | Path, overlays: Sequence[str] = (), **options) -> None:
    """Run inference of a task on a file or folder, with the weights that ship."""
    paths = {"bundle_root": str(BUNDLE), "dataset_dir": str(image), "output_dir": str(output_dir)}
    configs = [str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", *overlays)]
    workflow = create_workflow(config_file=configs, workflow_type="infer", **paths, **options)
    workflow.run()
    workflow.finalize()


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def time_alternating(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3, device: str = "cpu", seed: int = 0
) -> dict[str, np.ndarray]:
    """Seconds of every call, ``(rounds,)`` for each contender.

    Each round calls every contender once, in an order drawn anew, so that other load on the machine hits all alike.
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(-warmup, rounds):
        for name in order.sample(list(contenders), len(contenders)):
            elapsed = stopwatch(contenders[name], device)
            if i >= 0:
                seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}


def stopwatch(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, with the work that it leaves running on the GPU."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the GPU, if the device is one."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: np.ndarray, name: str, digits: int = 5) -> dict[str, float]:
    """Median and quartiles, as the columns ``{name}_median``, ``{name}_q1``, ``{name}_q3``."""
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    return {f"{name}_median": round(median, digits), f"{name}_q1": round(q1, digits), f"{name}_q3": round(q3, digits)}


# ---------------------------------------------------------------------------------------------------------------------
# Facts, files, tables
# ---------------------------------------------------------------------------------------------------------------------


def parameters(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def facts(device: str = "cpu", packages: Sequence[str] = ()) -> dict[str, object]:
    """What a timing depends on, as columns of a CSV file; nothing that names the machine or its user."""
    columns: dict[str, object] = {
        "device": torch.device(device).type,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        columns["gpu"] = torch.cuda.get_device_name(device)
    columns |= {"python": platform.python_version(), "sspformer": sspformer_version}
    return columns | {package: version(package) for package in ("torch", "monai", *packages)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write the rows, with lines that end as those of git's text files do, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, rows, line_end="\n")
    print(f"\nwritten to {path}")


def save_figure(figure, path: Path, dpi: int = 130) -> None:
    """Save a matplotlib figure and say where."""
    figure.savefig(path, dpi=dpi)
    print(f"written to {path}")
