"""Random masking against inverse frequency projection masking: the same pretraining run with beta = 0 and with a
scheduled beta.

Runs the bundle's own workflow, ``monai.bundle run training`` on ``pretrain.json``, once an arm and seed, and gathers
the validation of every run. All arms are validated on the same held-out subjects with the same uniform masks and the
same noise, so their errors can be compared; the high-frequency error is that of the quarter of the masked patches with
the highest energy.

    python benchmarks/pretraining_curves.py --data_dir ../shared/data --work output/curves

Data: the manifest's train split of ``brain_structures`` and ``heads`` for training, the val split for validation; no
test subject is read. A run that is there already is not repeated, one that was killed goes on where it stopped. Writes
``results/pretraining_curves.csv`` (one row a validation), ``results/pretraining_summary.csv`` (last validation, mean
and range over seeds) and ``results/pretraining_curves.png``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _common import RESULTS, write_csv
from _restoration import DATA

HERE = Path(__file__).resolve().parent
BUNDLE = HERE.parent / "bundle"
ARMS = {
    "random (beta 0)": ["--beta", "0.0"],
    "scheduled beta 0 to 1": ["--beta", "1.0"],
    "scheduled beta 0 to 1, hints": ["--beta", "1.0", "--mask#hints", "0.05"],
    "scheduled beta 0 to 0.5": ["--beta", "0.5"],
    "scheduled beta 0 to 3": ["--beta", "3.0"],
}
METRICS = ["masked_error", "high_frequency_error", "psnr", "ssim", "mean_prediction_error"]


def write_datalist(data: Path, path: Path) -> None:
    """MSD-style datalist of the manifest's splits."""
    lists: dict[str, list[dict]] = {"training": [], "validation": []}
    with (data / "manifest.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            folder = row["file"].split("/")[0]
            split = {"train": "training", "val": "validation"}.get(row["split"])
            if split and (row["file"].startswith("brain_structures/images/") or folder == "heads"):
                lists[split].append({"image": str((data / row["file"]).resolve()), "subject": row["subject"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(lists, indent=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=DATA, help="folder with manifest.csv")
    parser.add_argument("--work", type=Path, default=HERE.parent / "output" / "curves", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--crops_per_scan", type=int, default=1)
    parser.add_argument("--image_size", type=int, default=64, help="side of the crops, voxels")
    parser.add_argument("--arms", nargs="*", default=list(ARMS)[:4], choices=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its share of the cores")
    args = parser.parse_args()
    if not (args.data_dir / "manifest.csv").is_file():
        parser.error(f"no manifest.csv in {args.data_dir}: give the folder of the shared data with --data_dir")
    settings = {name: str(getattr(args, name)) for name in ("epochs", "crops_per_scan", "image_size")}
    record = args.work / "settings.json"
    if record.is_file() and json.loads(record.read_text()) != settings:
        parser.error(f"{args.work} has runs with other settings ({record.read_text()}): give another --work")
    write_datalist(args.data_dir, args.work / "datalist.json")
    record.write_text(json.dumps(settings))

    runs = [(arm, seed) for seed in range(args.seeds) for arm in args.arms]
    with ThreadPoolExecutor(args.jobs) as pool:
        histories = list(pool.map(lambda run: train(*run, args), runs))
    rows = []
    for (arm, seed), history in zip(runs, histories):
        for row in history:
            if row.get("masked_error"):
                rows.append({"arm": arm, "seed": seed, **{k: row[k] for k in ["epoch", "iteration", "beta", *METRICS]}})

    write_csv(RESULTS / "pretraining_curves.csv", rows)
    summary = summarise(rows, args)
    write_csv(RESULTS / "pretraining_summary.csv", summary)
    plot(rows, args.arms, RESULTS / "pretraining_curves.png")
    for row in summary:
        print(row)


def train(arm: str, seed: int, args: argparse.Namespace) -> list[dict[str, str]]:
    """One run of the bundle's workflow, unless it is there already; returns its history."""
    output = args.work.resolve() / f"{re.sub('[^a-z0-9]+', '_', arm)}_seed{seed}"
    history = read_history(output)
    if not history or int(float(history[-1]["epoch"])) < args.epochs:
        print(f"{arm}, seed {seed}: log in {output.name}/log.txt", flush=True)
        command = [sys.executable, "-m", "monai.bundle", "run", "training"]
        command += ["--config_file", str(BUNDLE / "configs/pretrain.json"), "--bundle_root", str(BUNDLE)]
        command += ["--dataset_dir", str((args.work / "datalist.json").resolve()), "--output_dir", str(output)]
        command += ["--cache_dir", str(args.work.resolve() / "cache"), "--epochs", str(args.epochs)]
        command += ["--image_size", json.dumps([args.image_size] * 3), "--crops_per_scan", str(args.crops_per_scan)]
        command += ["--val_interval", str(max(1, args.epochs // 20)), "--seed", str(seed), *ARMS[arm]]
        threads = str(max(1, len(os.sched_getaffinity(0)) // args.jobs))
        output.mkdir(parents=True, exist_ok=True)
        with (output / "log.txt").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": threads}
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return read_history(output)


def read_history(output: Path) -> list[dict[str, str]]:
    path = output / "history.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summarise(rows: list[dict], args: argparse.Namespace) -> list[dict]:
    """Last validation of each arm: mean, lowest and highest over the seeds."""
    summary = []
    for arm in args.arms:
        last = {row["seed"]: row for row in rows if row["arm"] == arm}.values()  # rows are in order of epochs
        line = {"arm": arm, "runs": len(last), "epochs": args.epochs, "image_size": args.image_size}
        for metric in METRICS:
            values = [float(row[metric]) for row in last]
            line[metric] = f"{statistics.mean(values):.5g}"
            line[f"{metric}_low"], line[f"{metric}_high"] = f"{min(values):.5g}", f"{max(values):.5g}"
        summary.append(line)
    return summary


def plot(rows: list[dict], arms: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained", facecolor="white")
    titles = {"masked_error": "error of all masked patches", "high_frequency_error": "error of high-frequency patches"}
    for axis, (metric, title) in zip(figure.subplots(1, 2), titles.items()):
        for color, arm in enumerate(arms):
            for seed in sorted({row["seed"] for row in rows}):
                run = [row for row in rows if row["arm"] == arm and row["seed"] == seed]
                x, y = [float(row["iteration"]) for row in run], [float(row[metric]) for row in run]
                axis.plot(x, y, color=f"C{color}", alpha=0.8, label=arm if seed == 0 else None)
        floor = [float(row["mean_prediction_error"]) for row in rows]
        if metric == "masked_error":
            axis.axhline(statistics.mean(floor), color="gray", linestyle=":", label="predicting the mean")
        axis.set_title(f"{title}, held-out subjects, uniform masks", fontsize=9)
        axis.set_xlabel("iteration")
        axis.set_ylabel("mean squared error, intensities in [0, 1]")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
