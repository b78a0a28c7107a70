"""Train the models that ship with the bundle, on the train splits, and write them to bundle/models.

Each model trains in its own process, through the bundle's workflows; a killed run continues where it stopped. No test
subject takes part. The encoder comes first, as the others start from it. docs/models.md has the training times.

    python -m benchmarks.train_models --data data
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.common import ROOT, add_runs, argument_parser
from benchmarks.study.protocol import TASKS, UNLABELLED
from benchmarks.study.runs import Study, as_options

MODELS_DIR = ROOT / "bundle" / "models"
ENCODER = MODELS_DIR / "pretrained" / "encoder.pt"
#: the head of what ships learnt at the rate of the decoder
SLOW_HEAD = {"optimizer#params#head_factor": 1}
#: options of both stages of the hippocampus
HIPPOCAMPUS = {
    "epochs": 60,
    "crops_per_scan": 1,
    "batch_size": 4,
    "val_interval": 10,
    "layer_decay": 0.75,
    "validate#max_scans": 52,
    **SLOW_HEAD,
}
#: model: workflow, overlays, and options of each stage, which starts from the weights of the one before
MODELS = {
    "pretrained": (
        "pretrain",
        [],
        [{"crop_size": [64, 64, 64], "crops_per_scan": 1, "epochs": 300, "learning_rate": 0.001, "beta": 0.5}],
    ),
    "brain_structures": (
        "train",
        [],
        [
            {"epochs": 30, "crops_per_scan": 2, "val_interval": 5, **SLOW_HEAD},
            {"epochs": 18, "crops_per_scan": 2, "val_interval": 6},
            {"epochs": 15, "crops_per_scan": 2, "val_interval": 5, "layer_decay": 0.75, "learning_rate": 0.001},
        ],
    ),
    "hippocampus": ("train", ["hippocampus"], [HIPPOCAMPUS, {**HIPPOCAMPUS, "learning_rate": 0.001}]),
    "denoising": ("train", ["restoration", "denoising"], [{"epochs": 36, "val_interval": 9}]),
    "super_resolution": (
        "train",
        ["restoration", "super_resolution"],
        [{"epochs": 36, "crops_per_scan": 64, "val_interval": 9}],
    ),
}


def datalist(study: Study, model: str) -> Path:
    """The training data of a model."""
    if model == "pretrained":
        return study.datalist("pretrain", *UNLABELLED)
    if model in TASKS:
        return study.labelled(model)
    return study.restoration_list(model)


def main() -> None:
    parser = argument_parser(__doc__, data=True)
    add_runs(parser, "models", jobs=1)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    study = Study(args.data, args.work_dir, args.jobs)
    for model in args.models:
        workflow, overlays, stages = MODELS[model]
        trained = ENCODER
        for stage, options in enumerate(stages, start=1):
            output = study.work_dir / (model if stage == 1 else f"{model}_{stage}")
            start = {} if workflow == "pretrain" else {"pretrained": trained, "validate#max_scans": 5}
            options = {"dataset_dir": datalist(study, model), **start, **options}
            print(f"{model}, stage {stage} of {len(stages)}: see {output / 'training.log'}", flush=True)
            study.bundle("training", workflow, overlays, as_options(options), output)
            trained = output / "models" / ("pretrained/encoder.pt" if model == "pretrained" else "model.pt")
        target = ENCODER if model == "pretrained" else MODELS_DIR / model / "model.pt"
        target = MODELS_DIR / "model.pt" if model == "brain_structures" else target
        subprocess.run([sys.executable, ROOT / "scripts" / "half_precision.py", trained, target], check=True)


if __name__ == "__main__":
    main()
