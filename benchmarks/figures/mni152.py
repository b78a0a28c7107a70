"""The weights that ship on the MNI152 brain: scores that anyone can recompute, and a picture.

    python -m benchmarks.figures.mni152

The nilearn package has this average of 152 people with maps of its grey and white matter, so the script needs no data.
No training has seen it. Unlike a scan it has no noise. So these scores tell whether the weights work here as they did
where they were published (``tests/test_weights.py`` compares), and not how well they do on scans.

- ``model.pt``: Dice of the structures that are grey matter, and of those that are white matter, against the maps
  (above 0.5).
- ``denoising/model.pt``: gain in PSNR of a central region with 9 % Rician noise, dB.
- ``super_resolution/model.pt``: gain in PSNR over zero-filling of that region at half the resolution of all axes, dB.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.metrics import PSNRMetric, compute_dice
from torch import Tensor

from benchmarks.common import BUNDLE, IMAGES, RESULTS, facts, save_csv, segment
from benchmarks.restoration.evaluation import bundle_config, load_weights, restore
from sspformer.data import class_names
from sspformer.demo import make_demo_head
from sspformer.io import format_table
from sspformer.kspace import data_consistency, fourier_resample
from sspformer.transforms import frequency_weighted_noise

WHITE = ("cerebral white matter", "cerebellar white matter", "brain stem")
GREY = ("cortical grey matter", "cerebellar grey matter", "thalamus", "caudate", "putamen", "pallidum", "hippocampus")
GREY += ("amygdala", "accumbens")
REGION = (slice(None), slice(50, 146), slice(70, 166), slice(60, 124))  # 96 x 96 x 64 mm around the middle


def segmentation(folder: Path) -> list[dict]:
    """Dice of grey and white matter, as rows, from the bundle's own inference with its defaults."""
    from nilearn import datasets

    segment(make_demo_head(folder / "head"), folder / "out", pictures=True)
    labels = next((folder / "out").rglob("*_seg.nii.gz"))
    predicted = torch.from_numpy(np.asarray(nib.load(labels).dataobj).astype(np.int64))
    names = class_names(str(BUNDLE))
    rows = []
    for tissue, structures in {"grey matter": GREY, "white matter": WHITE}.items():
        load = datasets.load_mni152_gm_template if tissue == "grey matter" else datasets.load_mni152_wm_template
        truth = torch.from_numpy(load(resolution=1).get_fdata(dtype=np.float32)) > 0.5
        values = torch.tensor([1 + names.index(structure) for structure in structures])
        dice = compute_dice(torch.isin(predicted, values)[None, None], truth[None, None])
        rows.append({"weights": "models/model.pt", "figure": f"Dice of {tissue}", "value": round(dice.item(), 4)})
    return rows


def restoration(task: str, folder: Path) -> dict:
    """Gain in PSNR of one of the restoration models, dB."""
    clean = torch.from_numpy(nib.load(make_demo_head(folder / "head")).get_fdata(dtype=np.float32))[None]
    clean = (clean / np.percentile(clean.numpy(), 99.5))[REGION]
    if task == "denoising":
        generator = torch.Generator().manual_seed(0)
        degraded = frequency_weighted_noise(clean[None], 0.09, generator=generator, intensity_range=1.0)[0]
    else:
        sides = clean.shape[1:]
        low = fourier_resample(clean[None], [side // 2 for side in sides])
        degraded = fourier_resample(low, sides)[0]
    config = bundle_config("inference", task, "cpu")
    weights = BUNDLE / "models" / task / "model.pt"
    network = load_weights(config.get_parsed_content("network_def"), weights)
    pred = restore(degraded, network, config.get_parsed_content("inferer"), "cpu")
    if task == "super_resolution":
        pred = data_consistency(pred[None], low)[0]

    def psnr(image: Tensor) -> float:
        return float(PSNRMetric(max_val=1.0)(image[None], clean[None]))

    gain = round(psnr(pred) - psnr(degraded), 3)
    what = "9 % noise" if task == "denoising" else "half the resolution"
    return {"weights": f"models/{task}/model.pt", "figure": f"gain in PSNR at {what}, dB", "value": gain}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = segmentation(Path(folder))
        rows += [restoration(task, Path(folder)) for task in ("denoising", "super_resolution")]
        picture = next(Path(folder).rglob("*.png"))
        (IMAGES / "mni152.png").write_bytes(picture.read_bytes())
    save_csv(RESULTS / "mni152.csv", [{**row, **facts()} for row in rows])
    print(format_table(rows))


if __name__ == "__main__":
    main()
