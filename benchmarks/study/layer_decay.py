"""How fast should a pretrained encoder learn?

Fine-tuning of the 17 structures with 20 labelled scans and equal steps, from scratch and from the encoder that ships,
by layer decay: the last block learns at that share of the decoder's rate, the one before at its square, and so on. The
score is the mean Dice of five validation scans; no test subject takes part. The script does not repeat a complete run.

    python -m benchmarks.study.layer_decay --data data
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import RESULTS, add_runs, argument_parser, read_csv, save_csv
from benchmarks.study.protocol import TASKS
from benchmarks.study.runs import Cell, Study, epochs_done, run_all, schedule
from benchmarks.train_models import ENCODER
from sspformer.io import format_table

TASK, LABELS = "brain_structures", 20
#: start of the encoder, layer decay
RUNS = (("scratch", 1.0), *(("shipped", decay) for decay in (1.0, 0.75, 0.5, 0.25)))


def fine_tuning(study: Study, start: str, decay: float, seed: int, steps: int) -> tuple[Cell, Path]:
    """A run, and its output folder."""
    output = study.work_dir / "layer_decay" / f"{start}_{decay}_{seed}_{steps}"
    options = {"pretrained": ENCODER if start == "shipped" else "null", "layer_decay": decay, "validate#max_scans": 5}
    epochs = schedule(TASK, LABELS, steps)[1]

    def run() -> None:
        study.fine_tune(TASK, LABELS, seed, steps, [], options, output)

    return Cell(f"{start}, layer decay {decay}, seed {seed}", lambda: epochs_done(output) >= epochs, run), output


def result(output: Path) -> dict[str, float]:
    """Mean loss of the last three epochs, and Dice of the last validation."""
    rows = read_csv(output / "history.csv")
    losses = [float(row["train_loss"]) for row in rows[-3:]]
    dice = [float(row["dice"]) for row in rows if row["dice"]]
    return {"train_loss": round(sum(losses) / len(losses), 4), "dice": round(dice[-1], 4)}


def main() -> None:
    parser = argument_parser(__doc__, RESULTS / "layer_decay.csv", data=True)
    add_runs(parser, "study", jobs=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=TASKS[TASK]["steps"])
    args = parser.parse_args()
    study = Study(args.data, args.work_dir, args.jobs)
    settings = [(start, decay, seed) for seed in args.seeds for start, decay in RUNS]
    runs = [fine_tuning(study, *setting, args.steps) for setting in settings]
    if failed := run_all([cell for cell, _ in runs], args.jobs):
        raise SystemExit(f"wrote no table, as {len(failed)} runs failed: {', '.join(failed)}")
    rows = [
        {"start": start, "layer_decay": decay, "seed": seed, "steps": args.steps, **result(output)}
        for (start, decay, seed), (_, output) in zip(settings, runs, strict=True)
    ]
    save_csv(args.output, rows)
    print(format_table(rows))


if __name__ == "__main__":
    main()
