"""The study: does the pretraining help, and do its masks and its noise? Protocol and results: docs/study.md.

Runs the bundle's own workflows, as users do, and says what it is doing; a complete run is not repeated, a killed one
goes on where it stopped. A run is known by its folder, which has the arm, labels, steps and seed in its name: who
changes another setting in this file removes the folders that it concerns.

    python benchmarks/study.py --data_dir ../shared/data

- ``pretrain``: `pretrain.json` for each arm and seed, at equal time;
- ``segment``: `train.json` from each arm's encoder (or from scratch, or with a peer in the network's place), for each
  task and number of labelled subjects, at equal steps (peers: equal time), then `evaluate.json` on the test subjects;
- ``restore``: `train.json` with the overlay of denoising or super-resolution, likewise, then `denoising.py` or
  `super_resolution.py` on the test scans;
- ``robustness``: `evaluate.json` again, on test scans with artifacts;
- ``report``: the rows of what is complete are put into the published ones, ``results/study_*.csv``, in place of those
  of the same runs; from all of them tables with intervals, in ``results`` and in the page, and the picture. Needs
  neither data nor runs. Who starts a study of other data, or with other settings, removes the published rows.

``--jobs`` runs at a time, each with its share of the CPU cores, in the order of the protocol: all of one seed before
the next. ``--full``: every arm with every number of labels, as the protocol wants it where there is a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from _common import RESULTS, print_table, write_csv
from _restoration import CONFIGS, DATA, ROOT, training_scans
from scipy import stats

from sspformer.io import write_atomically


def torchio(name: str, **options) -> dict[str, object]:
    """A transform of TorchIO in a config."""
    return {"_target_": "artifacts.TorchIOd", "keys": "image", "name": name, **options}


#: arm of the pretraining: options of pretrain.json, and its epochs over those of the others (hard: for equal time)
ARMS: dict[str, tuple[list[str], float]] = {
    "random": (["--beta", "0.0"], 1.0),
    "scheduled": (["--beta", "0.5"], 1.0),
    "hard": ([str(CONFIGS / "hard_patches.json"), "--beta", "0.5", "--beta_warmup_share", "1.0"], 0.7),
    "constant": (["--beta", "0.5", "--beta_warmup_share", "0.0"], 1.0),
    "hints": (["--beta", "0.5", "--mask#hints", "0.05"], 1.0),
    "falling": ([str(CONFIGS / "falling_beta.json"), "--beta", "0.5"], 1.0),
    "random_clean": (["--beta", "0.0", "--noise", "null"], 1.0),
    "scheduled_clean": (["--beta", "0.5", "--noise", "null"], 1.0),
    "random_long": (["--beta", "0.0"], 7.5),
    "scheduled_long": (["--beta", "0.5"], 7.5),
}
LONG = ("random_long", "scheduled_long")  # pretrained with seed 0 alone; fine-tuned with every seed
ONCE = ("hard", "constant", "hints", "falling")  # in the reduced matrix with seed 0 alone, as the peers are
PRETRAINING = (
    {"training": ["train"], "validation": ["val"]},
    ["heads/", "brain_structures/images/"],
)  # splits, folders
EPOCHS, CROP = 40, 64  # of the pretraining: 800 steps of 8 crops
#: peers of the segmentation, from scratch: time of a step over ours, which divides the number of steps
PEERS = {
    "segresnet": {"brain_structures": 1.25, "hippocampus": 1.36},
    "swinunetr": {"brain_structures": 5.0, "hippocampus": 3.4},
    "unetr": {"brain_structures": 1.6, "hippocampus": 2.7},
}
STAGES = ("pretrain", "segment", "restore", "robustness", "report")
MAIN = ("scratch", *LONG)  # on every task; the other arms, in the reduced matrix, on one
SHORT_TASK = "denoising"
ROBUSTNESS = ("hippocampus", 126)  # what the scans with artifacts are segmented by
#: differences that are reported; True: primary, they count in the correction for the number of comparisons
COMPARISONS = (
    ("scheduled_long", "scratch", True),
    ("scheduled_long", "random_long", True),
    ("random_long", "scratch", False),
    ("random", "scratch", False),
    ("scheduled", "scratch", False),
    ("scheduled", "random", False),
    ("hard", "random", False),
    ("constant", "random", False),
    ("hints", "random", False),
    ("falling", "random", False),
    ("falling", "scheduled", False),
    ("random", "random_clean", False),
    ("scheduled", "scheduled_clean", False),
    ("scheduled_clean", "random_clean", False),
    ("random_long", "random", False),
    ("scheduled_long", "scheduled", False),
    *((peer, "scratch", False) for peer in (*PEERS, "unet", "restormer", "cubic")),
)
N_PRIMARY = 16  # the primary two, for 6 numbers of labels of segmentation, denoising and super-resolution
SEEDS = (0, 1, 2)
PAGE = ROOT / "docs" / "study.md"  # of the tables and the picture of the report
TASKS = {
    # crops a step, steps, numbers of labelled subjects
    "brain_structures": {
        "overlays": [],
        "batch": 2,
        "steps": 800,
        "labels": (5, 20, 110),
        "splits": {"training": ["train"], "validation": ["val"], "test": ["test"]},
    },
    "hippocampus": {
        "overlays": ["hippocampus"],
        "batch": 4,
        "steps": 400,
        "labels": (10, 50, 126),
        "splits": {"training": ["fold0", "fold1", "fold2"], "validation": ["fold3"], "test": ["fold4"]},
    },
}

LEVELS = (0.01, 0.05, 0.09, 0.15)  # of the Rician noise, of the range up to the 99.5th percentile
DEGRADATIONS = ("isotropic x2", "isotropic x4")
#: restoration: options of the training, an epoch of ours, and of the evaluation
RESTORATION = {
    "denoising": (
        {"epochs": 4, "crops_per_scan": 8},
        ["--levels", *map(str, LEVELS), "--peers", "--region", "48", "48", "40"],
    ),
    "super_resolution": (
        {"epochs": 3, "crops_per_scan": 64},
        ["--degradations", *DEGRADATIONS, "--region", "64", "64", "40"],
    ),
}
#: how many degradations a task is evaluated on
N_DEGRADATIONS = {"denoising": len(LEVELS), "super_resolution": len(DEGRADATIONS)}
#: peers of the restoration: time of a step over ours, which divides the number of crops a scan, of which one is left
RESTORATION_PEERS = {
    "unet": {"denoising": 0.95, "super_resolution": 0.97},
    "restormer": {"denoising": 13.4, "super_resolution": 12.9},
}

EVERY = ("scratch", *ARMS, *PEERS, *RESTORATION_PEERS, "cubic")  # the order of the tables

#: artifacts of the test scans; those of TorchIO are made otherwise than any that our training draws
ARTIFACTS = {
    "ghosting": torchio("RandomGhosting", num_ghosts=[4, 4], axes=[1], intensity=[1.0, 1.0]),
    "motion": torchio("RandomMotion", degrees=[4.0, 8.0], translation=[4.0, 8.0], num_transforms=2),
    "bias field": torchio("RandomBiasField", coefficients=[-0.5, 0.5], order=3),
    "spikes": torchio("RandomSpike", num_spikes=[2, 2], intensity=[0.5, 0.5]),
    "noise": {"_target_": "RandRicianNoised", "keys": "image", "prob": 1.0, "std": 0.08, "sample_std": False},
    "low resolution": {
        "_target_": "sspformer.transforms.RandReducedResolutiond",
        "keys": "image",
        "prob": 1.0,
        "factor": [2.5, 2.5],
    },
    "contrast": {"_target_": "RandAdjustContrastd", "keys": "image", "prob": 1.0, "gamma": [2.0, 2.0]},
}
#: the scaling of the bundle, which a scan with an artifact goes through like any other
RESCALING = {
    "_target_": "sspformer.transforms.ScaleByPercentilesd",
    "keys": "image",
    "lower": 0.5,
    "upper": 99.5,
}
#: the artifacts of a scan are the same for every network
ARTIFACT_OVERLAY = {"+initialize": ["$monai.utils.set_determinism(seed=0)"]}


@dataclass(frozen=True)
class Cell:
    """A run of the matrix: what it is called, whether it is complete, and how it is done."""

    name: str
    complete: Callable[[], bool]
    run: Callable[[], None]


class Study:
    """Where the study's data and runs are.

    Args:
        data_dir: folder with manifest.csv and the tasks' folders.
        work_dir: folder of the runs.
        jobs: runs at a time, which share the CPU cores.
    """

    def __init__(self, data_dir: Path, work_dir: Path, jobs: int) -> None:
        self.data_dir, self.work_dir = data_dir.resolve(), work_dir.resolve()
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs)

    # -- data ---------------------------------------------------------------------------------------------------------

    @cached_property
    def manifest(self) -> list[dict[str, str]]:
        """Rows of manifest.csv.

        Raises:
            SystemExit: if there is no such file.
        """
        file = self.data_dir / "manifest.csv"
        if not file.is_file():
            raise SystemExit(f"no manifest.csv in {self.data_dir}: give the folder of the shared data with --data_dir")
        with file.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))

    def datalist(
        self, name: str, splits: dict[str, Sequence[str]], folders: Sequence[str], files: Collection[str] | None = None
    ) -> Path:
        """MSD-style datalist of the manifest's rows in some folders, or of some files of them; labels where there are
        any."""
        items = {}
        for section, wanted in splits.items():
            rows = [row for row in self.manifest if row["split"] in wanted and row["file"].startswith(tuple(folders))]
            items[section] = [self._item(row) for row in rows if files is None or row["file"] in files]
        return keep(self.work_dir / f"{name}.json", json.dumps(items, indent=1))

    def _item(self, row: dict[str, str]) -> dict[str, str]:
        file = Path(row["file"])
        # "sub-07" is another person in another dataset
        subject = f"{file.name.split('_')[0]}_{row['subject']}" if file.parts[0] == "heads" else row["subject"]
        item = {"image": os.path.relpath(self.data_dir / file, self.work_dir), "subject": subject}
        label = self.data_dir / row["file"].replace("/images/", "/labels/")
        if "/images/" in row["file"] and label.is_file():
            item["label"] = os.path.relpath(label, self.work_dir)
        return item

    # -- workflows ----------------------------------------------------------------------------------------------------

    def bundle(self, run_id: str, config: str, overlays: Sequence[str], options: Sequence[str], output: Path) -> None:
        """One of the bundle's workflows in a process of its own; messages and seconds go to its output folder."""
        output.mkdir(parents=True, exist_ok=True)
        log = output / f"{config}.log"
        files = [str(file) if Path(file).suffix else f"configs/{file}.json" for file in (config, *overlays)]
        command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(files)]
        command += ["--meta_file", "configs/metadata.json", "--logging_file", "configs/logging.conf"]
        command += [*options, "--output_dir", str(output)]
        start = time.perf_counter()
        self.process(command, log)
        with (output / "seconds.csv").open("a") as file:
            file.write(f"{config},{time.perf_counter() - start:.0f}\n")

    def process(self, command: Sequence[str | Path], log: Path) -> None:
        """A command in the bundle's folder, on this run's share of the cores; its messages go to a file."""
        path = [str(ROOT / "custom"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": str(self.threads)}
        with log.open("a") as file:
            result = subprocess.run(
                command, cwd=ROOT / "bundle", env={**os.environ, **variables}, stdout=file, stderr=file
            )
        if result.returncode:
            raise RuntimeError(f"it failed, see {log}:\n{''.join(log.read_text().splitlines(True)[-5:])}")

    def pretrain(self, arm: str, seed: int) -> Cell:
        """The pretraining of an arm."""
        options, share = ARMS[arm]
        overlays, options = [o for o in options if o.endswith(".json")], [o for o in options if not o.endswith(".json")]
        epochs = round(EPOCHS * share)
        output = self.work_dir / "pretrain" / f"{arm}_{seed}"

        def run() -> None:
            lists = self.datalist("pretrain", *PRETRAINING)
            fixed = {
                "dataset_dir": lists,
                "cache_dir": self.work_dir / "cache",
                "image_size": [CROP] * 3,
                "crops_per_scan": 1,
                "epochs": epochs,
                "val_interval": max(1, epochs // 4),
                "learning_rate": 0.001,
                "seed": seed,
            }
            self.bundle("training", "pretrain", overlays, [*as_options(fixed), *options], output)

        def complete() -> bool:  # a run writes its encoder after the last row of its history
            history, encoder = output / "history.csv", output / "models" / "pretrained" / "encoder.pt"
            written = encoder.is_file() and encoder.stat().st_mtime >= history.stat().st_mtime
            return epochs_done(output) >= epochs and written

        return Cell(f"pretrain {arm} {seed}", complete, run)

    def segment(self, task: str, n_labels: int, start: str, seed: int) -> Cell:
        """Fine-tuning from an arm's encoder, from ``scratch``, or of a peer; then Dice on the test subjects."""
        setup, output = TASKS[task], self.run_of(task, n_labels, start, seed)
        peer = start in PEERS
        steps = round(setup["steps"] / PEERS[start][task]) if peer else setup["steps"]
        overlays = [*setup["overlays"], *([CONFIGS / f"{start}.json"] if peer else [])]

        def run() -> None:
            options = {"pretrained": self.encoder(start, seed), "max_val_scans": 4}
            self.fine_tune(task, n_labels, seed, steps, overlays, options, output)
            self.evaluate(task, overlays, output, output / "evaluation")

        return Cell(f"segment {task} {n_labels} {start} {seed}", (output / "evaluation" / "metrics.csv").is_file, run)

    def fine_tune(
        self,
        task: str,
        n_labels: int,
        seed: int,
        steps: int,
        overlays: Sequence[str | Path],
        options: dict[str, object],
        output: Path,
    ) -> None:
        """Trains for a segmentation, about so many steps, and validates at the end."""
        crops, epochs = schedule(task, n_labels, steps)
        if epochs_done(output) >= epochs:
            return
        options = {
            "dataset_dir": self.labelled(task),
            "seed": seed,
            "batch_size": TASKS[task]["batch"],
            "max_subjects": n_labels,
            "crops_per_scan": crops,
            "epochs": epochs,
            "val_interval": epochs,
            "cache_dir": self.work_dir / "cache",
            **options,
        }
        self.bundle("training", "train", overlays, as_options(options), output)

    def restore(self, task: str, start: str, seed: int) -> Cell:
        """Training for denoising or super-resolution, from an arm's encoder, from ``scratch``, or of a peer; then PSNR
        on the test scans."""
        settings, evaluation = RESTORATION[task]
        peer = start in RESTORATION_PEERS
        crops = settings["crops_per_scan"]
        crops = max(1, round(crops / RESTORATION_PEERS[start][task])) if peer else crops
        output = self.work_dir / f"{task}_{settings['epochs']}" / f"{start}_{seed}"

        def run() -> None:
            if epochs_done(output) < settings["epochs"]:
                options = {
                    **settings,
                    "dataset_dir": self.restoration_list(task),
                    "seed": seed,
                    "pretrained": self.encoder(start, seed),
                    "crops_per_scan": crops,
                    "val_interval": settings["epochs"],
                    "max_val_scans": 3,
                    "cache_dir": self.work_dir / "cache",
                }
                overlays = [task, *([CONFIGS / f"{start}.json"] if peer else [])]
                self.bundle("training", "train", overlays, as_options(options), output)
            script = [sys.executable, ROOT / "benchmarks" / f"{task}.py", "--data_dir", self.data_dir, *evaluation]
            part = output / "quality.part.csv"
            script += ["--weights", f"{start}={output / 'models' / 'model.pt'}", "--output", part]
            self.process(script, output / "evaluation.log")
            part.replace(output / "quality.csv")

        return Cell(f"restore {task} {start} {seed}", (output / "quality.csv").is_file, run)

    def labelled(self, task: str) -> Path:
        """Datalist of a segmentation."""
        return self.datalist(task, TASKS[task]["splits"], [f"{task}/images/"])

    def restoration_list(self, task: str) -> Path:
        """Datalist of what a restoration task is trained on."""
        files = {row["file"] for row in training_scans(self.data_dir, task)}
        return self.datalist(task, {"training": ["train"]}, PRETRAINING[1], files)

    def robustness(self, task: str, n_labels: int, start: str, seed: int, artifact: str) -> Cell:
        """Dice of a fine-tuned network on test scans with an artifact."""
        output = self.run_of(task, n_labels, start, seed)
        target = output / f"evaluation_{artifact}"

        def run() -> None:
            changes = ARTIFACT_OVERLAY | {"+preprocessing": [ARTIFACTS[artifact], RESCALING]}
            overlay = keep(self.work_dir / "artifacts" / f"{artifact}.json", json.dumps(changes))
            self.evaluate(task, [*TASKS[task]["overlays"], overlay], output, target)

        return Cell(f"robustness {task} {n_labels} {start} {seed} {artifact}", (target / "metrics.csv").is_file, run)

    def evaluate(self, task: str, overlays: Sequence[str | Path], run: Path, output: Path) -> None:
        """Dice alone on the test subjects of a task."""
        options = {
            "dataset_dir": self.labelled(task),
            "weights": run / "models" / "model.pt",
            "max_pictures": 1,
            "additional_metrics": "{}",
        }
        self.bundle("evaluating", "evaluate", overlays, as_options(options), output)

    def run_of(self, task: str, n_labels: int, start: str, seed: int) -> Path:
        """Output folder of a fine-tuning."""
        return self.work_dir / f"{task}_{TASKS[task]['steps']}" / f"{n_labels}_{start}_{seed}"

    def encoder(self, arm: str, seed: int) -> Path | str:
        """Where the pretraining of an arm left its encoder; ``null`` for what is none: scratch, and the peers.

        Raises:
            RuntimeError: if the pretraining is not complete.
        """
        if arm not in ARMS:
            return "null"
        seed = 0 if arm in LONG else seed
        if not (pretraining := self.pretrain(arm, seed)).complete():
            raise RuntimeError(f"{pretraining.name} is not complete: --stages pretrain --arms {arm} --seeds {seed}")
        return self.work_dir / "pretrain" / f"{arm}_{seed}" / "models" / "pretrained" / "encoder.pt"


def keep(path: Path, text: str) -> Path:
    """A text file that other runs may be reading or writing."""
    if not path.is_file() or path.read_text() != text:
        write_atomically(path, text)
    return path


def as_options(settings: dict[str, object]) -> list[str]:
    """Command-line options of a bundle's workflow."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def schedule(task: str, n_labels: int, steps: int) -> tuple[int, int]:
    """Crops a scan, and epochs: an epoch is about 50 steps, or a crop of each subject."""
    batch = TASKS[task]["batch"]
    crops = max(1, round(50 * batch / n_labels))
    return crops, max(1, round(steps / -(-n_labels * crops // batch)))


def epochs_done(output: Path) -> int:
    """Epochs that the history of a run has."""
    history = output / "history.csv"
    if not history.is_file():
        return 0
    with history.open(newline="") as file:
        return max((int(float(row["epoch"])) for row in csv.DictReader(file)), default=0)


def run_all(cells: Sequence[Cell], jobs: int) -> list[str]:
    """The cells that are not complete, ``jobs`` at a time; one that fails does not stop the others. Gives back the
    names of those."""
    left = [cell for cell in cells if not cell.complete()]
    print(f"{len(cells) - len(left)} of {len(cells)} runs are complete", flush=True)
    lock, failed, start = threading.Lock(), [], time.perf_counter()

    def one(cell: Cell) -> None:
        begin = time.perf_counter()
        try:
            cell.run()
            outcome = f"{time.perf_counter() - begin:.0f} s"
        except Exception as error:  # the others may still go well
            failed.append(cell.name)
            outcome = f"FAILED: {error}"
        with lock:
            done.append(cell.name)
            minutes = (time.perf_counter() - start) / 60
            print(f"[{len(done)}/{len(left)}, {minutes:.0f} min] {cell.name}: {outcome}", flush=True)

    done: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, left))
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# The matrix
# ---------------------------------------------------------------------------------------------------------------------


def matrix(study: Study, args: argparse.Namespace) -> dict[str, list[Cell]]:
    """The runs of every stage, in the order of the protocol: all of one seed before the next."""
    cells: dict[str, list[Cell]] = {stage: [] for stage in STAGES}
    cells["pretrain"] += [study.pretrain(arm, 0) for arm in args.arms if arm in LONG]
    for seed in args.seeds:
        every = args.full or seed == 0
        arms = [arm for arm in args.arms if every or arm not in ONCE]
        cells["pretrain"] += [study.pretrain(arm, seed) for arm in arms if arm not in LONG]
        for task in args.tasks:
            for n_labels in TASKS[task]["labels"]:
                starts = [start for start in ("scratch", *arms) if args.full or start in MAIN]
                if args.full or (every and n_labels == TASKS[task]["labels"][-1]):
                    starts += args.peers
                cells["segment"] += [study.segment(task, n_labels, start, seed) for start in starts]
        for task in RESTORATION:
            starts = [start for start in ("scratch", *arms) if args.full or start in MAIN or task == SHORT_TASK]
            starts += RESTORATION_PEERS if every else ()
            cells["restore"] += [study.restore(task, start, seed) for start in starts]
        task, n_labels = ROBUSTNESS
        for start in ("scratch", *arms) if task in args.tasks else ():
            if args.full or start in MAIN:
                cells["robustness"] += [study.robustness(task, n_labels, start, seed, name) for name in ARTIFACTS]
    return cells


def collect_pretraining(study: Study) -> list[dict]:
    """Last validation of the complete pretrainings, each arm's mean, lowest and highest over its seeds."""
    summary = []
    for arm in ARMS:
        seeds = [seed for seed in SEEDS if study.pretrain(arm, seed).complete()]
        if not seeds:
            continue
        last = []
        for seed in seeds:
            with (study.work_dir / "pretrain" / f"{arm}_{seed}" / "history.csv").open(newline="") as file:
                last.append(list(csv.DictReader(file))[-1])
        line: dict[str, object] = {"arm": arm, "seeds": len(seeds)}
        for name in ("masked_error", "high_frequency_error", "ssim"):
            values = [float(row[name]) for row in last]
            figures = {name: sum(values) / len(values), f"{name}_low": min(values), f"{name}_high": max(values)}
            line |= {key: round(value, 4) for key, value in figures.items()}
        summary.append(line)
    return summary


def collect(study: Study) -> tuple[list[dict], list[dict]]:
    """Mean Dice of every test subject in the complete runs: on the scans as they are, and on those with artifacts."""
    clean, robust = [], []
    for task in TASKS:
        for run in sorted((study.work_dir / f"{task}_{TASKS[task]['steps']}").glob("*_*")):
            n_labels, start, seed = run.name.split("_", 1)[0], *run.name.split("_", 1)[1].rsplit("_", 1)
            for evaluation in sorted(run.glob("evaluation*/metrics.csv")):
                artifact = evaluation.parent.name.removeprefix("evaluation").removeprefix("_")
                with evaluation.open(newline="") as file:
                    rows = [row for row in csv.DictReader(file) if row["structure"] == "mean"]
                here = {"task": task, "n_labels": int(n_labels), "start": start, "seed": int(seed)}
                for row in rows:
                    line = {**here, "subject": row["name"], "dice": float(row["dice"])}
                    if artifact:
                        robust.append({"artifact": artifact, **line})
                    else:
                        clean.append(line)
    return clean, robust


def collect_restoration(study: Study) -> list[dict]:
    """Gain in PSNR, dB, of every test subject in the complete runs, for each degradation; a mean over its scans."""
    lines = []
    for task, (settings, _) in RESTORATION.items():
        for file in sorted((study.work_dir / f"{task}_{settings['epochs']}").glob("*/quality.csv")):
            start, seed = file.parent.name.rsplit("_", 1)
            with file.open(newline="") as csv_file:
                rows = list(csv.DictReader(csv_file))
            gains: dict[tuple[str, str, str], list[float]] = {}
            key = "level" if task == "denoising" else "degradation"
            before = {(r["scan"], r[key]): r for r in rows if r["method"] in ("input", "zero-filled")}
            for row in rows:
                if row["method"] == start or (row["method"] == "cubic" and start == "scratch"):  # every file has it
                    gain = float(row["psnr"]) - float(before[row["scan"], row[key]]["psnr"])
                    gains.setdefault((row["method"], row[key], row["subject"]), []).append(gain)
            for (method, degradation, subject), values in gains.items():
                here = {"task": task, "degradation": degradation, "start": method, "seed": int(seed)}
                lines.append({**here, "subject": subject, "gain": sum(values) / len(values)})
    return lines


def tables_of(rows: Sequence[dict], score: str) -> dict[str, dict[tuple[int, str], float]]:
    """Score of each arm by seed and subject."""
    tables: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        tables.setdefault(row["start"], {})[row["seed"], row["subject"]] = row[score]
    return tables


def as_array(*tables: dict[tuple[int, str], float]) -> tuple[np.ndarray, set[int]]:
    """Scores ``(tables, seeds, subjects)`` of the seeds that all tables have, and these seeds.

    Raises:
        ValueError: if their subjects differ.
    """
    seeds = set.intersection(*({seed for seed, _ in table} for table in tables))
    subjects = {tuple(sorted(subject for at, subject in table if at == seed)) for table in tables for seed in seeds}
    if len(subjects) > 1:
        raise ValueError(f"runs have other subjects than others: {', '.join(sorted(set().union(*subjects)))}")
    order = next(iter(subjects), ())
    return np.array(
        [[[table[seed, subject] for subject in order] for seed in sorted(seeds)] for table in tables]
    ), seeds


def interval(values: np.ndarray, confidence: float = 0.95, draws: int = 100_000) -> tuple[float, float]:
    """Bootstrap interval of the mean of ``(seeds, subjects)``: both are drawn anew, with replacement."""
    rng = np.random.default_rng(0)
    n_seeds, n_subjects = values.shape
    # a draw is how often each seed and each subject is in it
    seeds = rng.multinomial(n_seeds, [1 / n_seeds] * n_seeds, size=draws) / n_seeds
    subjects = rng.multinomial(n_subjects, [1 / n_subjects] * n_subjects, size=draws) / n_subjects
    means = np.einsum("ds,sp,dp->d", seeds, values, subjects, optimize=True)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def compare(
    rows: Sequence[dict], columns: Sequence[str], primary: int | None, score: str = "dice", digits: int = 4
) -> list[dict]:
    """Means of each arm, and differences of the pairs of ``COMPARISONS``, with intervals.

    Args:
        rows: of :func:`collect`.
        columns: what a table is made for each value of: task, number of labels.
        primary: number of primary comparisons, for the corrected interval of the differences; None: there are none.
        score: what is compared.
        digits: decimals.
    """
    summary = []
    for group in sorted({tuple(row[column] for column in columns) for row in rows}):
        here = dict(zip(columns, group, strict=True))
        tables = tables_of([row for row in rows if here.items() <= row.items()], score)
        for start in EVERY:
            if start in tables:
                summary.append({**here, **statistics(start, as_array(tables[start])[0][0], digits)})
        for first, second, is_primary in COMPARISONS:
            if first in tables and second in tables:
                (values, reference), seeds = as_array(tables[first], tables[second])
                if seeds:
                    corrected = 1 - 0.05 / primary if is_primary and primary and seeds >= set(SEEDS) else None
                    difference = statistics(f"{first} - {second}", values - reference, digits, corrected)
                    summary.append({**here, **difference})
    return summary


def statistics(name: str, values: np.ndarray, digits: int, corrected: float | None = None) -> dict:
    """Mean of ``(seeds, subjects)`` and its interval, each seed's mean; with a confidence ``corrected`` the interval at
    that confidence, too, and the 95 % interval by the means of the seeds alone (t distribution)."""
    columns = {"mean": values.mean()}
    columns["low"], columns["high"] = interval(values)
    by_seed = values.mean(axis=1)
    if corrected is not None:
        columns["low_corrected"], columns["high_corrected"] = interval(values, corrected)
        margin = stats.t.ppf(0.975, len(by_seed) - 1) * stats.sem(by_seed)
        columns["low_of_seeds"], columns["high_of_seeds"] = values.mean() - margin, values.mean() + margin
    counts = {"arm": name, "seeds": values.shape[0], "subjects": values.shape[1]}
    means = " ".join(f"{value:.{digits}f}" for value in by_seed)
    return {**counts, **{k: round(float(v), digits) for k, v in columns.items()}, "of_each_seed": means}


def report(study: Study) -> None:
    """Tables and pictures of the published rows, with those of all runs that are complete here put in, whatever else
    this call was for: so that the tables can be made without a run, and a study can go on on another machine."""
    clean, robust = collect(study)
    pretrained = with_published("study_pretraining.csv", collect_pretraining(study), ["arm"])
    clean = with_published("study_segmentation.csv", clean)
    restored = with_published("study_restoration.csv", collect_restoration(study))
    robust = with_published("study_robustness.csv", robust)
    summaries: list[dict] = []
    if pretrained:
        publish(pretrained, "study_pretraining.csv")
    if clean:
        write_csv(RESULTS / "study_segmentation.csv", clean)
        summary = compare(clean, ["task", "n_labels"], N_PRIMARY)
        publish(summary, "study_segmentation_summary.csv")
        summaries += summary
        plot_labels(clean, PAGE.with_name("images") / "study_labels.png")
    if restored:
        write_csv(RESULTS / "study_restoration.csv", restored)
        every = mean_over(restored, "degradation", "gain", N_DEGRADATIONS)
        summary = compare(every, ["task", "degradation"], N_PRIMARY, "gain", 3)
        summary += compare(restored, ["task", "degradation"], None, "gain", 3)
        publish(summary, "study_restoration_summary.csv")
        summaries += summary
    if robust:
        # the loss of each subject against its own scan without the artifact
        before = {(r["task"], r["n_labels"], r["start"], r["seed"], r["subject"]): r["dice"] for r in clean}
        losses = [
            {**row, "dice": row["dice"] - before[scan]}
            for row in robust
            if (scan := (row["task"], row["n_labels"], row["start"], row["seed"], row["subject"])) in before
        ]
        every = mean_over(losses, "artifact", "dice", {ROBUSTNESS[0]: len(ARTIFACTS)})
        write_csv(RESULTS / "study_robustness.csv", robust)
        summary = compare([*losses, *every], ["task", "n_labels", "artifact"], None)
        publish(summary, "study_robustness_summary.csv")
        summaries += summary
    PAGE.write_text(with_tables(PAGE.read_text(), page_tables(summaries, pretrained)))
    print(f"tables written to {PAGE}")


def read_results(name: str) -> list[dict]:
    """The rows of a CSV file in the results, without empty cells; none if there is no such file."""
    if not (RESULTS / name).is_file():
        return []
    texts = {"task", "start", "subject", "degradation", "artifact", "arm", "of_each_seed"}
    kinds = {**dict.fromkeys(texts, str), **dict.fromkeys(("n_labels", "seed", "seeds"), int)}
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return [{k: kinds.get(k, float)(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def with_published(
    name: str,
    rows: Sequence[dict],
    run: Sequence[str] = ("task", "n_labels", "degradation", "artifact", "start", "seed"),
) -> list[dict]:
    """The rows of a CSV file in the results, those of the same runs taken out, and these.

    Args:
        name: file.
        rows: of the runs here.
        run: columns, of those that there are, that tell one run from another.
    """

    def of(row: Mapping) -> tuple:
        return tuple(row.get(column) for column in run)

    here = {of(row) for row in rows}
    return [*(row for row in read_results(name) if of(row) not in here), *rows]


def publish(summary: Sequence[dict], name: str) -> None:
    """A summary to the results, and to the screen."""
    columns = list(dict.fromkeys(column for row in summary for column in row))
    rows = [{column: row.get(column, "") for column in columns} for row in summary]
    write_csv(RESULTS / name, rows)
    print_table(columns, [list(row.values()) for row in rows])


def mean_over(rows: Sequence[dict], column: str, score: str, wanted: Mapping[str, int]) -> list[dict]:
    """Rows averaged over the values of a column, which becomes "mean of all", where a run has as many of them as a task
    should."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        group = tuple(value for name, value in row.items() if name not in (column, score))
        groups.setdefault(group, []).append(row)
    return [
        {**group[0], column: "mean of all", score: sum(row[score] for row in group) / len(group)}
        for group in groups.values()
        if len(group) == wanted[group[0]["task"]]
    ]


def page_tables(summary: Sequence[dict], pretrained: Sequence[dict]) -> dict[str, str]:
    """The tables of docs/study.md, in markdown, by their names there: a mean, the 95 % interval of a difference,
    and in brackets the number of seeds where it is not three."""
    restored = {"mean of all": "mean", **{str(level): f"{100 * level:.0f} % noise" for level in LEVELS}}
    groups = {
        ("brain_structures", n): f"17 structures, {n} labelled, Dice" for n in TASKS["brain_structures"]["labels"]
    }
    groups |= {("hippocampus", n): f"hippocampus, {n} labelled, Dice" for n in TASKS["hippocampus"]["labels"]}
    groups |= {("denoising", key): f"denoising, {name}, dB" for key, name in restored.items()}
    degradations = ("mean of all", *DEGRADATIONS)
    groups |= {
        ("super_resolution", key): f"super-resolution, {key.removesuffix(' of all')}, dB" for key in degradations
    }
    robust = [(*ROBUSTNESS, artifact) for artifact in (*ARTIFACTS, "mean of all")]
    cells = {}
    for row in summary:
        group = tuple(row[name] for name in ("task", "n_labels", "degradation", "artifact") if name in row)
        digits = 2 if row["task"] in RESTORATION else 3
        text = f"{row['mean']:{'+' if ' - ' in row['arm'] else ''}.{digits}f}"
        if " - " in row["arm"]:
            text += f" [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
        cells[group, row["arm"]] = text + ("" if row["seeds"] == len(SEEDS) else f" ({row['seeds']})")

    def table(rows: dict, columns: dict, by_arm: bool = False) -> str:
        """Rows and columns: key of a group, or name of an arm, to what is written."""
        body = []
        for row, name in rows.items():
            line = [cells.get((column, row) if by_arm else (row, column), "") for column in columns]
            if any(line[not by_arm :]):  # the first arm alone is no comparison
                body.append([name, *line])
        return markdown(["", *columns.values()], body)

    def arms(*names: str) -> dict[str, str]:
        return {name: name.replace("_", ", ") for name in names}

    def against_peers(peers: Collection[str]) -> dict[str, str]:
        return arms("scratch", *peers, *(f"{peer} - scratch" for peer in peers))

    main = arms(*MAIN, "scheduled_long - scratch", "scheduled_long - random_long")
    short = [arm for arm in ARMS if arm not in LONG]
    pairs = [f"{a} - {b}" for a, b, _ in COMPARISONS if a in short]
    levels = {key: name for key, name in groups.items() if key[0] == SHORT_TASK}
    names = {
        "masked_error": "all hidden patches",
        "high_frequency_error": "quarter with the highest energy",
        "ssim": "SSIM",
    }
    body = [
        [row["arm"].replace("_", ", "), str(row["seeds"])]
        + [
            f"{row[key]:.4f}" + f" [{row[f'{key}_low']:.4f}, {row[f'{key}_high']:.4f}]" * (row["seeds"] > 1)
            for key in names
        ]
        for row in pretrained
    ]
    return {
        "main": table(groups, main),
        "short": table(arms("scratch", *short, *pairs), levels, by_arm=True),
        "segmentation peers": table(groups, against_peers(PEERS)),
        "restoration peers": table(groups, against_peers((*RESTORATION_PEERS, "cubic"))),
        "robustness": table({group: group[-1] for group in robust}, main),
        "pretraining": markdown(["arm", "seeds", *names.values()], body),
    }


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table without the columns that are empty."""
    keep = [at for at in range(len(header)) if at == 0 or any(row[at] for row in body)]
    rows = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(row[at] for at in keep) + " |\n" for row in rows) if body else ""


def with_tables(page: str, tables: dict[str, str]) -> str:
    """A page with its tables anew, but for those that are empty: each stands below a comment with its name."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n\n)(\|.*\n)*")
        if not place.search(page):
            raise ValueError(f"the page has no place for the table: <!-- {name} -->")
        page = place.sub(lambda match: match[1] + table, page) if table else page  # noqa: B023
    return page


def plot_labels(rows: Sequence[dict], path: Path) -> None:
    """Dice against the number of labelled subjects. Lines and intervals are of the seeds that the arms of `MAIN` have
    with every number of labels, as seeds differ by more than arms; pale points are single runs, of all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    shown = [start for start in EVERY if any(row["start"] == start for row in rows)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 3.8), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks):
        here = [row for row in rows if row["task"] == task]
        labels = sorted({row["n_labels"] for row in here})
        tables = {n: tables_of([row for row in here if row["n_labels"] == n], "dice") for n in labels}
        _, common = as_array(*(tables[n].get(start, {}) for n in labels for start in MAIN))
        starts = [start for start in shown if any(start in tables[n] for n in labels)]
        for at, start in enumerate(starts):
            shift = 1 + 0.04 * (at - (len(starts) - 1) / 2)  # so that intervals stand side by side
            line = "-" if start in MAIN else ""
            color = f"C{shown.index(start)}"  # the same in both panels
            points = []
            for n in labels:
                if start in tables[n]:
                    (values,), seeds = as_array(tables[n][start])
                    axis.scatter([n * shift] * len(values), values.mean(axis=1), s=10, alpha=0.35, color=color)
                    kept = values[[seed in common for seed in sorted(seeds)]]
                    if len(kept):
                        low, high = interval(kept)
                        points.append((n * shift, mean := kept.mean(), mean - low, high - mean))
            x, y, *spread = np.asarray(points).reshape(-1, 4).T
            label = start.replace("_", ", ")
            axis.errorbar(x, y, spread, fmt=line, marker="o", ms=4, capsize=2, lw=1.2, label=label, color=color)
        axis.set_xscale("log")
        axis.set_xlim(labels[0] / 1.3, labels[-1] * 1.3)
        axis.set_xticks(labels, [str(n) for n in labels])
        axis.minorticks_off()
        seeds = f"seed{'s' * (len(common) > 1)} {', '.join(map(str, sorted(common)))}"
        axis.set_title(f"{task.replace('_', ' ')} (lines: {seeds})", fontsize=10)
        axis.set_xlabel("labelled subjects")
        axis.set_ylabel("mean Dice of the test subjects")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=DATA, help="folder of manifest.csv")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "output" / "study", help="folder of the runs")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--full", action="store_true", help="every arm with every number of labels")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its share of the cores")
    args = parser.parse_args()
    study = Study(args.data_dir, args.work_dir, args.jobs)
    if args.stages != ["report"]:
        study.manifest  # noqa: B018  (before hours are spent)
    cells, failed = matrix(study, args), []
    for stage in args.stages:
        if stage != "report":
            print(f"{stage}:", flush=True)
            failed += run_all(cells[stage], args.jobs)
    if "report" in args.stages:
        report(study)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
