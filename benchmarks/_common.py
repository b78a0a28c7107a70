"""What the benchmarks share: MONAI's network, timings in turn, facts about the machine, heads, CSV files, tables."""

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
from monai.data import DataLoader, Dataset
from monai.networks.nets import MaskedAutoEncoderViT
from monai.transforms import Compose, CropForegroundd, Orientationd, Spacingd
from torch import Tensor, nn

from sspformer import __version__ as sspformer_version
from sspformer.intensity import above_mean
from sspformer.io import LoadScand
from sspformer.networks import SIZES
from sspformer.transforms import ScaleByPercentilesd

RESULTS = Path(__file__).parent / "results"


class MonaiMaskedAutoencoder(MaskedAutoEncoderViT):
    """MONAI's masked autoencoder with the widths, depths and heads of a size of ours; learnable position embeddings.

    ``sincos``: MONAI's default position embedding instead. In 3D its widths must divide by 6, so they are rounded
    down to that (tiny: 252 for 256). ``given_keep``, visible tokens ``(B, K)``, replaces the mask that MONAI draws in
    its forward pass; None: it draws.
    """

    given_keep: Tensor | None = None

    def __init__(self, size: str, image_size: int, patch_size: int, mask_ratio: float, sincos: bool = False) -> None:
        preset = dict(SIZES[size])
        if sincos:
            for dim, heads in (("dim", "num_heads"), ("decoder_dim", "decoder_num_heads")):
                preset[dim] -= preset[dim] % math.lcm(6, preset[heads])
        super().__init__(
            in_channels=1,
            img_size=(image_size,) * 3,
            patch_size=(patch_size,) * 3,
            hidden_size=preset["dim"],
            mlp_dim=4 * preset["dim"],
            num_layers=preset["depth"],
            num_heads=preset["num_heads"],
            masking_ratio=mask_ratio,
            decoder_hidden_size=preset["decoder_dim"],
            decoder_mlp_dim=4 * preset["decoder_dim"],
            decoder_num_layers=preset["decoder_depth"],
            decoder_num_heads=preset["decoder_num_heads"],
            pos_embed_type="sincos" if sincos else "learnable",
            decoder_pos_embed_type="sincos" if sincos else "learnable",
            qkv_bias=True,  # ours has one
        )

    def _masking(self, x: Tensor, masking_ratio: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if self.given_keep is None:
            return super()._masking(x, masking_ratio)
        keep = self.given_keep
        mask = torch.ones(x.shape[:2], dtype=torch.int, device=x.device).scatter_(1, keep, 0)
        return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1])), keep, mask


def monai_loss(pred: Tensor, mask: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error of masked patches: predicted and clean ones ``(B, N, P)``, mask ``(B, N)``, 1 where masked."""
    error = (pred.float() - clean).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def parameters(network: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def time_alternating(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3, device: str = "cpu", seed: int = 0
) -> dict[str, np.ndarray]:
    """Seconds of every call, ``(rounds,)`` for each contender.

    Each round calls every contender once, in an order drawn anew: whatever else the machine does hits all of them.
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
    """Seconds of one call, including what it left running on the GPU."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one in the game."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: np.ndarray, name: str, digits: int = 5) -> dict[str, float]:
    """Median and quartiles, as the columns ``{name}_median``, ``{name}_q1``, ``{name}_q3``."""
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    return {f"{name}_median": round(median, digits), f"{name}_q1": round(q1, digits), f"{name}_q3": round(q3, digits)}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments, facts, files
# ---------------------------------------------------------------------------------------------------------------------


def argument_parser(description: str, name: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """The arguments that all scripts take; ``rounds`` is the default of ``--rounds`` of those that time calls."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.csv", help="CSV file (default: %(default)s)")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="timed calls of each (default: %(default)s)")
        parser.add_argument("--warmup", type=int, default=3, help="calls before them (default: %(default)s)")
    return parser


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--threads``."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: all)")


def prepare_machine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the script with one line if the device is not there; sets the threads; warns of a busy machine."""
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.exit(
            1, f"no GPU here: --device {args.device} needs a CUDA build of PyTorch and a GPU; try --device cpu\n"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    warn_if_busy()


def warn_if_busy() -> None:
    """A line if other processes are using the CPU now."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.3 * (os.cpu_count() or 1):
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores): timings will be noisy")


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


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """The rows with the union of their columns; says where they went."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nwritten to {path}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print()
    for n, row in enumerate(cells):
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
        if n == 0:
            print("  ".join("-" * w for w in widths))


def range_text(columns: Mapping[str, object], name: str, scale: float = 1.0, digits: int = 2) -> str:
    """``median [q1, q3]`` of the columns of :func:`quartiles`."""
    median, q1, q3 = (float(columns[f"{name}_{part}"]) * scale for part in ("median", "q1", "q3"))
    return f"{median:.{digits}f} [{q1:.{digits}f}, {q3:.{digits}f}]"
