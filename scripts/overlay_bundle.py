"""Make a bundle of its own of an overlay and its weights, for clients that see only inference.json, train.json and
models/model.pt, such as MONAI Label.

    python scripts/overlay_bundle.py /path/to/sspformer_mri hippocampus /path/to/sspformer_hippocampus

Its configs are those of the bundle with the overlay merged into them, its models/model.pt is the overlay's; of the
documentation only the licences come along.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from monai.bundle import ConfigParser

WORKFLOWS = ("train", "inference")


def main(bundle: Path, overlay: str, target: Path) -> None:
    weights = bundle / "models" / overlay / "model.pt"
    config, licence = bundle / f"configs/{overlay}.json", bundle / "docs/data_license.txt"
    for path in (config, weights, bundle / "models/pretrained/encoder.pt", licence):
        if not path.is_file():
            names = sorted(path.parent.name for path in bundle.glob("models/*/model.pt"))
            sys.exit(f"error: {path} does not exist; overlays with weights in {bundle}: {', '.join(names) or 'none'}.")
    changes = json.loads(config.read_text())
    if changes.get("name", "segmentation") != "segmentation":
        sys.exit(f"error: {overlay}.json is no segmentation, and MONAI Label takes label maps alone.")
    if target.exists():
        sys.exit(f"error: {target} exists: give another folder, or remove it.")

    # overlays of tasks and the documentation are about weights that are left out
    of_task = {"name", "class_names"}
    configs = {path.name: json.loads(path.read_text()) for path in bundle.glob("configs/*.json")}
    tasks = {name for name, entries in configs.items() if name != "metadata.json" and of_task & entries.keys()}
    made = {"output", "demo_data", "demo_head", "__pycache__"}
    left_out = {"models", "docs", *made, *tasks - {f"{name}.json" for name in WORKFLOWS}}
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns(*left_out))
    (target / "docs").mkdir()
    shutil.copy(licence, target / "docs")
    (target / "models/pretrained").mkdir(parents=True)
    shutil.copy(weights, target / "models/model.pt")
    shutil.copy(bundle / "models/pretrained/encoder.pt", target / "models/pretrained/encoder.pt")

    # these classes are now the bundle's own in metadata.json, which does not make them a whole head
    changes = {**changes, "weights": "$@bundle_root + '/models/model.pt'", "whole_head": False}
    for workflow in WORKFLOWS:
        parser = ConfigParser()
        parser.read_config([str(bundle / "configs" / f"{workflow}.json")])
        parser.update({key: value for key, value in changes.items() if key.partition("#")[0] in parser.get()})
        ConfigParser.export_config_file(parser.get(), str(target / "configs" / f"{workflow}.json"), indent=4)
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    pred = metadata["network_data_format"]["outputs"]["pred"]
    pred["channel_def"] = {str(i): name for i, name in enumerate(["background", *changes["class_names"]])}
    pred["num_channels"] = len(pred["channel_def"])
    classes = ", ".join(changes["class_names"])
    metadata.pop("eval_metrics", None)
    metadata |= {
        "name": f"{metadata['name']}, {overlay}",
        "task": f"Segmentation in MRI: {classes}",
        "description": f"A vision transformer, pretrained on unlabelled MRI and fine-tuned to segment: {classes}.",
        "data_source": f"docs/data_license.txt, where the weights are models/{overlay}/model.pt; the user's own scans",
        "image_classes": "single-channel MRI",
        "label_classes": classes,
        "pred_classes": classes,
    }
    (target / "configs/metadata.json").write_text(json.dumps(metadata, indent=4) + "\n")
    print(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the unpacked bundle")
    parser.add_argument("overlay", help="a config of it whose weights are in models/OVERLAY/, such as hippocampus")
    parser.add_argument("target", type=Path, help="folder to make; its name is that of the model in MONAI Label")
    main(**vars(parser.parse_args()))
