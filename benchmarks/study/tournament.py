"""Which network, pretrained how, pays on two CPU cores? Contenders on validation subjects, each in about equal time.

Protocol. Data: the splits of the study; no test subject takes part. A pretraining takes about 40 minutes of one core,
and hides three quarters of the patches, uniformly. Then 1,000 steps of two crops on 5 labelled heads, the same for all;
Dice of 17 structures over the 15 validation heads after every 250 steps. The learning rate is 0.002, with a layer decay
of 0.65 where pretrained. Seed 0 first; where two contenders are within 0.02 at the end, seed 1 as well, with a
pretraining of its own.

It was written before these runs, but after pilots with seed 0 on five of the validation heads. They chose the factor of
10 for the learning rate of the head, among 1, 10 and 30.

- ``scratch``: no pretraining, patches of 8 voxels of 2 mm, crops of 64^3. ``scratch, slow head``: its last layer learns
  no faster than the rest, as until version 0.4.0.
- ``tokens``: the encoder alone is pretrained, 6,000 steps of 8 crops of 64^3. ``tokens, slow head``: as above.
- ``whole``: the whole segmentation network is, see :mod:`benchmarks.study.whole_network`, 2,880 steps of 2 crops.
- ``tokens of 8 mm``: the encoder with patches of 4, 1,700 steps of 8 crops of 48^3, which fine-tuning has, too.

    python -m benchmarks.study.tournament --data data

Rows of complete runs go to ``results/study_tournament.csv``: contender, seed, steps, Dice. They are not repeated, and
killed runs go on. ``python -m benchmarks.study --stages report`` makes the table of the page.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.common import RESULTS, add_runs, argument_parser, read_csv, save_csv
from benchmarks.study import protocol
from benchmarks.study.runs import Cell, Study, as_options, epochs_done, pretrained, run_all, schedule

WHOLE = protocol.CONFIGS / "whole_network.json"
STEPS, LABELS = 1000, 5
LARGE, SMALL = [64, 64, 64], [48, 48, 48]
#: name: overlays, epochs and options of pretrain.json
PRETRAININGS: dict[str, tuple[list[Path], int, dict]] = {
    "tokens": ([], 300, {"encoder#patch_size": 8, "crop_size": LARGE}),
    "whole": ([WHOLE], 36, {"encoder#patch_size": 8, "crop_size": LARGE, "batch_size": 2, "learning_rate": 0.0005}),
    "tokens of 8 mm": ([], 85, {"crop_size": SMALL}),
}
HEAD = "optimizer#params#head_factor"
FROM_SCRATCH = {"learning_rate": 0.002, "layer_decay": 1.0, HEAD: 10}
PRETRAINED = {"learning_rate": 0.002, "layer_decay": 0.65, HEAD: 10}
#: contender: its pretraining, and options of train.json
CONTENDERS: dict[str, tuple[str | None, dict]] = {
    "scratch": (None, FROM_SCRATCH),
    "whole": ("whole", PRETRAINED),
    "tokens": ("tokens", PRETRAINED),
    "tokens of 8 mm": ("tokens of 8 mm", PRETRAINED | {"encoder#patch_size": 4, "crop_size": SMALL}),
    "scratch, slow head": (None, FROM_SCRATCH | {HEAD: 1}),
    "tokens, slow head": ("tokens", PRETRAINED | {HEAD: 1}),
}


def folder(study: Study, kind: str, name: str, seed: int) -> Path:
    """Output of a run."""
    return study.work_dir / "tournament" / re.sub(r"\W+", "_", f"{kind}_{name}_{seed}")


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

    return Cell(f"pretrain {name} {seed}", lambda: pretrained(output, epochs), run)


def fine_tuning(study: Study, name: str, seed: int) -> Cell:
    """The fine-tuning of a contender."""
    start, options = CONTENDERS[name]
    output = folder(study, "segment", name, seed)
    weights = "null" if start is None else folder(study, "pretrain", start, seed) / "models/pretrained/encoder.pt"

    def run() -> None:
        if start is not None and not (before := pretraining(study, start, seed)).complete():
            raise RuntimeError(f"{before.name} is not complete")
        settings = {"pretrained": weights, "validate#max_scans": 15, "val_interval": 5, **options}
        study.fine_tune("brain_structures", LABELS, seed, STEPS, [], settings, output)

    _, epochs = schedule("brain_structures", LABELS, STEPS)
    return Cell(f"segment {name} {seed}", lambda: epochs_done(output) >= epochs, run)


def rows(study: Study) -> list[dict[str, object]]:
    """Dice on the way of the complete runs."""
    found = []
    for name in CONTENDERS:
        seeds = [file.name.rsplit("_", 1)[1] for file in sorted(folder(study, "segment", name, 0).parent.glob("*"))]
        for seed in sorted({int(seed) for seed in seeds if seed.isdigit()}):
            if fine_tuning(study, name, seed).complete():
                for row in read_csv(folder(study, "segment", name, seed) / "history.csv"):
                    if row["dice"]:
                        steps, dice = int(float(row["iteration"])), round(float(row["dice"]), 4)
                        found.append({"contender": name, "seed": seed, "steps": steps, "dice": dice})
    return found


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
        if here := rows(study):
            save_csv(RESULTS / "study_tournament.csv", here)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
