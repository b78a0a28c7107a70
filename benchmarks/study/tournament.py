"""Which network, pretrained how, pays on two CPU cores? Contenders on validation subjects, each in about equal time.

Protocol, written before the runs. Data: the splits of the study; no test subject takes part. Each contender is
pretrained for about 40 minutes of one core and fine-tuned on the same 5 labelled heads for 1,000 steps of two crops;
Dice of 17 structures over the 15 validation heads after every 250 steps. Seed 0 first; where two contenders are within
0.02, seed 1 as well, with a pretraining of its own. All hide three quarters of the patches, uniformly.

- ``scratch``: no pretraining, patches of 8 voxels of 2 mm, crops of 64^3. ``scratch, slow head``: its last layer learns
  no faster than the rest, as until version 0.4.0.
- ``tokens``: the encoder alone is pretrained, 6,000 steps of 8 crops of 64^3. ``tokens, slow head``: as above.
- ``whole``: the whole segmentation network is, see :mod:`benchmarks.study.whole_network`, 2,880 steps of 2 crops.
- ``tokens of 8 mm``: the encoder with patches of 4, 1,700 steps of 8 crops of 48^3, which fine-tuning has, too.

    python -m benchmarks.study.tournament --data data

Rows go to ``results/study_tournament.csv``: contender, seed, steps, Dice, seconds of the run. Complete runs are not
repeated, killed ones go on.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import RESULTS, add_runs, argument_parser, read_csv, save_csv
from benchmarks.study import protocol
from benchmarks.study.runs import Cell, Study, as_options, epochs_done, run_all, schedule

WHOLE = protocol.CONFIGS / "whole_network.json"
STEPS, LABELS = 1000, 5
LARGE, SMALL = [64, 64, 64], [48, 48, 48]
#: name: overlays, epochs and options of pretrain.json
PRETRAININGS: dict[str, tuple[list[Path], int, dict]] = {
    "tokens": ([], 300, {"encoder#patch_size": 8, "crop_size": LARGE}),
    "whole": ([WHOLE], 36, {"encoder#patch_size": 8, "crop_size": LARGE, "batch_size": 2, "learning_rate": 0.0005}),
    "tokens of 8 mm": ([], 85, {"crop_size": SMALL}),
}
SLOW = {"optimizer#params#head_factor": 1}
FROM_SCRATCH, PRETRAINED = {"learning_rate": 0.002, "layer_decay": 1.0}, {"learning_rate": 0.002, "layer_decay": 0.65}
#: contender: its pretraining, and options of train.json
CONTENDERS: dict[str, tuple[str | None, dict]] = {
    "scratch": (None, FROM_SCRATCH),
    "whole": ("whole", PRETRAINED),
    "tokens": ("tokens", PRETRAINED),
    "tokens of 8 mm": ("tokens of 8 mm", PRETRAINED | {"encoder#patch_size": 4, "crop_size": SMALL}),
    "scratch, slow head": (None, FROM_SCRATCH | SLOW),
    "tokens, slow head": ("tokens", PRETRAINED | SLOW),
}


def folder(study: Study, kind: str, name: str, seed: int) -> Path:
    """Output of a run."""
    return study.work_dir / "tournament" / f"{kind}_{name}_{seed}".replace(",", "").replace(" ", "_")


def pretraining(study: Study, name: str, seed: int) -> Cell:
    """The pretraining of a contender."""
    overlays, epochs, options = PRETRAININGS[name]
    output = folder(study, "pretrain", name, seed)

    def run() -> None:
        settings = {
            "dataset_dir": study.datalist("pretrain", *protocol.PRETRAINING),
            "cache_dir": study.work_dir / "cache",
            "seed": seed,
            "beta": 0.0,
            **protocol.PRETRAIN,
            **options,
            "epochs": epochs,
            "val_interval": epochs,
        }
        study.bundle("training", "pretrain", overlays, as_options(settings), output)

    return Cell(f"pretrain {name} {seed}", lambda: epochs_done(output) >= epochs, run)


def fine_tuning(study: Study, name: str, seed: int) -> Cell:
    """The fine-tuning of a contender."""
    start, options = CONTENDERS[name]
    output = folder(study, "segment", name, seed)
    weights = "null" if start is None else folder(study, "pretrain", start, seed) / "models/pretrained/encoder.pt"

    def run() -> None:
        settings = {"pretrained": weights, "validate#max_scans": 15, "val_interval": 5, **options}
        study.fine_tune("brain_structures", LABELS, seed, STEPS, [], settings, output)

    _, epochs = schedule("brain_structures", LABELS, STEPS)
    return Cell(f"segment {name} {seed}", lambda: epochs_done(output) >= epochs, run)


def rows(study: Study, seeds: list[int]) -> list[dict[str, object]]:
    """Dice on the way of every run that has begun."""
    found = []
    for seed in seeds:
        for name in CONTENDERS:
            output = folder(study, "segment", name, seed)
            seconds = sum(int(row.split(",")[1]) for row in _lines(output / "seconds.csv"))
            for row in read_csv(output / "history.csv"):
                if row["dice"]:
                    steps, dice = int(float(row["iteration"])), round(float(row["dice"]), 4)
                    found.append({"contender": name, "seed": seed, "steps": steps, "dice": dice, "seconds": seconds})
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    parser = argument_parser(__doc__, data=True)
    add_runs(parser, "study_8mm", jobs=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    args = parser.parse_args()
    study = Study(args.data, args.work_dir, args.jobs)
    failed = []
    for seed in args.seeds:
        starts = {CONTENDERS[name][0] for name in args.contenders} - {None}
        failed += run_all([pretraining(study, name, seed) for name in PRETRAININGS if name in starts], args.jobs)
        failed += run_all([fine_tuning(study, name, seed) for name in args.contenders], args.jobs)
        save_csv(RESULTS / "study_tournament.csv", rows(study, args.seeds))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
