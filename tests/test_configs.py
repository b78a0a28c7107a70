"""The configs as text: short enough to read at once, and of one mind.

train.json, evaluate.json and inference.json say the same of the same thing, with every overlay: a network is only right
with the preprocessing it was trained with. Nothing is built here."""

import json
import re
import runpy
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from sspformer.options import SCHEMA

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bundle" / "configs"
FILES = sorted(set(CONFIGS.glob("*.json")) - {CONFIGS / "metadata.json"})
WORKFLOWS = ("train", "evaluate", "inference")
OVERLAYS = [
    ["hippocampus"],
    ["restoration", "denoising"],
    ["restoration", "super_resolution"],
    ["whole_scan", "classification"],
    ["whole_scan", "regression"],
]
#: entries with a default of their own in a workflow: what is read and written, and how fast
OWN = {
    *("dataset_dir", "output_dir", "data_options", "num_workers", "initialize", "finalize", "run"),
    *("network", "validate", "panel"),  # the network of train.json is pretrained; a panel is of an epoch or a subject
    *("dataset", "handlers", "evaluator"),  # by MONAI's names, of what validate holds in evaluate.json
    "keys",  # a label goes with the image only in training
}
NEEDED = {"name", "weights", "spacing", "crop_size", "roi_size", "encoder", "network_def", "preprocessing", "inferer"}


def read(*names):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
    return parser.get()


def config(workflow, *overlays):
    return read("train", *overlays, "evaluate") if workflow == "evaluate" else read(workflow, *overlays)


def strings(entry):
    if isinstance(entry, (dict, list)):
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from strings(part)
    elif isinstance(entry, str):
        yield entry


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_is_read_at_once(file):
    lines = file.read_text().splitlines()
    assert max(map(len, lines)) <= 120
    entries = json.loads(file.read_text())
    assert len(entries) <= 55 and sum(text.startswith("$") for text in strings(entries)) <= 47
    assert "@task" not in file.read_text()  # a task is an overlay


def test_evaluation_is_an_overlay():
    assert len((CONFIGS / "evaluate.json").read_text().splitlines()) <= 120
    assert not {"network_def", "preprocessing", "inferer"} & set(json.loads((CONFIGS / "evaluate.json").read_text()))


@pytest.mark.parametrize("overlays", [[], *OVERLAYS], ids=" + ".join)
def test_workflows_agree_on_what_they_share(overlays):
    configs = {workflow: config(workflow, *overlays) for workflow in WORKFLOWS}
    assert all(NEEDED <= set(entries) for entries in configs.values())
    for entries in configs.values():
        entries["inferer"].pop("sw_batch_size", None)
        entries.get("evaluation", {}).pop("settings", None)  # evaluate.json adds what it scored
    for key in set.union(*map(set, configs.values())) - OWN:
        values = [entries[key] for entries in configs.values() if key in entries]
        assert all(value == values[0] for value in values), key
    keys = [configs[workflow]["keys"] for workflow in WORKFLOWS]
    assert keys == (
        [["image"]] * 3 if {"restoration", "whole_scan"} & {*overlays} else [["image", "label"], ["image"], ["image"]]
    )


@pytest.mark.parametrize("overlays", OVERLAYS, ids=" + ".join)
def test_overlays_change_entries_that_there_are(overlays):
    merged = [config(workflow, *overlays) for workflow in WORKFLOWS]
    for i, overlay in enumerate(overlays):
        bases = [config(workflow, *overlays[:i]) for workflow in WORKFLOWS]
        for key in json.loads((CONFIGS / f"{overlay}.json").read_text()):
            first = key.partition("#")[0]
            is_used = re.search(rf"@{first}\b", json.dumps(merged))  # by another, such as the margin of restoration
            assert is_used or any(first in base for base in bases), f"{key} of {overlay}.json has no effect"


def test_the_tables_of_options_are_made_from_the_schema():
    script = runpy.run_path(str(ROOT / "scripts/options_page.py"))
    for page in script["pages"]():
        assert page.read_text() == script["page"](page), f"{page.name}: run python scripts/options_page.py"
    assert {option.section for option in SCHEMA.values()} == set(script["SECTIONS"])
