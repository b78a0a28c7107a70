"""Prepare the bundle for the Hugging Face Hub, or for a pull request to MONAI's Model Zoo. Nothing is uploaded.

    python scripts/publish.py hub /path/to/folder
    python scripts/publish.py zoo /path/to/model-zoo/models --url https://huggingface.co/OWNER/sspformer_mri/resolve/0.5.0

Both make the folder sspformer_mri of build_bundle.py. ``hub`` adds the model card and, beside each .pt, the same
weights as .safetensors; it needs torch and safetensors. ``zoo`` replaces files over 1 MB, which the zoo's pull requests
must not hold, by large_files.yml. It names where each is below --url, with its SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import build_bundle

#: bytes of a file in a pull request to the zoo: --maxkb of its check-added-large-files, below its 25 MB for all files
LARGE = 1024 * 1024

CARD = """---
license: cc-by-sa-4.0
library_name: monai
pipeline_tag: image-segmentation
inference: false
tags:
- monai
- medical
- mri
- brain
- segmentation
- denoising
- super-resolution
- masked-autoencoder
metrics:
- dice
model-index:
- name: sspformer_mri
  results:
{results}---

"""

RESULT = """  - task:
      type: image-segmentation
      name: {task}
    dataset:
      type: {type}
      name: {dataset}
      split: test
    metrics:
    - type: dice
      name: mean Dice
      value: {value}
"""

#: in eval_metrics of metadata.json: task, type and name of the data set
SCORES = {
    "mean_dice": ("17 structures of a T1 head", "ixi", "IXI, 2 mm, automatic labels"),
    "hippocampus_mean_dice": (
        "anterior and posterior hippocampus",
        "msd-task04",
        "Medical Segmentation Decathlon, Task04, manual labels",
    ),
}


def model_card(bundle: Path) -> str:
    """The bundle's README as the Hub shows it, with front matter for its search."""
    scores = json.loads((bundle / "configs/metadata.json").read_text())["eval_metrics"]
    results = [
        RESULT.format(task=task, type=kind, dataset=dataset, value=scores[name])
        for name, (task, kind, dataset) in SCORES.items()
    ]
    text = (bundle / "docs/README.md").read_text(encoding="utf-8")
    return CARD.format(results="".join(results)) + re.sub(r"\]\((\w+\.png)\)", r"](docs/\1)", text)


def add_safetensors(bundle: Path) -> None:
    """Beside each .pt, a file that cannot hold code. torch.load of torch 2.13 reads it, and so does MONAI."""
    import torch
    from safetensors.torch import save_file

    for path in bundle.glob("models/**/*.pt"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        save_file(weights, path.with_suffix(".safetensors"), metadata={"format": "pt"})


def leave_out_large_files(bundle: Path, url: str) -> None:
    """Replace the bundle's large files by large_files.yml."""
    lines = ["large_files:"]
    for path in sorted(path for path in bundle.rglob("*") if path.is_file() and path.stat().st_size > LARGE):
        name = path.relative_to(bundle).as_posix()
        lines += [f'  - path: "{name}"', f'    url: "{url}/{name}"']
        lines += [f'    hash_val: "{hashlib.sha256(path.read_bytes()).hexdigest()}"', '    hash_type: "sha256"']
        path.unlink()
    (bundle / "large_files.yml").write_text("\n".join(lines) + "\n")


def main(place: str, folder: Path, url: str | None) -> None:
    if place == "zoo" and not url:
        sys.exit("error: the zoo downloads large files: say with --url below which address they are.")
    with tempfile.TemporaryDirectory() as output_dir:
        build_bundle.main(Path(output_dir), folder)
    bundle = folder / build_bundle.NAME
    if place == "hub":
        (bundle / "README.md").write_text(model_card(bundle), encoding="utf-8")
        add_safetensors(bundle)
    else:
        leave_out_large_files(bundle, url.rstrip("/"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", choices=("hub", "zoo"))
    parser.add_argument("folder", type=Path, help="gets the folder sspformer_mri")
    parser.add_argument("--url", help="of the zoo's large files: https://.../ that models/model.pt follows")
    main(**vars(parser.parse_args()))
