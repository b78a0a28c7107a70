"""Fine-tuning with few labels and with all of them, from a pretrained encoder and from scratch: Dice on test subjects.

Runs the bundle's own workflows, as users do: `train.json`, then `evaluate.json`, for each task, number of labelled
subjects, start and seed. The same number of steps for all. A run that is complete is not repeated, one that was killed
goes on. Writes results/finetuning.csv (a row for each run and subject) and results/finetuning_summary.csv.

    python benchmarks/finetuning.py --data_dir ../shared/data --encoder bundle/models/pretrained/encoder.pt
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from _common import RESULTS, facts, print_table, write_csv

from sspformer.evaluation import bootstrap_interval

ROOT = Path(__file__).resolve().parent.parent
#: task: overlays, options for equal budgets, what is tested on
TASKS = {
    "brain_structures": {
        "overlays": [],
        "options": ["--batch_size", "2"],
        "steps": 200,
        "splits": {"training": ["train"], "validation": ["val"], "test": ["test"]},
    },
    "hippocampus": {
        "overlays": ["hippocampus"],
        "options": ["--batch_size", "4"],
        "steps": 60,
        "splits": {"training": ["fold0", "fold1", "fold2"], "validation": ["fold3"], "test": ["fold4"]},
    },
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with manifest.csv and the tasks' folders")
    parser.add_argument("--encoder", type=Path, required=True, help="pretrained encoder.pt")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--labels", nargs="+", default=["10", "all"], help="labelled training subjects")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--starts", nargs="+", default=["pretrained", "scratch"], choices=["pretrained", "scratch"])
    parser.add_argument("--steps", type=int, help="default: 200 for brain structures, 60 for the hippocampus")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "output" / "finetuning")
    return parser.parse_args()


def datalist(data_dir: Path, task: str, work_dir: Path) -> Path:
    """An MSD-style datalist of the task with the manifest's splits."""
    pairs = {}
    for name, splits in TASKS[task]["splits"].items():
        rows = [row for row in manifest(data_dir, f"{task}/images") if row["split"] in splits]
        pairs[name] = [
            {"image": row["file"], "label": row["file"].replace("/images/", "/labels/"), "subject": row["subject"]}
            for row in rows
        ]
    return write_datalist(work_dir / f"{task}.json", pairs, data_dir)


def manifest(data_dir: Path, folder: str) -> list[dict[str, str]]:
    """The rows of the manifest whose files are in a folder."""
    with (data_dir / "manifest.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["file"].startswith(f"{folder}/")]


def write_datalist(path: Path, items: dict[str, list[dict[str, str]]], data_dir: Path) -> Path:
    """A datalist whose paths are relative to itself, from paths relative to the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for item in (item for split in items.values() for item in split):
        for key in ("image", "label"):
            if key in item:
                item[key] = os.path.relpath(data_dir / item[key], path.parent)
    path.write_text(json.dumps(items, indent=1))
    return path


def bundle(run_id: str, config: str, overlays: list[str], options: list[str], log: Path) -> None:
    """One of the bundle's workflows in a process of its own; its messages go to a log."""
    configs = [f"configs/{name}.json" for name in [config, *overlays]]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(configs)]
    command += ["--meta_file", "configs/metadata.json", "--logging_file", "configs/logging.conf", *options]
    path = os.pathsep.join(filter(None, [str(ROOT / "custom"), os.environ.get("PYTHONPATH")]))
    with log.open("a") as file:
        result = subprocess.run(
            command, cwd=ROOT / "bundle", env={**os.environ, "PYTHONPATH": path}, stdout=file, stderr=file
        )
    if result.returncode:
        raise SystemExit(f"{run_id} failed, see {log}:\n{''.join(log.read_text().splitlines(True)[-5:])}")


def main() -> None:
    args = parse()
    args.data_dir, args.encoder, args.work_dir = (p.resolve() for p in (args.data_dir, args.encoder, args.work_dir))
    rows = []
    for task in args.tasks:
        setup = TASKS[task]
        lists = datalist(args.data_dir, task, args.work_dir)
        n_all = len(json.loads(lists.read_text())["training"])
        for labels in args.labels:
            n_labels = n_all if labels == "all" else int(labels)
            for seed in args.seeds:
                for start in args.starts:
                    name = f"{task}_{n_labels}_{start}_{seed}"
                    output = args.work_dir / name
                    output.mkdir(parents=True, exist_ok=True)
                    batch = int(setup["options"][setup["options"].index("--batch_size") + 1])
                    crops = max(1, round(50 * batch / n_labels))  # an epoch of about 50 steps, or of one crop a subject
                    steps_an_epoch = -(-n_labels * crops // batch)
                    epochs = max(1, round((args.steps or setup["steps"]) / steps_an_epoch))
                    options = [
                        *("--dataset_dir", str(lists), "--seed", str(seed)),
                        *("--pretrained", str(args.encoder) if start == "pretrained" else "null"),
                        *("--max_subjects", str(n_labels), "--crops_per_scan", str(crops), "--epochs", str(epochs)),
                        *("--val_interval", str(epochs), "--max_val_scans", "4"),
                        *("--cache_dir", str(args.work_dir / "cache"), "--output_dir", str(output)),
                        *setup["options"],
                    ]
                    print(f"{name}: {epochs * steps_an_epoch} steps", flush=True)
                    bundle("training", "train", setup["overlays"], options, output / "train.log")
                    scores = output / "evaluation" / "metrics.csv"
                    if not scores.is_file():
                        options = [
                            *("--dataset_dir", str(lists), "--weights", str(output / "models" / "model.pt")),
                            *("--output_dir", str(output / "evaluation"), "--max_pictures", "1"),
                            *("--additional_metrics", "{}"),  # Dice alone
                        ]
                        bundle("evaluating", "evaluate", setup["overlays"], options, output / "evaluate.log")
                    with scores.open(newline="") as file:
                        for subject in csv.DictReader(file):
                            rows.append(
                                {
                                    "task": task,
                                    "n_labels": n_labels,
                                    "start": start,
                                    "seed": seed,
                                    "steps": epochs * steps_an_epoch,
                                    **subject,
                                }
                            )
    write_csv(RESULTS / "finetuning.csv", rows)
    summary = summarise([row for row in rows if row["structure"] == "mean"])
    write_csv(RESULTS / "finetuning_summary.csv", [{**row, **facts()} for row in summary])
    print_table(list(summary[0]), [list(row.values()) for row in summary])


def summarise(rows: list[dict]) -> list[dict]:
    """Mean Dice of each arm over subjects and seeds, the seeds' own means, and the paired gain of pretraining."""
    table = []
    for task, n_labels in dict.fromkeys((row["task"], row["n_labels"]) for row in rows):
        means = {}
        for start in ("pretrained", "scratch"):
            own = [r for r in rows if (r["task"], r["n_labels"], r["start"]) == (task, n_labels, start)]
            seeds = sorted({row["seed"] for row in own})
            dice = np.array([[float(r["dice"]) for r in own if r["seed"] == seed] for seed in seeds])  # seeds, subjects
            if not len(own):
                continue
            means[start] = dice.mean(axis=0)
            table.append(
                {
                    "task": task,
                    "n_labels": n_labels,
                    "start": start,
                    "subjects": dice.shape[1],
                    "dice": round(float(dice.mean()), 4),
                    "of_each_seed": " ".join(f"{value:.4f}" for value in dice.mean(axis=1)),
                    **interval(dice.mean(axis=0)),
                }
            )
        if len(means) == 2:
            gain = means["pretrained"] - means["scratch"]
            table.append(
                {
                    "task": task,
                    "n_labels": n_labels,
                    "start": "pretrained - scratch",
                    "subjects": len(gain),
                    "dice": round(float(gain.mean()), 4),
                    "of_each_seed": "",
                    **interval(gain),
                }
            )
    return table


def interval(scores: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(scores)
    return {"dice_low": round(low, 4), "dice_high": round(high, 4)}


if __name__ == "__main__":
    main()
