"""What train.json, evaluate.json and inference.json say of the same thing must be the same, with every overlay.

Read as text, without building anything: a network is only right with the preprocessing it was trained with."""

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

CONFIGS = Path(__file__).resolve().parents[1] / "bundle" / "configs"
WORKFLOWS = ("train", "evaluate", "inference")
OVERLAYS = ("hippocampus", "tissues", "denoising", "super_resolution")
#: entries with a default of their own in a workflow: what is read and written, and how fast
OWN = {
    *("imports", "class_names", "dataset_dir", "output_dir", "skip_unreadable", "num_workers", "sw_batch_size"),
    *("settings", "initialize", "finalize", "run", "network", "validate"),  # the network of train.json is pretrained
    *("dataset", "handlers", "evaluator"),  # by MONAI's names, of what validate holds in evaluate.json
    *("keys", "val_postprocessing", "key_metric", "additional_metrics"),  # labels; scores on the label's own grid
}
NEEDED = {"task", "spatial_dims", "spacing", "roi_size", "overlap", "network_def", "preprocessing", "inferer", "amp"}


def config(workflow, overlay=None):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in filter(None, (workflow, overlay))])
    return parser.get()


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_workflows_agree_on_what_they_share(overlay):
    configs = {workflow: config(workflow, overlay) for workflow in WORKFLOWS}
    overlaid = set(json.loads((CONFIGS / f"{overlay}.json").read_text())) if overlay else set()
    assert all(NEEDED <= set(entries) for entries in configs.values())
    for key in set.union(*map(set, configs.values())) - (OWN - overlaid):
        values = [entries[key] for entries in configs.values() if key in entries]
        assert all(value == values[0] for value in values), key
    # a label goes with the image only where there is one
    keys = [configs[workflow]["keys"] for workflow in WORKFLOWS]
    assert keys == ([["image"]] * 3 if "keys" in overlaid else [["image", "label"], ["image"], ["image"]])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_change_entries_that_there_are(overlay):
    bases = {workflow: config(workflow) for workflow in WORKFLOWS}
    entries = json.loads((CONFIGS / f"{overlay}.json").read_text())
    referred = json.dumps([entries, bases])
    for key in entries:
        first, *nested = key.split("#")
        is_used = f'"@{key}"' in referred  # by the overlay itself, such as the margin of super-resolution
        assert any(first in base for base in bases.values()) or is_used, f"{key} of {overlay}.json has no effect"
        if nested:  # needs its parent in all three: MONAI raises where it is missing
            assert all(isinstance(base[first], dict) for base in bases.values()), key
