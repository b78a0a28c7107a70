"""nnU-Net v2 on the hippocampus, with our subjects and our budget: Dice of the test subjects.

    python -m benchmarks.study.nnunet --data data --minutes 30 --labels 10 --seed 0

nnU-Net plans, preprocesses, trains (`3d_fullres`) and predicts (with mirroring) by itself. Two things change. Its 1000
epochs of 250 iterations become 50 epochs, with as many iterations as the budget allows; over them its learning rate
falls to 0 as ever. And an epoch validates on one batch instead of 50, as the budget counts validation and chooses
nothing by it: the last weights are tested. On a CPU nnU-Net computes in float32, by its own choice.

`sspformer.data.prepare_pairs` draws the labels, so the subjects are those of ours with the same `--max_subjects` and
`--seed`. nnU-Net plans with them and the validation subjects alone.

`--minutes` becomes a number of iterations by timing a few before the training; `--iterations` sets it. The script does
not repeat a complete run, and continues one that was killed after its last epoch. It writes results/nnunet.csv, one row
per subject and structure, and replaces the rows of the same labels, seed and budget.

nnU-Net has many dependencies of its own. Give it an environment:

    python -m venv nnunet-venv
    nnunet-venv/bin/pip install torch==2.13.0
    nnunet-venv/bin/pip install -c constraints.txt -e . nnunetv2==2.8.1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from benchmarks.common import RESULTS, ROOT, argument_parser, facts, read_csv, save_csv
from benchmarks.study.runs import Study
from sspformer.data import DatasetOptions, prepare_pairs
from sspformer.io import format_table

DATASET, DATASET_ID, CONFIGURATION = "Dataset004_Hippocampus", 4, "3d_fullres"
STRUCTURES = {"anterior hippocampus": 1, "posterior hippocampus": 2}
EPOCHS = 50  # the learning rate falls once an epoch


class ShortTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a short schedule, and an epoch's random numbers by seed, so that a resumed run repeats."""

    seed = 0

    def shorten(self, iterations: int, seed: int) -> None:
        """About so many iterations in all; before `initialize`, which makes the schedule."""
        self.num_epochs = min(
            EPOCHS, -(-iterations // 5)
        )  # 5 iterations for one of validation, as nnU-Net's 250 for 50
        self.num_iterations_per_epoch = round(iterations / self.num_epochs)
        self.num_val_iterations_per_epoch = 1
        self.save_every = 1
        self.seed = seed
        self.logger.plot_progress_png = lambda output_folder: None  # a second an epoch that is not training

    def on_train_epoch_start(self) -> None:
        seed_all(1000 * self.seed + self.current_epoch)
        super().on_train_epoch_start()

    def seconds(self) -> float:
        """Duration of the epochs so far, those before a kill included."""
        starts, ends = (self.logger.get_value(f"epoch_{edge}_timestamps", step=None) for edge in ("start", "end"))
        return sum(end - start for start, end in zip(starts, ends, strict=False))


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, RESULTS / "nnunet.csv", data=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="wall-clock budget of the training")
    budget.add_argument("--iterations", type=int, help="budget in iterations, rounded to whole epochs")
    parser.add_argument("--labels", default="all", help="labelled training subjects (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of subjects, weights and crops (default: %(default)s)")
    parser.add_argument("--max_test", type=int, help="predict only so many test subjects, for a try (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="augmentation processes (default: 0, in the main one)")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "output" / "nnunet", help="folder of the runs")
    args = parser.parse_args()
    for name in ("minutes", "iterations"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    return args


def prepare(pairs: dict[str, list[dict]], folder: Path) -> None:
    """nnU-Net's raw data set of the training and validation subjects, its plan and its preprocessed crops."""
    raw, preprocessed = folder / "raw" / DATASET, folder / "preprocessed" / DATASET
    splits = preprocessed / "splits_final.json"  # written last: it says that all is there
    if splits.is_file():
        return
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True, exist_ok=True)
    cases = pairs["training"] + pairs["validation"]
    for case in cases:
        shutil.copyfile(case["image"], raw / "imagesTr" / f"{case['name']}_0000.nii.gz")
        shutil.copyfile(case["label"], raw / "labelsTr" / f"{case['name']}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, **STRUCTURES},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description, indent=1))
    extract_fingerprint_dataset(DATASET_ID, num_processes=1)
    plan_experiment_dataset(DATASET_ID)
    preprocess_dataset(DATASET_ID, configurations=(CONFIGURATION,), num_processes=(1,))
    names = {split: [case["name"] for case in pairs[split]] for split in ("training", "validation")}
    splits.write_text(json.dumps([{"train": names["training"], "val": names["validation"]}], indent=1))


def make_trainer(folder: Path, iterations: int, seed: int) -> ShortTrainer:
    """A trainer, its weights drawn by seed, that goes on where the last one stopped."""
    preprocessed = folder / "preprocessed" / DATASET
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": True}
    description = json.loads((preprocessed / "dataset.json").read_text())
    seed_all(seed)
    trainer = ShortTrainer(plans, CONFIGURATION, 0, description, torch.device("cpu"))
    trainer.shorten(iterations, seed)
    trainer.initialize()
    return trainer


def iterations_within(seconds: float, folder: Path, rounds: int = 8, warmup: int = 2) -> int:
    """Iterations that a budget has time for besides their validation; timed on weights that are thrown away."""
    trainer = make_trainer(folder, rounds, seed=0)
    trainer.on_train_start()
    trainer.network.train()
    durations: dict[str, list[float]] = {"train": [], "validation": []}
    for _ in range(warmup + rounds):
        start = time.perf_counter()
        trainer.train_step(next(trainer.dataloader_train))
        middle = time.perf_counter()
        with torch.no_grad():
            trainer.validation_step(next(trainer.dataloader_val))
        durations["train"].append(middle - start)
        durations["validation"].append(time.perf_counter() - middle)
    iteration, validation = (float(np.median(times[warmup:])) for times in durations.values())
    within = (seconds - EPOCHS * validation) / iteration
    return max(1, round(max(within, seconds / (iteration + validation / 5))))  # the latter with fewer than 50 epochs


def train(folder: Path, minutes: float | None, iterations: int | None, seed: int) -> ShortTrainer:
    """Trains to the end of the budget, which is kept in budget.json for a resumed run."""
    budget = folder / "budget.json"
    if not budget.is_file():
        if iterations is None:
            iterations = iterations_within(60 * minutes, folder)
        budget.write_text(json.dumps({"iterations": iterations}))
    trainer = make_trainer(folder, json.loads(budget.read_text())["iterations"], seed)
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    if trainer.current_epoch < trainer.num_epochs:
        trainer.run_training()
    return trainer


def predict(trainer: ShortTrainer, cases: list[dict], folder: Path) -> list[dict]:
    """Label maps of the test subjects on their own grids, and their Dice."""
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    (folder / "predictions").mkdir(exist_ok=True)
    files, rows = SimpleITKIO(), []
    for case in cases:
        image, properties = files.read_images([case["image"]])
        prediction = predictor.predict_single_npy_array(image, properties)
        files.write_seg(prediction, str(folder / "predictions" / f"{case['name']}.nii.gz"), properties)
        truth = files.read_seg(case["label"])[0][0]
        scores = {name: dice(prediction == value, truth == value) for name, value in STRUCTURES.items()}
        for name, score in {"mean": float(np.nanmean(list(scores.values()))), **scores}.items():
            rows.append({"name": case["name"], "structure": name, "dice": round(score, 5)})
    return rows


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """NaN where the truth is empty, as MONAI's."""
    return float(2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())) if truth.any() else float("nan")


def main() -> None:
    args = parse()
    args.work_dir = args.work_dir.resolve()
    study = Study(args.data, args.work_dir, jobs=1)
    lists = study.labelled("hippocampus")
    labels = None if args.labels == "all" else int(args.labels)
    options = DatasetOptions(lists, classes=len(STRUCTURES) + 1, seed=args.seed, max_subjects=labels)
    pairs = prepare_pairs(options)
    budget = f"{args.minutes:g}min" if args.minutes else f"{args.iterations}it"
    folder = args.work_dir / f"{len(pairs['training'])}_{args.seed}_{budget}"
    for variable, part in (("nnUNet_raw", "raw"), ("nnUNet_preprocessed", "preprocessed"), ("nnUNet_results", "runs")):
        os.environ[variable] = str(folder / part)
        (folder / part).mkdir(parents=True, exist_ok=True)
    os.environ["nnUNet_n_proc_DA"] = "1"  # planning takes it for a number of threads, and fails on 0
    prepare(pairs, folder)
    os.environ["nnUNet_n_proc_DA"] = str(args.workers)
    trainer = train(folder, args.minutes, args.iterations, args.seed)
    arm = {"n_labels": len(pairs["training"]), "seed": args.seed, "budget": budget}
    columns = {
        **arm,
        "iterations": trainer.num_epochs * trainer.num_iterations_per_epoch,
        "minutes": round(trainer.seconds() / 60, 2),
    }
    versions = {**facts(), "nnunetv2": version("nnunetv2")}
    scores = predict(trainer, pairs["test"][: args.max_test], folder)
    save_csv(args.output, [*other_rows(args.output, arm), *({**columns, **score, **versions} for score in scores)])
    means = {name: np.nanmean([row["dice"] for row in scores if row["structure"] == name]) for name in STRUCTURES}
    print(format_table([columns | {name: f"{mean:.4f}" for name, mean in means.items()}]))


def other_rows(path: Path, arm: dict[str, object]) -> list[dict[str, str]]:
    """The rows of other runs in the file."""
    return [row for row in read_csv(path) if any(row[name] != str(value) for name, value in arm.items())]


if __name__ == "__main__":
    main()
