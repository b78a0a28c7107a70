"""Pretraining as users run it: ``python -m monai.bundle run training`` on NIfTI and DICOM, killed, resumed, and on
broken input."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sspformer.demo import make_demo_dataset
from sspformer.networks import SSPFormerEncoder

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(BUNDLE.parent / "custom"), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """Four subjects of the demonstration data, one of them a DICOM series."""
    return Path(make_demo_dataset(tmp_path_factory.mktemp("demo") / "scans", n_subjects=4))


def command(dataset, output, *overlays, **overrides):
    settings = {"epochs": 3, "crop_size": [32, 32, 32], "crops_per_scan": 4, "num_workers": 0, "device": "cpu"}
    arguments = {"dataset_dir": dataset, "output_dir": output, **settings, **overrides}
    line = [sys.executable, "-m", "monai.bundle", "run", "training"]
    configs = [str(BUNDLE / "configs" / name) for name in ("pretrain.json", *overlays)]
    line += ["--config_file", str(configs)]
    for key, value in arguments.items():
        line += [f"--{key}", value if isinstance(value, str) else json.dumps(value, default=str)]
    return [part.strip('"') for part in line]


def run(dataset, output, cwd, *overlays, **overrides):
    return subprocess.run(
        command(dataset, output, *overlays, **overrides),
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )


def history(output):
    with (Path(output) / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def trained(scans, tmp_path_factory):
    """A run long enough to learn, started from a folder that is not the bundle's."""
    output = tmp_path_factory.mktemp("trained") / "out"
    done = run(
        scans,
        output,
        output.parent,
        epochs=16,
        crop_size=[48, 48, 48],
        crops_per_scan=24,
        learning_rate=0.001,
        val_interval=4,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


def test_it_learns_more_than_the_mean(trained):
    output, _ = trained
    rows = history(output)
    assert len(rows) == 16
    last = {name: float(value) for name, value in rows[-1].items()}
    assert last["masked_error"] < 0.85 * last["mean_prediction_error"]
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    assert np.isfinite([last["psnr"], last["ssim"], last["high_frequency_error"]]).all()


def test_beta_follows_its_schedule_and_the_learning_rate_warms_up_and_falls(trained):
    rows = history(trained[0])
    beta = [float(row["beta"]) for row in rows]
    rate = [float(row["learning_rate"]) for row in rows]
    assert beta[0] == 0 and beta[7:] == [0.5] * 9 and np.all(np.diff(beta) >= 0)
    assert rate[0] == max(rate) and rate[-1] < 1e-3 * max(rate)


def test_what_a_run_leaves_behind(trained):
    output, log = trained
    for name in ("pictures/epoch_0016.png", "pictures/curves.png", "scans.csv", "models/checkpoint.pt"):
        assert (output / name).stat().st_size > 1000 or name == "scans.csv", name
    assert list((output / "tensorboard").glob("events.*"))
    state = torch.load(output / "models" / "pretrained" / "encoder.pt", weights_only=True)
    encoder = SSPFormerEncoder(spatial_dims=3, in_channels=1, patch_size=8, size="tiny")
    encoder.load_state_dict(state)  # strict: every weight, and nothing else
    assert not list((output / "models").glob("*.part"))
    with (output / "scans.csv").open() as file:
        rows = list(csv.DictReader(file))
    formats = sorted(row["format"] for row in rows if row["status"].startswith("usable"))
    assert formats == ["DICOM", "NIfTI", "NIfTI", "NIfTI"]
    assert "4 usable scans of 4 subjects" in log


def test_it_learns_from_a_dicom_series_alone(tmp_path):
    scans = Path(make_demo_dataset(tmp_path / "demo", n_subjects=3))
    settings = {"epochs": 15, "crop_size": [48, 48, 48], "crops_per_scan": 64, "learning_rate": 0.001}
    done = run(scans / "images" / "demo_03", tmp_path / "out", tmp_path, val_interval=15, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    last = history(tmp_path / "out")[-1]
    assert float(last["masked_error"]) < float(last["mean_prediction_error"])


def test_killed_and_resumed_equals_unkilled(scans, tmp_path):
    settings = {"epochs": 6, "val_interval": 2, "num_workers": 2, "cache_dir": str(tmp_path / "cache")}
    done = run(scans, tmp_path / "whole", tmp_path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr

    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command(scans, tmp_path / "killed", **settings), cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log
        )
        deadline = time.time() + 200
        while not ((tmp_path / "killed/history.csv").is_file() and len(history(tmp_path / "killed")) >= 3):
            assert process.poll() is None and time.time() < deadline, (tmp_path / "log.txt").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(history(tmp_path / "killed")) < 6, "it was killed too late to test anything"

    done = run(scans, tmp_path / "killed", tmp_path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from" in done.stdout
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    first, second = (
        torch.load(tmp_path / name / "models/pretrained/encoder.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)

    # the run is complete: its encoder can still be put elsewhere; other settings are refused unless it starts afresh
    elsewhere = tmp_path / "elsewhere" / "encoder.pt"
    again = run(scans, tmp_path / "killed", tmp_path, encoder_path=elsewhere, **settings)
    assert again.returncode == 0 and "this run is complete" in again.stdout
    third = torch.load(elsewhere, weights_only=True)
    assert all(torch.equal(first[name], third[name]) for name in first)

    changed = {**settings, "epochs": 2, "mask#stratify": False, "loss_function#normalize_target": True}
    refused = run(scans, tmp_path / "killed", tmp_path, **changed)
    assert refused.returncode != 0
    last_line = refused.stderr.strip().splitlines()[-1]
    assert last_line.startswith("error: ") and "epochs: 6 then, 2 now" in last_line and "--resume false" in last_line
    afresh = run(scans, tmp_path / "killed", tmp_path, resume=False, **changed)
    assert afresh.returncode == 0, afresh.stdout + afresh.stderr
    assert len(history(tmp_path / "killed")) == 2
    record = json.loads((tmp_path / "killed/models/checkpoint.json").read_text())
    assert record["mask"]["stratify"] is False and record["loss"]["normalize_target"] is True


def test_broken_input_stops_before_training_and_can_be_skipped(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        image = nib.Nifti1Image((rng.random((40, 36, 34)) * 1000).astype(np.int16), np.diag([2.0, 2, 2, 1]))
        nib.save(image, folder / f"p{i}_T1.nii.gz")
    whole = (folder / "p0_T1.nii.gz").read_bytes()
    (folder / "p8_T1.nii.gz").write_bytes(whole[: len(whole) // 2])
    stopped = run(folder, tmp_path / "out", tmp_path, **{"data_options#skip_unreadable": False})
    assert stopped.returncode != 0 and not (tmp_path / "out/models").exists()
    assert "p8_T1.nii.gz" in stopped.stderr and "--data_options#skip_unreadable true" in stopped.stderr
    went_on = run(folder, tmp_path / "out", tmp_path, **{"data_options#skip_unreadable": True}, epochs=1)
    assert went_on.returncode == 0, went_on.stdout + went_on.stderr

    missing = run(tmp_path / "scams", tmp_path / "out2", tmp_path)
    assert missing.returncode != 0 and "scams" in missing.stderr and "scans" in missing.stderr
    flat = run(folder, tmp_path / "out2", tmp_path, **{"data_options#skip_unreadable": True}, spatial_dims=2)
    assert flat.returncode != 0 and "pretrain_2d.json" in flat.stderr.splitlines()[-1]


def test_the_2d_overlay_trains_on_slices(scans, tmp_path):
    overrides = {"epochs": 1, "crop_size": [64, 48], "crops_per_scan": 2, "num_workers": 2}
    done = run(scans, tmp_path / "out", tmp_path, "pretrain_2d.json", **overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    state = torch.load(tmp_path / "out/models/pretrained/encoder.pt", weights_only=True)
    SSPFormerEncoder(spatial_dims=2, patch_size=16).load_state_dict(state)


def test_the_options_of_mask_and_loss_run(scans, tmp_path):
    done = run(
        scans,
        tmp_path / "out",
        tmp_path,
        epochs=1,
        **{
            "crop_size": [40, 36, 8],
            "val_fraction": 0,
            "mask#gamma": 2.0,
            "mask#stratify": False,
            "loss_function#spectral_weight": 0.1,
            "loss_function#normalize_target": True,
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_runs_and_resumes_on_a_gpu(scans, tmp_path):
    settings = {"epochs": 4, "device": "cuda", "num_workers": 2, "cache_dir": str(tmp_path / "cache")}
    process = subprocess.Popen(command(scans, tmp_path / "out", **settings), cwd=tmp_path, env=ENVIRONMENT)
    while process.poll() is None and not (tmp_path / "out/models/checkpoint.pt").is_file():
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = run(scans, tmp_path / "out", tmp_path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(history(tmp_path / "out")) == 4
