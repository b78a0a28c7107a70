"""How fast may a pretrained encoder learn? Fine-tuning of the 17 structures with 20 labelled heads, at equal steps,
from scratch and from the encoder that ships, by the layer decay: the last block learns at so many times the decoder's
rate, the one before at its square, and so on. Mean Dice of five validation heads; no test subject.

A complete run is not repeated:

    python benchmarks/layer_decay.py --data_dir ../shared/data
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from _common import RESULTS, print_table, write_csv
from study import DATA, ROOT, TASKS, Cell, Study, epochs_done, run_all, schedule
from train_models import ENCODER

TASK, LABELS = "brain_structures", 20
#: what the weights start from, layer decay
RUNS = (("scratch", 1.0), *(("shipped", decay) for decay in (1.0, 0.75, 0.5, 0.25)))


def fine_tuning(study: Study, start: str, decay: float, seed: int, steps: int) -> tuple[Cell, Path]:
    """A run, and its output folder."""
    output = study.work_dir / "layer_decay" / f"{start}_{decay}_{seed}_{steps}"
    options = {"pretrained": ENCODER if start == "shipped" else "null", "layer_decay": decay, "max_val_scans": 5}
    epochs = schedule(TASK, LABELS, steps)[1]

    def run() -> None:
        study.fine_tune(TASK, LABELS, seed, steps, [], options, output)

    return Cell(f"{start}, layer decay {decay}, seed {seed}", lambda: epochs_done(output) >= epochs, run), output


def result(output: Path) -> dict[str, float]:
    """Mean loss of the last three epochs, and Dice of the last validation."""
    with (output / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in rows[-3:]]
    dice = [float(row["dice"]) for row in rows if row["dice"]]
    return {"train_loss": round(sum(losses) / len(losses), 4), "dice": round(dice[-1], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=DATA, help="folder of manifest.csv")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "output" / "study", help="folder of the study's runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=TASKS[TASK]["steps"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its share of the cores")
    args = parser.parse_args()
    study = Study(args.data_dir, args.work_dir, args.jobs)
    settings = [(start, decay, seed) for seed in args.seeds for start, decay in RUNS]
    runs = [fine_tuning(study, *setting, args.steps) for setting in settings]
    if failed := run_all([cell for cell, _ in runs], args.jobs):
        raise SystemExit(f"{len(failed)} runs failed, and no table is written: {', '.join(failed)}")
    rows = [
        {"start": start, "layer_decay": decay, "seed": seed, "steps": args.steps, **result(output)}
        for (start, decay, seed), (_, output) in zip(settings, runs, strict=True)
    ]
    write_csv(RESULTS / "layer_decay.csv", rows)
    print_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
