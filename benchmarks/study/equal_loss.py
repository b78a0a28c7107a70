"""Reconstruction error after equal steps, and after equal time, of SSPFormer's masked autoencoder and MONAI's.

    python -m benchmarks.study.equal_loss --data data

The networks (``benchmarks.speed.step_speed`` says how they differ) train from their own initialisation, step by step in
turn, on the same crops of real images with the same masks and the same optimiser (AdamW, warm-up and cosine, clipped
gradients). Validation uses the same crops and masks for all. MONAI's network draws its own masks; here it gets ours
(``MonaiMaskedAutoencoder._masking``), which are uniform, so that only the networks differ. MONAI's comes twice: with
learnable position embeddings at our widths, and with its default sin-cos embedding, for which the width must be 252
instead of 256. Neither sees noise, which MONAI's pretraining does not have.

The error is the mean squared error of masked patches, intensities in [0, 1] up to the 99.5th percentile of each scan.
"visible mean" predicts every masked voxel as the mean of its crop's visible ones: a network that has learned nothing.
The clock of each network runs in its training steps only. One seed fixes initialisation, crops and masks.

Scans are the T1 heads of IXI in the train and val splits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    add_device,
    argument_parser,
    facts,
    parameters,
    prepare_machine,
    save_csv,
    save_figure,
    scans,
    stopwatch,
)
from benchmarks.peers import MonaiMaskedAutoencoder, monai_loss
from sspformer.io import LoadScand, format_table
from sspformer.losses import MaskedReconstructionLoss
from sspformer.networks import SIZES, MaskedAutoencoder, SSPFormerEncoder, gather_tokens, patchify
from sspformer.transforms import MaskIndices, draw_mask

MONAI = ("MONAI learnable", "MONAI sin-cos")
NETWORKS = ("ours", "ours bf16", *MONAI)
IXI = "brain_structures/images"
N_VAL_CROPS = 4  # of each validation scan

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def load(rows: Sequence[dict], crop_size: int) -> list[Tensor]:
    """Volumes ``(1, *S)`` in [0, 1], padded with zeros where a side is shorter than a crop."""
    loader, volumes = LoadScand("image"), []
    for row in rows:
        volume = loader({"image": row["image"]})["image"].as_tensor()
        volume = (volume / np.percentile(volume, 99.5)).clamp(0, 1)
        short = [max(crop_size - side, 0) for side in volume.shape[1:]]
        volumes.append(nn.functional.pad(volume, [p for n in reversed(short) for p in (n // 2, n - n // 2)]))
    return volumes


def random_batch(
    volumes: Sequence[Tensor],
    n: int,
    crop_size: int,
    n_tokens: int,
    mask_ratio: float,
    random_state: np.random.RandomState,
) -> tuple[Tensor, MaskIndices]:
    """Crops ``(n, 1, crop_size, crop_size, crop_size)`` from anywhere in scans drawn at random, and uniform masks."""
    crops = [random_crop(volumes[random_state.randint(len(volumes))], crop_size, random_state) for _ in range(n)]
    return torch.stack(crops), uniform_masks(n, n_tokens, mask_ratio, random_state)


def random_crop(volume: Tensor, crop_size: int, random_state: np.random.RandomState) -> Tensor:
    """A cube of the volume ``(1, *S)``."""
    start = [random_state.randint(side - crop_size + 1) for side in volume.shape[1:]]
    return volume[(slice(None), *(slice(s, s + crop_size) for s in start))]


def uniform_masks(n: int, n_tokens: int, mask_ratio: float, random_state: np.random.RandomState) -> MaskIndices:
    """Plain masks, as MONAI draws them."""
    generator = torch.Generator().manual_seed(int(random_state.randint(2**31)))
    return draw_mask(torch.zeros(n, n_tokens), mask_ratio, beta=0.0, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# Contenders
# ---------------------------------------------------------------------------------------------------------------------


class Contender:
    """A network, its optimiser and its clock."""

    def __init__(self, network: nn.Module, bf16: bool, args) -> None:
        self.network, self.bf16 = network.to(args.device), bf16
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
        warmup = max(args.steps // 10, 1)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(args.steps - warmup, 1)))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.device, self.seconds = args.device, 0.0

    def loss(self, image: Tensor, masks: MaskIndices) -> Tensor:
        """Mean squared error of the masked patches of ``image`` (B, 1, *S)."""
        with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            if isinstance(self.network, MaskedAutoencoder):
                pred = self.network(image, masks.keep, masks.mask)
            else:
                self.network.given_keep = masks.keep
                pred, mask = self.network(image)
        if isinstance(self.network, MaskedAutoencoder):
            target = {"image": image, "mask": masks.mask, "keep": masks.keep}
            return MaskedReconstructionLoss(self.network.patch_size)(pred, target)
        return monai_loss(pred, mask, patchify(image, self.network.patch_size))

    def train(self, image: Tensor, masks: MaskIndices) -> None:
        """One step, with the clock running."""

        def step() -> None:
            self.optimizer.zero_grad()
            self.loss(image, masks).backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()

        self.seconds += stopwatch(step, self.device)
        self.scheduler.step()

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, MaskIndices]]) -> float:
        """Mean error over batches of equal size."""
        self.network.eval()
        error = float(np.mean([float(self.loss(image, masks)) for image, masks in batches]))
        self.network.train()
        return error


def make_contender(name: str, seed: int, args) -> Contender:
    """One of ``NETWORKS``."""
    torch.manual_seed(seed)
    if name in MONAI:
        sincos = name == "MONAI sin-cos"
        network = MonaiMaskedAutoencoder(args.size, args.crop_size, args.patch_size, args.mask_ratio, sincos)
    else:
        network = MaskedAutoencoder(SSPFormerEncoder(patch_size=args.patch_size, size=args.size))
    return Contender(network, name.endswith("bf16"), args)


# ---------------------------------------------------------------------------------------------------------------------


def run(seed: int, args, train: Sequence[Tensor], val: Sequence[tuple[Tensor, MaskIndices]]) -> Iterator[dict]:
    """Trains the contenders side by side; a row of the CSV file for each and every validation."""
    contenders = {name: make_contender(name, seed, args) for name in args.networks}
    random_state = np.random.RandomState(seed)
    n_tokens = (args.crop_size // args.patch_size) ** 3
    for step in range(args.steps + 1):
        if step % args.val_interval == 0 or step == args.steps:
            for name, contender in contenders.items():
                error = contender.validate(val)
                row = {"network": name, "seed": seed, "step": step, "train_seconds": round(contender.seconds, 2)}
                yield row | {"val_masked_mse": round(error, 7), "parameters": parameters(contender.network)}
        if step == args.steps:
            return
        image, masks = random_batch(train, args.batch_size, args.crop_size, n_tokens, args.mask_ratio, random_state)
        image, masks = image.to(args.device), MaskIndices(*(index.to(args.device) for index in masks))
        names = list(contenders)
        for name in names[step % len(names) :] + names[: step % len(names)]:
            contenders[name].train(image, masks)


def visible_mean_error(batches: Sequence[tuple[Tensor, MaskIndices]], patch_size: int) -> float:
    """The error of predicting the mean of the visible voxels of each crop."""
    errors = []
    for image, masks in batches:
        patches = patchify(image, (patch_size,) * 3)
        mean = gather_tokens(patches, masks.keep).mean(dim=(1, 2), keepdim=True)
        errors.append(float((gather_tokens(patches, masks.mask) - mean).square().mean()))
    return float(np.mean(errors))


def plot(path: Path, rows: Sequence[dict], baseline: float) -> None:
    """Draw the error by step and by time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["network"] for row in rows))
    for panel, key, label in zip(panels, ("step", "train_seconds"), ("step", "training time, s"), strict=True):
        for i, name in enumerate(names):
            for seed in sorted({row["seed"] for row in rows}):
                curve = [row for row in rows if row["network"] == name and row["seed"] == seed and row["step"]]
                x, y = [row[key] for row in curve], [row["val_masked_mse"] for row in curve]
                panel.plot(x, y, color=f"C{i}", alpha=0.8, label=name if seed == rows[0]["seed"] else None)
        panel.axhline(baseline, color="grey", linestyle=":", label="visible mean")
        panel.set(xlabel=label, yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("validation error of masked patches (MSE)")
    panels[0].legend()
    save_figure(figure, path)


def main() -> None:
    parser = argument_parser(__doc__, RESULTS / "equal_loss.csv", data=True)
    add_device(parser)
    parser.add_argument("--n_train", type=int, default=40, help="first training scans to use (default: %(default)s)")
    parser.add_argument("--n_val", type=int, default=8, help="first validation scans to use (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one training run each (default: 0 1)")
    parser.add_argument("--batch_size", type=int, default=4, help="crops in a step (default: %(default)s)")
    parser.add_argument("--crop_size", type=int, default=64, help="voxels of a side (default: %(default)s)")
    parser.add_argument("--patch_size", type=int, default=8, help="voxels of a patch's side (default: %(default)s)")
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="share of masked patches (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-4, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--val_interval", type=int, default=25, help="steps (default: %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="of the networks (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    args = parser.parse_args()
    if args.crop_size % args.patch_size:
        parser.error(f"--crop_size {args.crop_size} must be a multiple of --patch_size {args.patch_size}")
    prepare_machine(parser, args)

    train_scans = scans(args.data, "train", IXI)[: args.n_train]
    val_scans = scans(args.data, "val", IXI)[: args.n_val]
    if not train_scans or not val_scans:
        parser.error(f"{args.data} has {len(train_scans)} training and {len(val_scans)} validation heads; need both")
    print(f"{len(train_scans)} training scans, {len(val_scans)} validation scans")
    train = load(train_scans, args.crop_size)
    n_tokens, random_state = (args.crop_size // args.patch_size) ** 3, np.random.RandomState(12345)
    val = []
    for volume in load(val_scans, args.crop_size):
        image, masks = random_batch([volume], N_VAL_CROPS, args.crop_size, n_tokens, args.mask_ratio, random_state)
        val.append((image.to(args.device), MaskIndices(*(index.to(args.device) for index in masks))))
    baseline = visible_mean_error(val, args.patch_size)

    setting = {"visible_mean_mse": round(baseline, 7), "train_scans": len(train), "val_scans": len(val)}
    setting |= {
        key: getattr(args, key) for key in ("size", "crop_size", "patch_size", "mask_ratio", "batch_size", "lr")
    }
    setting |= {"steps": args.steps, "optimizer": "AdamW 0.9 0.95, decay 0.05, cosine, clip 1"} | facts(args.device)
    rows = []
    for seed in args.seeds:
        for row in run(seed, args, train, val):
            print(
                "seed {seed}  step {step:4d}  {network:15s} {val_masked_mse:.5f}  {train_seconds:.0f} s".format(**row)
            )
            rows.append(row)

    last = [row for row in rows if row["step"] == args.steps]
    table = format_table(last, ["network", "seed", "val_masked_mse", "train_seconds"])
    print(f"\nvisible mean: {baseline:.5f}\n{table}")
    save_csv(args.output, [row | setting for row in rows])
    plot(args.output.with_suffix(".png"), rows, baseline)


if __name__ == "__main__":
    main()
