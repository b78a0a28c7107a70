"""The runs of the study: the bundle's own workflows, each in its own process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.common import ROOT, read_csv, read_manifest, subject_of
from benchmarks.restoration.evaluation import training_scans
from benchmarks.study import protocol
from sspformer.io import write_atomically

KEEPING = threading.Lock()


@dataclass(frozen=True)
class Cell:
    """A run of the matrix: its name, whether it is complete, and what does it."""

    name: str
    complete: Callable[[], bool]
    run: Callable[[], None]


class Study:
    """The study's data and runs.

    Args:
        data: folder with manifest.csv.
        work_dir: folder of the runs.
        jobs: runs at a time, which share the CPU cores.
    """

    def __init__(self, data: Path, work_dir: Path, jobs: int) -> None:
        self.data, self.work_dir = data.resolve(), work_dir.resolve()
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs)

    # -- data ---------------------------------------------------------------------------------------------------------

    @cached_property
    def manifest(self) -> list[dict[str, str]]:
        """Rows of manifest.csv."""
        return read_manifest(self.data)

    def datalist(
        self, name: str, splits: dict[str, Sequence[str]], folders: Sequence[str], files: Collection[str] | None = None
    ) -> Path:
        """Write a datalist in the MSD's format, with labels where there are any.

        Args:
            name: of the file.
            splits: the manifest's splits in each section.
            folders: beginnings of the files' names.
            files: take these alone; None: all.
        """
        items = {}
        for section, wanted in splits.items():
            rows = [row for row in self.manifest if row["split"] in wanted and row["file"].startswith(tuple(folders))]
            items[section] = [self._item(row) for row in rows if files is None or row["file"] in files]
        return keep(self.work_dir / f"{name}.json", json.dumps(items, indent=1))

    def _item(self, row: dict[str, str]) -> dict[str, str]:
        item = {"image": os.path.relpath(self.data / row["file"], self.work_dir), "subject": subject_of(row)}
        label = self.data / row["file"].replace("/images/", "/labels/")
        if "/images/" in row["file"] and label.is_file():
            item["label"] = os.path.relpath(label, self.work_dir)
        return item

    # -- workflows ----------------------------------------------------------------------------------------------------

    def bundle(self, run_id: str, config: str, overlays: Sequence[str], options: Sequence[str], output: Path) -> None:
        """Run one of the bundle's workflows in its own process; log and seconds go to its output folder."""
        output.mkdir(parents=True, exist_ok=True)
        log = output / f"{run_id}.log"
        files = [str(file) if Path(file).suffix else f"configs/{file}.json" for file in (config, *overlays)]
        command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(files)]
        command += ["--meta_file", "configs/metadata.json", "--logging_file", "configs/logging.conf"]
        command += [*options, "--output_dir", str(output)]
        start = time.perf_counter()
        self.process(command, log)
        with (output / "seconds.csv").open("a") as file:
            file.write(f"{run_id},{time.perf_counter() - start:.0f}\n")

    def process(self, command: Sequence[str | Path], log: Path) -> None:
        """Run a command in the bundle's folder, on this run's share of the cores, and log its output."""
        path = [str(ROOT / "custom"), str(ROOT), os.environ.get("PYTHONPATH")]
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": str(self.threads)}
        with log.open("a") as file:
            result = subprocess.run(
                command, cwd=ROOT / "bundle", env={**os.environ, **variables}, stdout=file, stderr=file
            )
        if result.returncode:
            raise RuntimeError(f"failed, see {log}:\n{''.join(log.read_text().splitlines(True)[-5:])}")

    def pretrain(self, name: str, seed: int) -> Cell:
        """One of the pretrainings."""
        output = self.pretraining_of(name, seed)
        overlays, options = protocol.PRETRAININGS[name]
        epochs = options["epochs"]

        def run() -> None:
            lists = self.datalist("pretrain", *protocol.UNLABELLED)
            fixed = {"dataset_dir": lists, "cache_dir": self.work_dir / "cache", "seed": seed, "val_interval": epochs}
            self.bundle("training", "pretrain", overlays, as_options(fixed | protocol.SHARED | options), output)

        return Cell(f"pretrain {name} {seed}", lambda: pretrained(output, epochs), run)

    def segment(self, task: str, n_labels: int, start: str, seed: int) -> Cell:
        """Fine-tuning from a start, or a peer's training; then Dice of the test subjects, which contenders of the
        design alone do not see."""
        output = self.run_of(task, n_labels, start, seed)
        overlays = overlays_of(task, start)
        _, options = protocol.STARTS.get(start, (None, {}))
        test = start not in protocol.DESIGN or start in protocol.MAIN

        def run() -> None:
            settings = {"pretrained": self.encoder(start, seed), **options}
            self.fine_tune(task, n_labels, seed, steps_of(task, start), overlays, settings, output)
            if test:
                self.evaluate(task, start, [], output, output / "evaluation")

        scores = output / "evaluation" / "metrics.csv"
        return Cell(
            f"{'segment' if test else 'design'} {task} {n_labels} {start} {seed}",
            lambda: scores.is_file() if test else fine_tuned(output, task, n_labels, start),
            run,
        )

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
        """Train a segmentation for about so many steps, and validate about four times on the way."""
        crops, epochs = schedule(task, n_labels, steps)
        if epochs_done(output) >= epochs:
            return
        options = {
            "dataset_dir": self.labelled(task),
            "seed": seed,
            "batch_size": protocol.TASKS[task]["batch"],
            "data_options#max_subjects": n_labels,
            "crops_per_scan": crops,
            "epochs": epochs,
            "val_interval": max(1, epochs // 4),
            "validate#max_scans": protocol.TASKS[task]["validation"],
            "inferer#overlap": 0.25,  # of the validation alone; test subjects have the bundle's own
            "cache_dir": self.work_dir / "cache",
            **options,
        }
        self.bundle("training", "train", overlays, as_options(options), output)

    def restore(self, task: str, start: str, seed: int) -> Cell:
        """Training of denoising or super-resolution, with the same starts; then PSNR of the test scans."""
        settings, evaluation = protocol.RESTORATION[task]
        output = self.work_dir / f"{task}_{settings['epochs']}" / f"{start}_{seed}"

        def run() -> None:
            if epochs_done(output) < settings["epochs"]:
                options = {
                    **settings,
                    "dataset_dir": self.restoration_list(task),
                    "seed": seed,
                    "pretrained": self.encoder(start, seed),
                    "val_interval": settings["epochs"],
                    "validate#max_scans": 3,
                    "cache_dir": self.work_dir / "cache",
                }
                self.bundle("training", "train", ["restoration", task], as_options(options), output)
            command = [sys.executable, "-m", f"benchmarks.restoration.{task}", "--data", self.data, *evaluation]
            part = output / "quality.part.csv"
            command += ["--weights", f"{start}={output / 'models' / 'model.pt'}", "--output", part]
            self.process(command, output / "evaluation.log")
            part.replace(output / "quality.csv")

        return Cell(f"restore {task} {start} {seed}", (output / "quality.csv").is_file, run)

    def labelled(self, task: str) -> Path:
        """Datalist of a segmentation."""
        return self.datalist(task, protocol.TASKS[task]["splits"], [f"{task}/images/"])

    def restoration_list(self, task: str) -> Path:
        """Datalist of a restoration's training."""
        files = {row["file"] for row in training_scans(self.data, task)}
        return self.datalist(task, {"training": ["train"]}, protocol.UNLABELLED[1], files)

    def robustness(self, task: str, n_labels: int, start: str, seed: int, artifact: str) -> Cell:
        """Dice of a fine-tuned network on test scans with an artifact."""
        output = self.run_of(task, n_labels, start, seed)
        target = output / f"evaluation_{artifact}"

        def run() -> None:
            changes = protocol.ARTIFACT_OVERLAY | {"+preprocessing": [protocol.ARTIFACTS[artifact], protocol.RESCALING]}
            overlay = keep(self.work_dir / "artifacts" / f"{artifact}.json", json.dumps(changes))
            self.evaluate(task, start, [overlay], output, target)

        return Cell(f"robustness {task} {n_labels} {start} {seed} {artifact}", (target / "metrics.csv").is_file, run)

    def evaluate(self, task: str, start: str, overlays: Sequence[str | Path], run: Path, output: Path) -> None:
        """Score the test subjects of a task, by Dice alone."""
        options = {
            "dataset_dir": self.labelled(task),
            "weights": run / "models" / "model.pt",
            "max_pictures": 1,
            "evaluation#additional_metrics": "{}",
        }
        files = [*overlays_of(task, start), *overlays, "evaluate"]
        self.bundle("evaluating", "train", files, as_options(options), output)

    def run_of(self, task: str, n_labels: int, start: str, seed: int) -> Path:
        """Output folder of a fine-tuning."""
        return self.work_dir / f"{task}_{protocol.TASKS[task]['steps']}" / f"{n_labels}_{start}_{seed}"

    def pretraining_of(self, name: str, seed: int) -> Path:
        """Output folder of a pretraining."""
        return self.work_dir / "pretrain" / f"{name}_{seed}"

    def encoder(self, start: str, seed: int) -> Path | str:
        """What a start's pretraining wrote; ``null`` for scratch and for peers, which start from random weights.

        Raises:
            RuntimeError: if the pretraining is not complete.
        """
        name, _ = protocol.STARTS.get(start, (None, {}))
        if name is None:
            return "null"
        if not (pretraining := self.pretrain(name, seed)).complete():
            arm = f" --arms {name}" if name in protocol.ARMS else ""
            raise RuntimeError(f"{pretraining.name} is not complete: --stages pretrain design{arm} --seeds {seed}")
        return self.pretraining_of(name, seed) / "models" / "pretrained" / "encoder.pt"


def overlays_of(task: str, start: str) -> list[str | Path]:
    """Overlays of train.json for a segmentation, and for a peer."""
    return [
        *protocol.TASKS[task]["overlays"],
        *([protocol.CONFIGS / f"{start}.json"] if start in protocol.PEERS else []),
    ]


def keep(path: Path, text: str) -> Path:
    """Write a text file that other runs may read or write at the same time."""
    with KEEPING:
        if not path.is_file() or path.read_text() != text:
            write_atomically(path, text)
    return path


def as_options(settings: dict[str, object]) -> list[str]:
    """Command-line options of a workflow."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def schedule(task: str, n_labels: int, steps: int) -> tuple[int, int]:
    """Crops per scan, and epochs; an epoch has about 50 steps, or one crop of each subject."""
    batch = protocol.TASKS[task]["batch"]
    crops = max(1, round(50 * batch / n_labels))
    return crops, max(1, round(steps / -(-n_labels * crops // batch)))


def steps_of(task: str, start: str) -> int:
    """Steps of a fine-tuning, or of a peer's training."""
    return round(protocol.TASKS[task]["steps"] * protocol.PEERS.get(start, 1))


def fine_tuned(output: Path, task: str, n_labels: int, start: str) -> bool:
    """Whether a fine-tuning is complete."""
    return epochs_done(output) >= schedule(task, n_labels, steps_of(task, start))[1]


def epochs_done(output: Path) -> int:
    """Epochs in the history of a run."""
    return max((int(float(row["epoch"])) for row in read_csv(output / "history.csv")), default=0)


def pretrained(output: Path, epochs: int) -> bool:
    """Whether a pretraining is complete: it writes its last encoder after the last row of its history."""
    history, encoder = output / "history.csv", output / "models" / "pretrained" / "encoder.pt"
    written = encoder.is_file() and encoder.stat().st_mtime >= history.stat().st_mtime
    return written and epochs_done(output) >= epochs


def run_all(cells: Sequence[Cell], jobs: int) -> list[str]:
    """Run the cells that are not complete, ``jobs`` at a time; return the names of those that failed."""
    left = [cell for cell in cells if not cell.complete()]
    print(f"{len(cells) - len(left)} of {len(cells)} runs are complete", flush=True)
    lock, start = threading.Lock(), time.perf_counter()
    done: list[str] = []
    failed: list[str] = []

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

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, left))
    return failed


def matrix(study: Study, args: argparse.Namespace) -> list[list[tuple[str, Cell]]]:
    """The runs in the order of their worth, each with its stage; those of one list need only what is before it.

    First the main starts on each task with the first of its numbers of labels, seed by seed, then the scans with
    artifacts, the contenders of the design with the first seed, restoration, and other arms that are asked for. With
    ``full`` all arms, the other numbers of labels, and the peers.
    """
    groups: list[list[tuple[str, Cell]]] = []
    labels = [(task, protocol.TASKS[task]["labels"]) for task in args.tasks]
    few, more = [(task, n[0]) for task, n in labels], [(task, n) for task, several in labels for n in several[1:]]

    def pretrain(names: Iterable[str], seed: int) -> None:
        groups.append([("pretrain", study.pretrain(name, seed)) for name in names])

    def segment(tasks: Sequence[tuple[str, int]], starts: Sequence[str], seed: int) -> None:
        groups.append([("segment", study.segment(task, n, start, seed)) for task, n in tasks for start in starts])

    def test_otherwise(starts: Sequence[str], seed: int) -> None:
        if protocol.ROBUSTNESS in few:
            several = [(start, name) for start in starts for name in protocol.ARTIFACTS]
            groups.append(
                [("robustness", study.robustness(*protocol.ROBUSTNESS, s, seed, name)) for s, name in several]
            )

    def restore(starts: Sequence[str], seed: int) -> None:
        groups.append([("restore", study.restore(task, s, seed)) for task in protocol.RESTORATION for s in starts])

    arms = args.arms or [arm for arm in protocol.ARMS if args.full or arm in protocol.MAIN]
    main, others = ([arm for arm in arms if (arm in protocol.MAIN) == wanted] for wanted in (True, False))
    starts = ["scratch", *main]
    for seed in args.seeds:
        pretrain(main, seed)
        segment(few, starts, seed)
    for seed in args.seeds:
        test_otherwise(starts, seed)
    task, n, seed = "brain_structures", protocol.TASKS["brain_structures"]["labels"][0], args.seeds[0]
    wanted = "design" in args.stages and task in args.tasks
    design = [start for start in protocol.DESIGN if wanted and start not in protocol.MAIN]
    pretrain(dict.fromkeys(name for start in design if (name := protocol.STARTS[start][0])), seed)
    groups.append([("design", study.segment(task, n, start, seed)) for start in design])
    for seed in args.seeds:
        restore(starts, seed)
    for seed in args.seeds if others else ():
        pretrain(others, seed)
        segment(few, others, seed)
        test_otherwise(others, seed)
        restore(others, seed)
    for seed in args.seeds if args.full else ():
        segment(more, starts, seed)
        segment(few + more, [peer for peer in args.peers if seed == args.seeds[0]], seed)
    return groups
