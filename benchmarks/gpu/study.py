"""Does pretraining pay where compute is plentiful? The runs of the study that a GPU does, in the order of their worth.

    python -m benchmarks.gpu.study --out OUT --data DATA [--minutes 9] [--smoke]
    python -m benchmarks.gpu.study --out OUT --data DATA --weights

Protocol, fixed before the runs. Data: the 110 training scans of IXI at 2 mm, unlabelled for pretraining; 5 of the 110
with labels, drawn by seed; Dice of 17 structures over the 15 validation subjects. Test subjects are not on the machine.
Each seed has a pretraining of its own.

1. *Recipe*, seed 0: learning rates 0.0003, 0.0007, 0.0015, 0.003 for scratch with patches of 8 and of 4, and for three
   pretrainings by random masks (layer decay 0.65): of the encoder with patches of 4, and of the whole network with
   patches of 4 and of 8; 3,000 steps. The best of scratch and the best pretraining go on, each with its best rate.
2. *Arms*, seeds 0 to 2, 6,000 steps, validated every 500: scratch, random masks, scheduled masks (beta 0.5), random
   masks without noise, scheduled masks without noise.
3. *Context*, seed 0, 3,000 steps: random masks with crops of 48^3 in fine-tuning, and with layer decay 0.5 and 1.
4. *Design*, seed 0, 3,000 steps, one change of the random masks at a time (``CHANGES``): voxels of 1.5 mm, mask ratios
   of 0.6 and 0.9, patches normalised as the target, a spectral term in the loss, rotation by 0.26 rad in pretraining.
5. *More labels*: 20 and 110 subjects, seeds 0 to 2, three arms.

Pretraining: 1,500 steps of 48 crops of 64^3. Each finished run is a line of ``results.jsonl``: its name, settings, the
Dice by step, steps to 95 % of its own best, and seconds. Encoders are kept in half precision, five at most; one that is
needed later is trained again. The next run is the first that fits into the minutes that are left, judged by the last of
its kind; in a piece that none would fit into, the first all the same. A run that fails, or does not end in a piece, is
tried again once; what needs its encoder is left out.

``--weights`` trains what is to ship instead, from single runs that are to fit into a piece each: an encoder by random
masks, the 17 structures with all labels, and the hippocampus, if its scans are there. Each is left in OUT in half
precision.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.common import BUNDLE, ROOT, facts

#: of a run that fails
TRIES = 2
#: seconds after which a run that did not end has had its piece
PIECE = 400
#: files that may lie in OUT beside the tables
ENCODERS = 5
RATES = (0.0003, 0.0007, 0.0015, 0.003)
FINE = {name: [1.5, 1.5, 1.5] for name in ("spacing", "min_spacing", "max_spacing")}
WHOLE = {"overlay": "bundle/configs/whole_network.json"}
#: changes of an arm, whose names follow its mask: options of the pretraining, and of the fine-tuning
CHANGES: dict[str, tuple[dict, dict]] = {
    "whole": (WHOLE, {}),
    "whole8": (WHOLE | {"encoder#patch_size": 8}, {"encoder#patch_size": 8}),
    "clean": ({"noise": "null"}, {}),
    "fine": (FINE, {"spacing": [1.5, 1.5, 1.5]}),
    "ratio60": ({"mask_ratio": 0.6}, {}),
    "ratio90": ({"mask_ratio": 0.9}, {}),
    "normalized": ({"loss_function#normalize_target": True}, {}),
    "spectral": ({"loss_function#spectral_weight": 1.0}, {}),
    "rotated": ({"crops#sampler#rotate": 0.26}, {}),
}
#: changes that are tried one at a time
DESIGNS = ("fine", "ratio60", "ratio90", "normalized", "spectral", "rotated")
PRETRAINED, SCRATCH = ("random", "random-whole", "random-whole8"), ("scratch8", "scratch4")


@dataclass(frozen=True)
class Run:
    """One pretraining or fine-tuning; ``encoder`` names the pretraining that a fine-tuning starts from."""

    name: str
    kind: str  # "pretrain" or "segment"
    seed: int = 0
    encoder: str | None = None
    steps: int = 0
    options: dict = field(default_factory=dict)
    task: str = "brain"  # a datalist of the data: brain or hippocampus


def pretraining(arm: str, seed: int) -> Run:
    """A pretraining of an arm."""
    mask, *changes = arm.split("-")
    options: dict = {"beta": 0.0 if mask == "random" else 0.5}
    for change in changes:
        options |= CHANGES[change][0]
    return Run(f"pretrain_{arm}_{seed}", "pretrain", seed, steps=1500, options=options)


def segmentation(arm: str, seed: int, labels: int, rate: float, steps: int, **options) -> Run:
    """A fine-tuning of an arm, from its own seed's pretraining."""
    _, *changes = arm.split("-")
    scratch = arm in SCRATCH
    extra = "".join(f"_{key.split('#')[-1]}{value}" for key, value in options.items())
    settings = {"learning_rate": rate, "layer_decay": 1.0 if scratch else 0.65, "data_options#max_subjects": labels}
    settings["encoder#patch_size"] = 8 if arm == "scratch8" else 4
    for change in changes:
        settings |= CHANGES[change][1]
    name = f"segment_{arm}_{seed}_{labels}_{rate}_{steps}{extra}".replace(" ", "")
    encoder = None if scratch else f"pretrain_{arm}_{seed}"
    return Run(name, "segment", seed, encoder, steps, settings | options)


def queue(results: dict[str, dict], hopeless: Collection[str] = ()) -> list[Run]:
    """All runs in their order; later ones are of the recipe's best, once all but the ``hopeless`` are there."""
    recipe = [segmentation(arm, 0, 5, rate, 3000) for rate in RATES for arm in (*PRETRAINED, *SCRATCH)]
    runs = [run for arm, first in zip(PRETRAINED, recipe) for run in (pretraining(arm, 0), first)]
    runs += recipe[len(PRETRAINED) :]

    def best(arms: tuple[str, ...]) -> tuple[str, float] | None:
        of_arms = [run for run in recipe if run.name.split("_")[1] in arms and run.name not in hopeless]
        if not of_arms or not all(run.name in results for run in of_arms):
            return None
        top = max(of_arms, key=lambda run: results[run.name]["best"])
        return top.name.split("_")[1], top.options["learning_rate"]

    scratch, pretrained = best(SCRATCH), best(PRETRAINED)
    if scratch is None or pretrained is None:
        return runs
    network, rate = pretrained[0].removeprefix("random"), pretrained[1]
    arms = [f"{mask}{network}" for mask in ("random", "scheduled", "random-clean", "scheduled-clean")]
    for labels in (5, 20, 110):
        for seed in range(3):
            runs.append(segmentation(scratch[0], seed, labels, scratch[1], 6000))
            for arm in arms if labels == 5 else arms[:2]:
                runs += [pretraining(arm, seed), segmentation(arm, seed, labels, rate, 6000)]
        if labels == 5:
            runs.append(segmentation(arms[0], 0, 5, rate, 3000, crop_size=[48, 48, 48]))
            runs += [segmentation(arms[0], 0, 5, rate, 3000, layer_decay=decay) for decay in (0.5, 1.0)]
            for design in DESIGNS:
                arm = f"{arms[0]}-{design}"
                runs += [pretraining(arm, 0), segmentation(arm, 0, 5, rate, 3000)]
    return list({run.name: run for run in runs}.values())


def weights(data: Path) -> list[Run]:
    """What is to ship: encoder, 17 structures, hippocampus."""
    recipe = {"learning_rate": 0.0015, "layer_decay": 0.65}
    runs = [
        Run("weights_encoder", "pretrain", steps=2500, options={"beta": 0.0}),
        Run("weights_brain", "segment", 0, "weights_encoder", 7500, recipe | {"encoder#patch_size": 4}),
    ]
    if (data / "hippocampus.json").is_file():
        runs.append(Run("weights_hippocampus", "segment", 0, "weights_encoder", 6000, recipe, "hippocampus"))
    return runs


def command(run: Run, data: Path, encoders: Path, out: Path, smoke: bool) -> list[str]:
    """The bundle's own workflow with the settings of a run."""
    options = {
        "cache_dir": data / "cache",
        "dataset_dir": data / f"{run.task}.json",
        "output_dir": out,
        "seed": run.seed,
        "bundle_root": ".",
    }
    scans = len(json.loads((data / f"{run.task}.json").read_text())["training"])
    crop = run.options.get("crop_size", [16] * 3 if smoke else [64] * 3 if run.task == "brain" else [40, 56, 40])
    subjects = 2 if smoke else run.options.get("data_options#max_subjects", scans)
    steps = 2 if smoke else run.steps
    if run.kind == "pretrain":
        overlay = f",'{ROOT / run.options['overlay']}'" if "overlay" in run.options else ""
        config = f"['configs/pretrain.json'{overlay}]"
        batch, per_epoch = (2, 2) if smoke else (48, 150)
        options |= {"spacing": [2, 2, 2], "min_spacing": [2, 2, 2], "max_spacing": [2, 2, 2], "encoder#patch_size": 4}
        options |= {"encoder_path": out / "encoder.pt", "learning_rate": 0.001}
    else:
        overlay = "" if run.task == "brain" else f",'configs/{run.task}.json'"
        config = f"['configs/train.json'{overlay}]"
        batch, per_epoch, scans = (1, 2, subjects) if smoke else (4, 500, subjects)
        options["pretrained"] = "null" if run.encoder is None else encoders / f"{run.encoder}.pt"
    epochs = max(1, steps // per_epoch)
    options |= {
        "epochs": epochs,
        "batch_size": batch,
        "crop_size": crop,
        "val_interval": epochs if run.kind == "pretrain" else 3 if run.name.startswith("weights") and not smoke else 1,
    }
    options["crops_per_scan"] = max(1, round(per_epoch * batch / scans))
    options |= {key: value for key, value in run.options.items() if key not in ("crop_size", "overlay")}
    if smoke and run.kind == "segment":  # few windows of one scan
        options |= {"data_options#max_subjects": subjects, "roi_size": [64] * 3, "validate#max_scans": 1}
    words = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", config]
    return [str(word) for word in words + [word for key, value in options.items() for word in (f"--{key}", value)]]


def outcome(run: Run, out: Path) -> dict:
    """What a finished run says: scores by step."""
    with (out / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if run.kind == "pretrain":
        return {"masked_error": float(rows[-1]["masked_error"]), "high": float(rows[-1]["high_frequency_error"])}
    curve = [[int(row["iteration"]), round(float(row["dice"]), 4)] for row in rows if row.get("dice")]
    best = max(dice for _, dice in curve)
    return {"best": best, "last": curve[-1][1], "to_95": next(n for n, d in curve if d >= 0.95 * best), "curve": curve}


def keep_encoders(out: Path, todo: list[Run]) -> None:
    """Delete encoders that no run needs any more, and beyond ``ENCODERS`` those that are needed last."""
    needed = list(dict.fromkeys(run.encoder for run in todo if run.encoder))
    for file in out.glob("pretrain_*.pt"):
        if file.stem not in needed[:ENCODERS]:
            file.unlink()


def needed_first(run: Run, all_runs: dict[str, Run], out: Path) -> Run:
    """The run, or the pretraining that it starts from, if that was of an earlier piece and not kept."""
    return all_runs[run.encoder] if run.encoder and not (out / f"{run.encoder}.pt").is_file() else run


def next_run(todo: list[Run], all_runs: dict[str, Run], out: Path, spent: dict[str, float], left: float) -> Run | None:
    """The first run, or pretraining that one needs, that is expected to end within ``left`` seconds."""
    candidates = (needed_first(run, all_runs, out) for run in todo)
    return next((run for run in candidates if spent[run.kind] * run.steps / 1500 <= left), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--runs", type=int, help="at most so many")
    parser.add_argument("--weights", action="store_true", help="train what is to ship")
    parser.add_argument("--smoke", action="store_true", help="two steps of the first two runs, on the CPU")
    args = parser.parse_args()
    most = args.runs or (2 if args.smoke else 10**6)
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    file, data = args.out / "results.jsonl", args.data.resolve()
    lines = file.read_text().splitlines() if file.is_file() else []
    results: dict[str, dict] = {}
    failures: dict[str, int] = {}
    spent = {"pretrain": 240.0, "segment": 60.0}  # seconds of 1,500 steps: guesses at first

    def learn(row: dict) -> None:
        seconds = row["seconds"] * 1500 / row["steps"]
        if row.get("timeout"):
            spent[row["kind"]] = max(spent[row["kind"]], 1.3 * seconds)
            failures[row["name"]] = failures.get(row["name"], 0) + (row["seconds"] > PIECE)
        elif "error" in row:
            failures[row["name"]] = failures.get(row["name"], 0) + 1
        else:
            results[row["name"]] = row
            spent[row["kind"]] = seconds

    for row in map(json.loads, lines):
        learn(row)
    scans = len(json.loads((data / "brain.json").read_text())["training"])
    if scans < 110 and not args.smoke:
        sys.exit(f"{data} has {scans} training scans of 110: unpack study.tar into an empty folder.")
    device, done = "cuda" if torch.cuda.is_available() else "cpu", 0
    while True:
        hopeless = {name for name, n in failures.items() if n >= TRIES}
        all_runs = {run.name: run for run in (weights(data) if args.weights else queue(results, hopeless))}
        todo = [run for run in all_runs.values() if not {run.name, run.encoder} & hopeless and run.name not in results]
        if not todo:
            print("no run is left")
            break
        keep_encoders(args.out, todo)
        fits = next_run(todo, all_runs, args.out, spent, 600 if args.smoke else end - time.monotonic())
        if done >= most or (fits is None and done):
            print(f"next: {todo[0].name}")
            break
        run = fits or needed_first(todo[0], all_runs, args.out)
        with tempfile.TemporaryDirectory() as folder:
            out, start = Path(folder) / "run", time.monotonic()
            words = command(run, data, args.out.resolve(), out, args.smoke)
            left = 600 if args.smoke else max(end - start, 1)
            try:
                log = subprocess.run(words, cwd=BUNDLE, capture_output=True, text=True, timeout=left)
                text, failed = log.stdout + log.stderr, log.returncode
            except subprocess.TimeoutExpired as error:
                text, failed = (error.stdout or b"").decode() + (error.stderr or b"").decode(), None
            row = {"seconds": round(time.monotonic() - start, 1), **asdict(run), **facts(device)}
            row["compiled"] = "the training step is compiled" in text
            if failed is None:
                row |= {"timeout": True, "error": f"did not end within the {left:.0f} s that were left"}
            elif failed:
                row["error"] = text.strip().splitlines()[-1]
            else:
                row |= outcome(run, out)
                if run.kind == "pretrain" or args.weights:
                    trained = out / ("encoder.pt" if run.kind == "pretrain" else "models/model.pt")
                    state = torch.load(trained, map_location="cpu", weights_only=True)
                    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
                    torch.save(half, args.out / f"{run.name}.pt")
        learn(row)
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        shown = ("name", "seconds", "compiled", "best", "to_95", "masked_error", "error")
        print({key: row[key] for key in shown if key in row}, flush=True)
        done += 1


if __name__ == "__main__":
    main()
