"""Time and peak memory of segmenting one head of 256 x 256 x 180 voxels from file to file, against MONAI's SwinUNETR.

    OMP_NUM_THREADS=2 python -m benchmarks.speed.inference_time

The pipeline is the bundle's ``inference.json`` with its own settings, and only the network changes. So both read the
same file, work at the same spacing, with the same sliding window, precision, interpolation and writing, and give 18
channels. SwinUNETR is MONAI's with ``feature_size=24``, as released and with its ``use_flash_attention``. Weights are
random: neither time nor memory depends on them. The head is the MNI152 template of nilearn, resampled to 256 x 256 x
180 voxels of 1 mm, 16 bit; or ``--image``.

Each run is a process of its own: the peak of its memory (resident set, high-water mark) is its own, and the cost of the
first forward pass counts, as for a user. The time leaves out starting Python, importing and building the network, which
are shown apart; ``memory_at_start`` is what they leave resident. Contenders take turns, in an order drawn anew each
round, and ratios are of the same round. A row of the CSV file is one run; the printed table has medians and quartiles.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CHANNELS = 18
SWIN = {
    "_target_": "SwinUNETR",
    "in_channels": 1,
    "out_channels": CHANNELS,
    "feature_size": 24,
    "spatial_dims": 3,
}
NETWORKS = {"ours": None, "SwinUNETR": SWIN, "SwinUNETR, fused attention": SWIN | {"use_flash_attention": True}}
PRECISIONS = {"bf16": True, "fp32": False}
STEPS = ("reading", "preprocessing", "network", "postprocessing", "writing")

# ---------------------------------------------------------------------------------------------------------------------
# One run, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def run_once(image: str, output_dir: str, network: str, precision: str, device: str) -> dict[str, float]:
    """Seconds of each step, and memory in MiB."""
    started = time.perf_counter()
    import torch
    from monai.bundle import ConfigParser
    from monai.transforms import Compose

    from benchmarks.common import BUNDLE, parameters, synchronize

    config = ConfigParser()
    config.read_config(BUNDLE / "configs" / "inference.json")
    config["bundle_root"], config["device"] = str(BUNDLE), device
    config["dataset_dir"], config["output_dir"] = image, output_dir
    config["amp"] = PRECISIONS[precision]
    if NETWORKS[network] is not None:
        config["network_def"] = NETWORKS[network]
    module = config.get_parsed_content("network").eval()
    inferer = config.get_parsed_content("inferer")
    read, *preprocess = config.get_parsed_content("preprocessing")
    steps = [read, Compose([*preprocess, *config.get_parsed_content("resampling")])]
    invert, save = (Compose(config.get_parsed_content(key)) for key in ("invert", "save"))

    def predict(item: dict) -> dict:
        return item | {"pred": inferer(item["image"][None].to(device), module)[0]}

    (item,) = config.get_parsed_content("inputs")
    result = {"starting": time.perf_counter() - started, "memory_at_start": peak_memory()}
    with torch.no_grad():
        for name, step in zip(STEPS, (*steps, predict, invert, save), strict=True):
            begun = time.perf_counter()
            item = step(item)
            synchronize(device)
            result[name] = time.perf_counter() - begun
            result[f"peak_memory_{name}"] = peak_memory()  # up to here
    result |= {"total": sum(result[name] for name in STEPS), "peak_memory": peak_memory()}
    return result | {"parameters": parameters(module), "threads": torch.get_num_threads()}


def peak_memory() -> float:
    """Largest resident set of this process so far, MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; what getrusage says there may be that of the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 1024, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


# ---------------------------------------------------------------------------------------------------------------------


def write_head(path: Path, size: Sequence[int]) -> None:
    """The MNI152 template on a grid of ``size`` voxels of 1 mm around its middle, int16."""
    import nibabel as nib
    from nilearn.datasets import load_mni152_template
    from nilearn.image import resample_img

    template = load_mni152_template(resolution=1)
    middle = template.affine @ [*(np.array(template.shape) / 2), 1]
    affine = np.eye(4)
    affine[:3, 3] = middle[:3] - np.array(size) / 2
    head = resample_img(template, affine, size, copy_header=True, force_resample=True).get_fdata()
    nib.save(nib.Nifti1Image(np.rint(1000 * head / head.max()).clip(0).astype(np.int16), affine), path)


def run_in_process(arguments: Sequence[str]) -> dict[str, float]:
    """The result of this script called with ``--child``."""
    command = [sys.executable, "-m", "benchmarks.speed.inference_time", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[2:])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def plot(path: Path, rows: Sequence[dict], names: Sequence[str]) -> None:
    """Draw median seconds of the steps, stacked, and peak memory."""
    from matplotlib.figure import Figure

    from benchmarks.common import save_figure

    figure = Figure(figsize=(10, 0.5 * len(names) + 1.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    place, base = np.arange(len(names)), np.zeros(len(names))
    for step in STEPS:
        seconds = np.array([median(rows, name, step) for name in names])
        left.barh(place, seconds, left=base, label=step)
        base += seconds
    right.barh(place, [median(rows, name, "peak_memory") / 1024 for name in names], color="0.6")
    left.set_yticks(place, names)
    left.invert_yaxis()
    left.set_xlabel("seconds, median")
    right.set_xlabel("peak memory, GiB")
    left.legend(fontsize=8)
    save_figure(figure, path)


def median(rows: Sequence[dict], name: str, column: str) -> float:
    return float(np.median([row[column] for row in rows if row["contender"] == name]))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(run_once(*sys.argv[2:])))
        return
    from benchmarks.common import RESULTS, add_device, add_rounds, argument_parser, facts, prepare_machine, save_csv

    parser = argument_parser(__doc__, RESULTS / "inference_time.csv")
    add_rounds(parser, 5, warmup=1)
    add_device(parser)
    parser.add_argument("--image", type=Path, help="a NIfTI head (default: the MNI152 template, resampled)")
    parser.add_argument("--size", type=int, nargs=3, default=[256, 256, 180], help="voxels (default: 256 256 180)")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="default: all")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["bf16"], help="(default: bf16)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the runs (default: %(default)s)")
    args = parser.parse_args()
    prepare_machine(parser, args)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)

    contenders = {f"{name}, {precision}": (name, precision) for name in args.networks for precision in args.precisions}
    order, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        image = args.image or Path(folder, "head.nii.gz")
        if args.image is None:
            write_head(image, args.size)
        for i in range(-args.warmup, args.rounds):
            for name in order.sample(list(contenders), len(contenders)):
                output_dir = str(Path(folder, f"{i}_{list(contenders).index(name)}"))
                result = run_in_process([str(image), output_dir, *contenders[name], args.device])
                row = {"contender": name, "round": i, **{key: round(value, 3) for key, value in result.items()}}
                print("round {round}  {contender:34s} {total:.1f} s, {peak_memory:.0f} MiB".format(**row), flush=True)
                if i >= 0:
                    rows.append(row)
    report(rows, list(contenders))
    size = "x".join(str(side) for side in args.size) if args.image is None else args.image.name
    save_csv(args.output, [facts(args.device) | row | {"head": size, "order_seed": args.seed} for row in rows])
    plot(args.output.with_suffix(".png"), rows, list(contenders))


def report(rows: Sequence[dict], names: Sequence[str]) -> None:
    """Print medians and quartiles, and ratios to the first contender in the same round."""
    from sspformer.io import format_table

    def text(values: np.ndarray) -> str:
        q1, middle, q3 = np.percentile(values, [25, 50, 75])
        return f"{middle:.2f} [{q1:.2f}, {q3:.2f}]"

    def of(name: str, column: str) -> np.ndarray:
        return np.array([row[column] for row in rows if row["contender"] == name])

    def table(title: str, names: Sequence[str], over: str | None = None) -> None:
        columns = (*STEPS, "total", "peak_memory")
        lines = [
            {title: name} | {column: text(of(name, column) / (of(over, column) if over else 1)) for column in columns}
            for name in names
        ]
        if lines:
            print(f"\n{format_table(lines)}")

    table("median [quartiles], s and MiB", names)
    table(f"over {names[0]}", names[1:], names[0])


if __name__ == "__main__":
    main()
