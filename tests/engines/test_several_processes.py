"""Several processes that pretrain one network, as torchrun starts them: gloo on the CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "bundle" / "configs"
#: a mask without draws, so that one process and two hide the same patches
MASK = """
import torch
from sspformer.transforms import MaskIndices

class EverySecond:
    def __call__(self, image, spacing, generator):
        order = torch.arange(8, device=image.device).expand(len(image), 8)
        return MaskIndices(mask=order[:, 1::2], keep=order[:, ::2])
"""
OPTIONS = {
    **{"epochs": 2, "crops_per_scan": 4, "val_interval": 2, "val_fraction": 0.34, "device": "cpu", "amp": False},
    **{"crop_size": [16, 16, 16], "spacing": [1, 1, 1], "num_workers": 0, "mask": {"_target_": "odd_mask.EverySecond"}},
    **{"noise": "null", "crops#augmentation#contrast#prob": 0, "learning_rate": 0.001},
    **{"encoder#dim": 24, "encoder#depth": 1, "encoder#num_heads": 2},
    "validate#prepare_batch#mask": {"_target_": "odd_mask.EverySecond"},
}


def pretrain(folder, scans, processes, **options):
    """Weights of the encoder and the last row of the history of a run in so many processes."""
    configs = [str(CONFIGS / "pretrain.json")] + [str(CONFIGS / "multi_gpu_train.json")] * (processes > 1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else ()), "-m", "monai.bundle", "run", "training"]
    options = {"config_file": configs, "dataset_dir": scans, "output_dir": folder, **OPTIONS, **options}
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    path = os.pathsep.join([str(ROOT / "custom"), str(scans.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return torch.load(folder / "models/pretrained/encoder.pt", weights_only=True), rows, done.stdout + done.stderr


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_pretrain_what_one_does_with_the_same_global_batch(tmp_path):
    (tmp_path / "odd_mask.py").write_text(MASK)
    scans = tmp_path / "scans"
    scans.mkdir()
    for i in range(6):
        voxels = np.random.default_rng(i).integers(200, 1000, (20, 22, 18)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), scans / f"sub-{i}.nii.gz")
    one, rows, _ = pretrain(tmp_path / "one", scans, 1, batch_size=4)
    two, of_two, log = pretrain(tmp_path / "two", scans, 2, batch_size=2)
    assert [row["iteration"] for row in of_two] == [row["iteration"] for row in rows] == ["4", "8"]
    assert log.count("epoch 2/2") == 1, log  # one process reports
    assert float(of_two[-1]["masked_error"]) == pytest.approx(float(rows[-1]["masked_error"]), rel=1e-3)
    weights = torch.cat([value.flatten().float() for value in one.values()])
    difference = torch.cat([(one[name] - two[name]).flatten().float() for name in one])
    assert difference.norm() < 0.001 * weights.norm()
