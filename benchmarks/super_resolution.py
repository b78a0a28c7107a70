"""Super-resolution of held-out heads, x2 and x4, against zero-filling, cubic interpolation, a U-Net and MONAI's
Restormer.

    python benchmarks/super_resolution.py --data ../shared/data --train_peers --minutes 30
    python benchmarks/super_resolution.py --data ../shared/data

The first command trains the peers and stops, the second evaluates. Scans: those of the test split of ``heads`` in the
manifest whose voxels have no side above 1.5 mm. A scan is acquired again with a half or a quarter of the k-space lines,
along all axes (``isotropic``) or along the third axis of RAS, inferior to superior, alone (``through-plane``, as in a
stack of thick slices): :func:`sspformer.kspace.fourier_resample` down. No noise is added. The whole scan is brought
back to its own grid by

- ``zero-filled``: ``fourier_resample`` up, sinc interpolation;
- ``cubic``: scipy's cubic spline at the same places (voxel 0 stays where it is, so no half-voxel shift);

and the networks restore the zero-filled region around the middle of the head (``--region``), which is what is
compared. All run through the bundle's scaling and sliding window:

- ``ours``: the bundle's weights (``--weights``), trained as their documentation says, for longer than the next ones;
- ``ours, same budget``, ``U-Net``, ``Restormer``: trained by ``--train_peers`` for ``--minutes`` of wall-clock time
  each on the same scans (``--train_data``), with the bundle's crops, batch size, augmentation, degradation, loss,
  autocast and clipping, AdamW and a cosine over the time. All predict a residual that starts at 0. Ours starts
  from the pretrained encoder if ``--encoder`` names one, else from scratch; the peers always from scratch. U-Net:
  MONAI's, 4 scales, 32 to 256 channels, no normalisation layers, 4.7 M parameters, a step half as long as ours.
  Restormer: MONAI's is by far the slowest on a CPU (grouped 3D convolutions), so it is small, 8 channels and 3 scales,
  0.2 M parameters, and a step still takes about ten times as long as ours: at equal time it sees a tenth of the crops.

Rows: a scan, degradation and method; PSNR and SSIM over the region and over its foreground (brighter than the scan's
mean). ``super_resolution_summary.csv``: means and 95 % intervals over subjects.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _common import facts, parameters, prepare_machine, stopwatch, synchronize, write_csv
from _restoration import (
    ROOT,
    bundle_config,
    central_region,
    load_clean,
    load_weights,
    manifest_scans,
    picture,
    print_summary,
    quality,
    restoration_parser,
    restore,
    summarize,
)
from monai.bundle import ConfigParser
from monai.networks.nets import UNet
from monai.networks.nets.restormer import Restormer
from monai.utils import set_determinism
from scipy.ndimage import affine_transform
from torch import Tensor, nn

from sspformer.kspace import fourier_resample
from sspformer.networks import load_pretrained

DEGRADATIONS = {
    f"{pattern} x{factor}": axes
    for factor in (2, 4)
    for pattern, axes in (("isotropic", (factor,) * 3), ("through-plane", (1, 1, factor)))
}
SAME_BUDGET = "ours, same budget"
TRAINED = (SAME_BUDGET, "U-Net", "Restormer")
LEARNING_RATE = {SAME_BUDGET: 1e-3, "U-Net": 3e-4, "Restormer": 3e-4}  # Restormer's is its paper's
MAX_SPACING = 1.5  # mm: a quarter of the lines of a thick slice is no scan


class Residual(nn.Module):
    """A network with a head like that of ours: a 1 x 1 x 1 convolution that starts at 0 makes an image of its features,
    and the input is added. (MONAI's Restormer leaves out the sum that its paper has.)
    """

    def __init__(self, network: nn.Module, features: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Conv3d(features, 1, kernel_size=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.head(self.network(image))


def make_network(name: str, config: ConfigParser, encoder: Path | None = None) -> nn.Module:
    """One of ``TRAINED``, before training."""
    if name == "U-Net":
        scales = {"channels": (32, 64, 128, 256), "strides": (2, 2, 2), "num_res_units": 2}
        return Residual(UNet(3, 1, 16, **scales, norm=None), features=16)
    if name == "Restormer":
        scales = {"dim": 8, "num_blocks": (1, 1, 1), "heads": (1, 2, 4), "num_refinement_blocks": 1}
        return Residual(Restormer(3, 1, 16, **scales), features=16)
    return load_pretrained(config.get_parsed_content("network_def"), encoder)


# ---------------------------------------------------------------------------------------------------------------------
# Training at one budget
# ---------------------------------------------------------------------------------------------------------------------


def train(name: str, args: argparse.Namespace) -> None:
    """Trains for ``args.minutes`` and saves the weights, and how it went, in ``args.work``."""
    set_determinism(args.seed)
    config = bundle_config("train", "super_resolution", args.device)
    config["dataset_dir"], config["output_dir"] = str(args.train_data), str(args.work)
    network = make_network(name, config, args.encoder).to(args.device).train()
    loader = config.get_parsed_content("train#dataloader")
    prepare_batch = config.get_parsed_content("prepare_batch")
    loss_function, inferer = (config.get_parsed_content(key) for key in ("loss_function", "train#inferer"))
    max_norm = config.get_parsed_content("max_grad_norm")
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE[name], weight_decay=config["weight_decay"])

    for _ in loader:  # fill the cache, which the contenders share; off the clock
        pass
    losses, start = [], time.perf_counter()
    while (share := (time.perf_counter() - start) / (60 * args.minutes)) < 1:
        for batch in loader:
            for group in optimizer.param_groups:
                warmup = min(1.0, share / 0.05 + 0.05)
                group["lr"] = LEARNING_RATE[name] * warmup * 0.5 * (1 + math.cos(math.pi * min(share, 1)))
            degraded, target, *_ = prepare_batch(batch, args.device)
            loss = loss_function(inferer(degraded, network), target)
            optimizer.zero_grad()
            loss.backward()
            if nn.utils.clip_grad_norm_(network.parameters(), max_norm).isfinite():
                optimizer.step()
            losses.append(loss.item())
            share = (time.perf_counter() - start) / (60 * args.minutes)
            if len(losses) % 50 == 0:
                print(f"{name}  step {len(losses)}  {share:.0%}  gain {-np.mean(losses[-50:]):.2f} dB", flush=True)
            if share >= 1:
                break
    synchronize(args.device)
    record = {"steps": len(losses), "train_minutes": round((time.perf_counter() - start) / 60, 2)}
    record |= {"parameters": parameters(network), "train_seed": args.seed, "encoder": args.encoder is not None}
    record["gain_last_steps"] = round(-float(np.mean(losses[-50:])), 3)
    torch.save(network.state_dict(), weights_of(name, args))
    weights_of(name, args).with_suffix(".json").write_text(json.dumps(record, indent=4))
    print(f"{name}: {record}")


def weights_of(name: str, args: argparse.Namespace) -> Path:
    """Where the weights of one of ``TRAINED`` are."""
    return args.work / f"{name.replace(', ', '_').replace(' ', '_')}.pt"


def write_datalist(args: argparse.Namespace) -> Path:
    """The manifest's heads of the train split, as MSD-style JSON file."""
    scans = manifest_scans(args.data, "train")
    items = [{"image": str(Path(scan["image"]).resolve()), "subject": scan["subject"]} for scan in scans]
    path = args.work / "datalist.json"
    path.write_text(json.dumps({"training": items[: args.max_scans], "validation": []}))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def cubic(low: Tensor, size: tuple[int, ...]) -> Tensor:
    """Cubic spline interpolation of ``(1, *s)`` on the grid of :func:`fourier_resample`, ``(1, *size)``."""
    step = np.array(low.shape[1:]) / np.array(size)
    fine = affine_transform(low[0].numpy(), step, output_shape=size, order=3, mode="nearest")
    return torch.from_numpy(fine)[None]


def make_networks(args: argparse.Namespace) -> dict[str, tuple[nn.Module, dict]]:
    """Networks with trained weights, and what is known of their training; the ones without weights are named."""
    config = bundle_config("inference", "super_resolution", args.device)
    networks = {"ours": (load_weights(config.get_parsed_content("network_def"), args.weights), {})}
    for name in TRAINED:
        path = weights_of(name, args)
        if path.is_file():
            record = json.loads(path.with_suffix(".json").read_text())
            networks[name] = (load_weights(make_network(name, config), path), record)
        else:
            print(f"{name} is left out: no {path}, train it with --train_peers")
    return {name: (network.to(args.device), record) for name, (network, record) in networks.items()}


def evaluate(args: argparse.Namespace) -> None:
    networks = make_networks(args)
    inferer = bundle_config("inference", "super_resolution", args.device).get_parsed_content("inferer")
    setting = {"seed": args.seed, **facts(args.device)}
    rows, pictured = [], []
    for scan in manifest_scans(args.data, "test", MAX_SPACING)[: args.max_scans]:
        clean, foreground = load_clean(scan["image"])
        region = central_region(foreground, args.region)
        size = tuple(clean.shape[1:])
        name_of_scan = Path(scan["file"]).name.removesuffix(".nii.gz")
        for degradation in args.degradations:
            lines = [round(side / factor) for side, factor in zip(size, DEGRADATIONS[degradation], strict=True)]
            low = fourier_resample(clean[None], lines)
            zero_filled = fourier_resample(low, size)[0]
            methods: dict[str, Callable[[], Tensor]] = {
                "zero-filled": lambda: fourier_resample(low, size)[0][region],  # noqa: B023
                "cubic": lambda: cubic(low[0], size)[region],  # noqa: B023
            }
            for name, (network, _) in networks.items():
                methods[name] = lambda network=network: restore(zero_filled[region], network, inferer, args.device)  # noqa: B023
            images = {}
            for name, method in methods.items():
                seconds = stopwatch(lambda: images.update({name: method()}), args.device)  # noqa: B023
                row = {"scan": name_of_scan, "subject": scan["subject"], "contrast": scan["contrast"]}
                row |= {"degradation": degradation, "method": name}
                row |= quality(images[name], clean[region], foreground[region])
                row |= {"seconds": round(seconds, 2), "region": "x".join(str(side) for side in images[name].shape[1:])}
                rows.append(row | networks.get(name, (None, {}))[1] | setting)
                print(
                    "{scan}  {degradation:16s}  {method:18s} {psnr:.2f} dB  SSIM {ssim:.4f}".format(**row), flush=True
                )
            if name_of_scan == args.pictured and degradation in ("isotropic x2", "through-plane x4"):
                pictured.append((f"{name_of_scan}\n{degradation}", clean[region], images))
        write_csv(args.output, rows)

    summary = summarize(rows, ("degradation", "method"), "zero-filled", args.seed)
    print_summary(summary, ("degradation", "method"))
    write_csv(args.output.with_name(f"{args.output.stem}_summary.csv"), summary)
    plot(args.output.with_suffix(".png"), summary)
    if pictured:
        picture(args.output.with_name(f"{args.output.stem}_images.png"), pictured, coronal=True)


def plot(path: Path, summary: list[dict]) -> None:
    """Gain in PSNR over zero-filling, with the intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    degradations = list(dict.fromkeys(line["degradation"] for line in summary))
    names = [name for name in dict.fromkeys(line["method"] for line in summary) if name != "zero-filled"]
    for panel, metric in zip(panels, ("gain_psnr", "gain_psnr_foreground"), strict=True):
        for i, name in enumerate(names):
            lines = [line for line in summary if line["method"] == name]
            mean, low, high = (
                np.array([line[f"{metric}_{part}"] for line in lines]) for part in ("mean", "ci_low", "ci_high")
            )
            place = np.arange(len(lines)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
            panel.bar(place, mean, 0.8 / len(names), yerr=[mean - low, high - mean], capsize=2, label=name)
        panel.set_xticks(range(len(degradations)), degradations, fontsize=8)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_title("foreground" if "foreground" in metric else "region")
        panel.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("PSNR over zero-filling, dB")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"written to {path}")


def main() -> None:
    parser = restoration_parser(__doc__, "super_resolution")
    parser.add_argument("--degradations", nargs="+", choices=list(DEGRADATIONS), default=list(DEGRADATIONS))
    parser.add_argument("--train_peers", action="store_true", help="train the networks of --networks, and stop")
    parser.add_argument("--networks", nargs="+", choices=TRAINED, default=list(TRAINED), help="to train; default: all")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training for each (default: %(default)s)")
    parser.add_argument("--encoder", type=Path, help=f"pretrained encoder that '{SAME_BUDGET}' starts from")
    parser.add_argument(
        "--train_data",
        type=Path,
        help="what to train on, as the bundle's dataset_dir: a folder or a JSON list (default: the manifest's heads of "
        "the train split)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "output" / "super_resolution_peers",
        help="folder of the trained networks (default: %(default)s)",
    )
    parser.add_argument("--pictured", default="openms-cross_patient26_FLAIR", help="scan shown in the picture")
    args = parser.parse_args()
    prepare_machine(parser, args)
    if args.train_peers:
        args.work.mkdir(parents=True, exist_ok=True)
        args.train_data = args.train_data or write_datalist(args)
        for name in args.networks:
            train(name, args)
    else:
        evaluate(args)


if __name__ == "__main__":
    main()
