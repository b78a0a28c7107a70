"""Pretrain a small SSPFormer on MRI scans, fine-tune it for segmentation and denoising, score both on held-out scans,
run them on one scan, and draw a panel of it all, in about ten minutes on a CPU.

    ./quickstart.sh [--dataset_dir FOLDER] [--labels NAME,NAME,...] [--output_dir FOLDER] [--KEY VALUE ...]

--KEY VALUE is any other entry of bundle/configs/pretrain.json, such as --epochs 100, and is for the pretraining.

The first run installs everything into .venv. PYTHON chooses the interpreter to make it with. SSPFORMER_PYTHON names an
interpreter that has everything installed already, which is then used as it is.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bundle" / "configs"


def crops(total: int) -> str:
    """As many crops of each scan as make about this many in an epoch."""
    return f"$max(1, round({total} / len(@datalist['training'])))"


# suited to some ten minutes on two CPU cores, from a dozen scans or a hundred; options on the command line win
PRETRAINING = {
    **{"epochs": 12, "val_interval": 4, "learning_rate": 0.001, "crop_size": [64, 64, 64]},
    "crops_per_scan": crops(96),
}
FINE_TUNING = {
    "segmentation": {
        **{"epochs": 20, "val_interval": 20, "validate#max_scans": 2},
        **{"crop_size": [48, 48, 48], "crops_per_scan": crops(48)},
    },
    "denoising": {"epochs": 3, "val_interval": 3, "validate#max_scans": 2, "crops_per_scan": crops(240)},
}
OVERLAYS = {"segmentation": [], "denoising": ["restoration", "denoising"]}
DEMO_LABELS = "grey matter,white matter,cerebrospinal fluid"
#: options of pretrain.json that are paths: of the folder of the command, not of the bundle's
PATHS = ("cache_dir", "encoder_path")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"quickstart.sh: error: {message} (./quickstart.sh --help shows the usage)\n")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The script's own options, and those of the pretraining."""
    parser = Parser("quickstart.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage, parser.allow_abbrev = argparse.SUPPRESS, False
    parser.add_argument(
        "--dataset_dir",
        type=Path,
        metavar="FOLDER",
        help="your scans (NIfTI or DICOM, in any arrangement), one file, or a datalist JSON; without it, demonstration "
        "data are made",
    )
    parser.add_argument(
        "--labels",
        metavar="NAMES",
        help="your scans are in images/ and have label maps in labels/: the names of the values 1, 2, ...; without it, "
        "your scans are not segmented",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="FOLDER",
        help="where the results go (default: output/quickstart_NAME in this repository, after the data)",
    )
    own, rest = parser.parse_known_args(arguments)
    if own.dataset_dir and not own.dataset_dir.exists():
        parser.error(f"--dataset_dir '{own.dataset_dir}' does not exist.")
    if own.output_dir and own.output_dir.is_file():
        parser.error(f"--output_dir '{own.output_dir}' is a file, not a folder.")
    if own.labels is not None and not own.labels.strip():
        parser.error("--labels needs a value.")
    try:
        options = dict(pairs(rest))
        for key in options:
            check_name(key)
    except ValueError as error:
        parser.error(str(error))
    return own, {key: os.path.abspath(value) if key in PATHS else value for key, value in options.items()}


def pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of ``--KEY VALUE`` and ``--KEY=VALUE``."""
    words = list(words)
    while words:
        word = words.pop(0)
        if not re.match("--.", word):
            raise ValueError(f"'{word}' is not an option: options are given as --KEY VALUE.")
        key, equals, value = word[2:].partition("=")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if not value:
            raise ValueError(f"--{key} needs a value.")
        yield key, value


def check_name(key: str) -> None:
    """Raise ``ValueError`` unless pretrain.json has this entry, or one that this may be an argument of."""
    from monai.bundle import ConfigParser  # here, so that --help needs no packages

    config = ConfigParser()
    config.read_config(str(CONFIGS / "pretrain.json"))
    outer, *inner = re.split("#|::", key)
    entry = "#".join([outer, *inner[:-1]])
    if entry not in config:
        close = difflib.get_close_matches(outer, ["dataset_dir", "labels", "output_dir", *config.get()], 1, cutoff=0.5)
        hint = f"; did you mean --{close[0]}?" if close and close[0] != outer else "."
        raise ValueError(f"--{key}: bundle/configs/pretrain.json has no entry '{entry}'{hint}")


def bundle(workflow: str, configs: Sequence[str], **options) -> None:
    """``python -m monai.bundle run``; ends the program if it fails, whose own message says why."""
    line = [sys.executable, "-m", "monai.bundle", "run", workflow]
    options = {
        "config_file": str([f"bundle/configs/{name}.json" for name in configs]),
        "bundle_root": "bundle",
        "meta_file": "bundle/configs/metadata.json",
        "logging_file": "bundle/configs/logging.conf",
        **options,
    }
    for key, value in options.items():
        line += [f"--{key}", json.dumps(value) if isinstance(value, (list, dict)) else str(value)]
    if status := subprocess.run(line, cwd=ROOT).returncode:
        sys.exit(status)


def say(text: str) -> None:
    print(f"\n\n=== {text}\n", flush=True)


def one_scan(datalist: Path) -> Path | None:
    """A datalist beside this one with a single scan, held out if one is; None if inference can take none (4D files)."""
    from sspformer.data import find_inputs

    lists, one = json.loads(datalist.read_text()), datalist.with_name("one_scan.json")
    for item in [*lists.get("validation", []), *lists["training"]]:
        one.write_text(json.dumps({"test": [item]}))
        if "image" in find_inputs(one)[0]:
            return one
    return None


def main(arguments: Sequence[str]) -> None:
    own, options = parse(arguments)
    from quickstart_panel import main as draw_panel

    from sspformer.demo import make_demo_dataset

    dataset_dir, labels, name = own.dataset_dir, own.labels, "demo"
    if dataset_dir:
        dataset_dir = dataset_dir.absolute()
        name = dataset_dir.resolve().name
    else:
        dataset_dir, labels = make_demo_dataset(ROOT / "bundle/demo_data"), labels or DEMO_LABELS
    output_dir = (own.output_dir or ROOT / "output" / f"quickstart_{name}").absolute()
    encoder = options.get("encoder_path", str(output_dir / "pretrain/models/pretrained/encoder.pt"))

    say(f"Pretraining on {dataset_dir}")
    where = {"dataset_dir": dataset_dir, "output_dir": output_dir / "pretrain"}
    bundle("training", ["pretrain"], **{**where, **PRETRAINING, **options})

    tasks = ["segmentation", "denoising"] if labels else ["denoising"]
    for task in tasks:
        of_task = {}
        if task == "segmentation":
            structures = labels.split(",")
            of_task = {"class_names": structures, "network_def#out_channels": len(structures) + 1}
        folder, overlays = output_dir / task, OVERLAYS[task]
        say(f"Fine-tuning for {task}")
        where = {"dataset_dir": dataset_dir, "output_dir": folder, "pretrained": encoder}
        bundle("training", ["train", *overlays], **where, **FINE_TUNING[task], **of_task)
        of_task["weights"] = folder / "models/model.pt"
        say(f"Scoring {task} on the scans that were held out")
        where = {"dataset_dir": folder / "datalist.json", "output_dir": folder / "evaluation", "max_pictures": 2}
        bundle("evaluating", ["train", *overlays, "evaluate"], **where, **of_task)
        scan = one_scan(folder / "datalist.json")
        if scan is None:
            say(f"No scan is 3D: {task} is not run on a new one, split 4D files into volumes for that")
            continue
        say(f"Running {task} on one scan, as you would on a new one")
        where = {"dataset_dir": scan, "output_dir": folder / "inference"}
        bundle("inference", ["inference", *overlays], **where, pictures=True, overwrite=True, **of_task)

    panel = draw_panel(output_dir, tasks)
    print(
        f"\nDone. The results are in {output_dir}:\n"
        f"  look at this     {panel}\n"
        f"  tasks            {', '.join(tasks)}: pictures/, evaluation/summary.csv, inference/ and models/model.pt "
        "of each\n"
        f"  encoder weights  {encoder}\n"
        f'  curves           {sys.executable} -m tensorboard.main --logdir "{output_dir}"'
    )


if __name__ == "__main__":
    main(sys.argv[1:])
