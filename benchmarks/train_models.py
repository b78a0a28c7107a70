"""Train the models that ship with the bundle, on the train splits of the manifest, and write them to bundle/models.

One process a model, through the bundle's own `train.json`; a killed run goes on where it stopped. Test subjects are
never trained on. About 22, 10, 6, 7 and 9 minutes on two CPU cores.

    python benchmarks/train_models.py --data_dir ../shared/data --encoder bundle/models/pretrained/encoder.pt
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from _restoration import manifest_scans
from finetuning import ROOT, TASKS, bundle, datalist, write_datalist

#: model: overlay, its place under bundle/models, the model it starts from (None: the encoder), options of the training
MODELS = {
    "brain_structures": (
        None,
        None,
        None,
        ["--epochs", "18", "--crops_per_scan", "2", "--val_interval", "3"],
    ),
    "brain_structures_2": (
        None,
        "model.pt",
        "brain_structures",
        ["--epochs", "8", "--crops_per_scan", "2", "--val_interval", "2", "--learning_rate", "0.001"],
    ),
    "hippocampus": (
        "hippocampus",
        "hippocampus/model.pt",
        None,
        ["--epochs", "30", "--crops_per_scan", "1", "--batch_size", "4", "--val_interval", "5"],
    ),
    "denoising": (
        "denoising",
        None,
        None,
        ["--epochs", "10", "--val_interval", "5"],
    ),
    "denoising_2": (
        "denoising",
        "denoising/model.pt",
        "denoising",
        ["--epochs", "5", "--val_interval", "5", "--learning_rate", "0.001"],
    ),
    "super_resolution": (
        "super_resolution",
        "super_resolution/model.pt",
        None,
        ["--epochs", "14", "--crops_per_scan", "16", "--val_interval", "7"],
    ),
}


def scans(data_dir: Path, model: str, work_dir: Path) -> Path:
    """Training scans of a restoration task: super-resolution learns from those that are fine along every axis."""
    rows = manifest_scans(data_dir, "train", max_spacing=1.5 if model == "super_resolution" else float("inf"))
    # The models that ship saw these scans with the manifest's bare subjects, which took some persons of two datasets
    # for one; named apart, other scans of the list are drawn for validation.
    items = [{"image": row["file"], "subject": row["subject"]} for row in rows if row["contrast"] != "ADC"]
    return write_datalist(work_dir / f"{model}.json", {"training": items}, data_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with manifest.csv and the tasks' folders")
    parser.add_argument("--encoder", type=Path, required=True, help="pretrained encoder.pt")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--work_dir", type=Path, default=ROOT / "output" / "models")
    parser.add_argument("options", nargs="*", help="more options of train.json, after --")
    args = parser.parse_args()
    data_dir, work_dir = args.data_dir.resolve(), args.work_dir.resolve()
    for model in args.models:
        overlay, place, start, options = MODELS[model]
        task = model.removesuffix("_2")
        lists = (datalist if task in TASKS else scans)(data_dir, task, work_dir)
        pretrained = work_dir / start / "models" / "model.pt" if start else args.encoder.resolve()
        output = work_dir / model
        output.mkdir(parents=True, exist_ok=True)
        print(f"{model}: see {output / 'train.log'}", flush=True)
        options = [
            *("--dataset_dir", str(lists), "--output_dir", str(output), "--pretrained", str(pretrained)),
            *("--max_val_scans", "5", *options, *args.options),
        ]
        bundle("training", "train", [overlay] if overlay else [], options, output / "train.log")
        if place:
            target = ROOT / "bundle" / "models" / place
            script = ROOT / "scripts" / "half_precision.py"
            subprocess.run([sys.executable, script, output / "models" / "model.pt", target], check=True)


if __name__ == "__main__":
    main()
