"""How large are the lateral ventricles? Regression of a whole scan, with and without pretraining.

Protocol, written before the first run:

- Target: the share of a head's labelled volume that the lateral ventricles take, in per cent, counted in the label maps
  of brain_structures (2 mm; automatic labels, a silver standard). The network sees the scan alone.
- Subjects: the splits of manifest.csv, 110 to train, 15 to validate, 25 to test. The pretrained encoder saw the scans
  of the training subjects, but no label and no other subject.
- Arms: encoder frozen or fine-tuned, pretrained (bundle/models/pretrained/encoder.pt) or random; three seeds each,
  which draw the random encoder, the order of the scans and the augmentation.
- Network and data as in configs/regression.json: foreground cropped or padded to 96 x 112 x 96 voxels of 2 mm, batches
  of 2. Frozen: 8 epochs without augmentation, so that each scan passes the encoder once; its tokens are kept on the
  disk. Fine-tuned: 4 more epochs with augmentation, from the model of the frozen arm with the same seed; layer decay
  0.75 from the pretrained encoder, 1 from a random one.
- Learning rate of each arm: that of RATES with the best R2 of seed 0 on the validation subjects. Of each run, the epoch
  with the best R2 on the validation subjects is kept, as the workflow does.
- Result: R2 and mean absolute error on the test subjects, evaluated once for each arm and seed. Intervals: percentile
  bootstrap over the test subjects (10,000 draws) of the mean over the seeds.

All runs are those of the bundle's own workflow. A killed script goes on where it stopped:

    python benchmarks/ventricle_share.py --data_dir ../shared/data

About 40 minutes of one CPU core with AMX, most of them for the fine-tuned arms.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from sspformer.io import write_csv
from sspformer.metrics import regression_scores
from sspformer.networks import SSPFormerEncoder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ENCODER = ROOT / "bundle" / "models" / "pretrained" / "encoder.pt"
CONFIGS = ("configs/train.json", "configs/whole_scan.json", "configs/regression.json")
VENTRICLES = 3  # in structures.csv
SPLITS = {"train": "training", "val": "validation", "test": "test"}
SEEDS = (0, 1, 2)
AUGMENTATION = ("flip", "affine", "contrast", "bias_field", "noise")
FROZEN = {
    "encoder#_target_": "ventricle_share.RememberingEncoder",
    "epochs": 8,
    "freeze_epochs": 8,
    "val_interval": 1,
    **{f"train_transforms#{name}#prob": 0 for name in AUGMENTATION},
}
FINE_TUNED = {"epochs": 4, "val_interval": 1}
RATES = {"frozen": (0.01, 0.03), "fine-tuned": (0.0002, 0.001)}


class RememberingEncoder(SSPFormerEncoder):
    """An encoder that never changes: it keeps the mean of each image's tokens, as one token, in files."""

    folder: Path = Path(os.environ.get("VENTRICLE_TOKENS", "tokens"))
    _weights = ""

    def forward(self, image: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        self._weights = self._weights or digest(*self.state_dict().values())
        return torch.cat([self.remember(*pair) for pair in zip(image.split(1), ids_keep.split(1))])

    def remember(self, image: Tensor, ids_keep: Tensor) -> Tensor:
        file = self.folder / f"{self._weights}_{digest(image)}.pt"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(super().forward(image, ids_keep).float().mean(dim=1, keepdim=True), file)
        return torch.load(file, weights_only=True)


def digest(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def write_data(data_dir: Path, folder: Path) -> None:
    """The table of targets and the lists of scans."""
    rows, lists = [], {split: [] for split in SPLITS.values()}
    with (data_dir / "manifest.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["file"].startswith("brain_structures/images/"):
                image = data_dir.absolute() / row["file"]
                label = np.asanyarray(nib.load(str(image).replace("/images/", "/labels/")).dataobj)
                share = 100 * np.count_nonzero(label == VENTRICLES) / np.count_nonzero(label)
                rows.append(
                    {"participant_id": row["subject"], "split": row["split"], "ventricle_share": f"{share:.5f}"}
                )
                lists[SPLITS[row["split"]]].append({"image": str(image), "subject": row["subject"]})
    write_csv(folder / "participants.csv", rows)
    (folder / "datalist.json").write_text(json.dumps(lists, indent=1))


def bundle(workflow: str, folder: Path, output: Path, options: dict) -> None:
    overlays = [*CONFIGS, "configs/evaluate.json"] if workflow == "evaluating" else CONFIGS
    options = {
        "bundle_root": ".",
        "dataset_dir": folder / "datalist.json",
        "targets": folder / "participants.csv",
        "target": "ventricle_share",
        "output_dir": output,
        **options,
    }
    line = [sys.executable, "-m", "monai.bundle", "run", workflow, "--config_file", str(list(overlays))]
    for name, value in options.items():
        line += [f"--{name}", str(value) if isinstance(value, (str, Path)) else json.dumps(value)]
    path = os.pathsep.join([str(ROOT / "custom"), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": path, "VENTRICLE_TOKENS": str(folder / "tokens")}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(f"{output.name}.log").open("a") as log:
        subprocess.run(line, cwd=ROOT / "bundle", env=environment, stdout=log, stderr=log, check=True)


def history(output: Path) -> list[dict]:
    with (output / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def train(folder: Path, arm: tuple[str, str], rate: float, seed: int, start: Path | str) -> tuple[Path, float]:
    """One run from these weights, unless it is complete; returns its folder and its best R2 on the validation
    subjects."""
    encoder, mode = arm
    output = folder / f"{encoder}_{mode}_{rate}_{seed}"
    options = FROZEN if mode == "frozen" else {**FINE_TUNED, "layer_decay": 0.75 if encoder == "pretrained" else 1.0}
    if not (output / "history.csv").is_file() or len(history(output)) < options["epochs"]:
        shared = {"pretrained": start, "cache_dir": folder / "cache", "learning_rate": rate, "seed": seed}
        bundle("training", folder, output, {**options, **shared})
    return output, max(float(row["r2"]) for row in history(output) if row["r2"])


def evaluate(folder: Path, output: Path, arm: tuple[str, str], rate: float, seed: int) -> list[dict]:
    """Rows of the test subjects, for a trained model."""
    scores = output / "test"
    if not (scores / "metrics.csv").is_file():
        frozen = {"encoder#_target_": FROZEN["encoder#_target_"]} if arm[1] == "frozen" else {}
        bundle("evaluating", folder, scores, {"weights": output / "models/model.pt", **frozen})
    known = {"encoder": arm[0], "training": arm[1], "learning_rate": rate, "seed": seed}
    with (scores / "metrics.csv").open(newline="") as file:
        return [known | {key: row[key] for key in ("subject", "target", "prediction")} for row in csv.DictReader(file)]


def summarize(rows: list[dict], n_resamples: int = 10_000) -> dict:
    """Scores of an arm: the mean over the seeds, with 95 % intervals over the subjects."""
    seeds = sorted({row["seed"] for row in rows})
    subjects = sorted({row["subject"] for row in rows})
    of = {(row["seed"], row["subject"]): row for row in rows}
    target = torch.tensor([float(of[seeds[0], subject]["target"]) for subject in subjects])
    preds = [torch.tensor([float(of[seed, subject]["prediction"]) for subject in subjects]) for seed in seeds]

    def scores(index: Tensor) -> dict[str, float]:
        each = [regression_scores(pred[index], target[index]) for pred in preds]
        return {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}

    draws = torch.from_numpy(np.random.default_rng(0).integers(len(subjects), size=(n_resamples, len(subjects))))
    resampled = [scores(index) for index in draws]
    summary = {"n_subjects": len(subjects), "n_seeds": len(seeds)}
    for name, value in scores(torch.arange(len(subjects))).items():
        low, high = np.quantile([row[name] for row in resampled], [0.025, 0.975])
        each = [regression_scores(pred, target)[name] for pred in preds]
        summary |= {name: f"{value:.3f}", f"{name}_ci_low": f"{low:.3f}", f"{name}_ci_high": f"{high:.3f}"}
        summary[f"{name}_of_seeds"] = " ".join(f"{score:.3f}" for score in each)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=ROOT.parent / "shared" / "data", help="folder of manifest.csv")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "output" / "ventricle_share", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    folder = args.work_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "datalist.json").is_file():
        write_data(args.data_dir, folder)
    rows, summary = [], []
    for encoder, weights in {"pretrained": ENCODER, "random": "null"}.items():
        starts = dict.fromkeys(args.seeds, weights)
        for mode, rates in RATES.items():
            arm = encoder, mode
            tried = {rate: train(folder, arm, rate, 0, starts[0])[1] for rate in rates}
            rate = max(tried, key=tried.get)
            runs = {seed: train(folder, arm, rate, seed, starts[seed])[0] for seed in args.seeds}
            own = [row for seed, output in runs.items() for row in evaluate(folder, output, arm, rate, seed)]
            known = {"encoder": encoder, "training": mode, "learning_rate": rate, "val_r2": f"{tried[rate]:.3f}"}
            summary.append(known | summarize(own))
            print(summary[-1], tried, flush=True)
            rows += own
            starts = {seed: output / "models/model.pt" for seed, output in runs.items()}
    write_csv(RESULTS / "ventricle_share.csv", rows)
    write_csv(RESULTS / "ventricle_share_summary.csv", summary)


if __name__ == "__main__":
    main()
