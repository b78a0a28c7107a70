"""What is prepared for a lent GPU, with toy sizes on the CPU: it will run there unattended."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from benchmarks.gpu.check import SMOKED, WORKFLOWS, commands
from benchmarks.gpu.pack import decode, encode
from benchmarks.gpu.study import CHANGES, DESIGNS, ENCODERS, Run, command, keep_encoders, next_run, queue, weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("shape", [(7, 9, 5), (1, 4, 3), (10, 6, 8)])
def test_a_packed_scan_comes_back_voxel_by_voxel(shape):
    voxels = np.random.default_rng(0).integers(0, 40, shape).astype(np.uint8)
    np.testing.assert_array_equal(decode(encode(voxels), shape), voxels)


def test_a_pack_runs_blind(tmp_path):
    """Packed, unpacked elsewhere, and run by run.sh: two runs of the study."""
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), axis=-1) - 11.5
    radius = np.sqrt((grid**2).sum(-1))
    rows = ["file,split,subject"]
    for i, split in enumerate(["train", "train", "val"]):
        for kind, voxels in (
            ("images", (400 * (radius < 10) + 300 * (radius < 5 + i)).astype(np.int16)),
            ("labels", np.where(radius < 10, 1 + np.arange(24)[:, None, None] % 17, 0).astype(np.uint8)),
        ):
            path = tmp_path / "data/brain_structures" / kind / f"s{i}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])), path)
            rows.append(f"brain_structures/{kind}/s{i}.nii.gz,{split},s{i}")
    (tmp_path / "data/manifest.csv").write_text("\n".join(rows))
    pack = [sys.executable, "-m", "benchmarks.gpu.pack", "--data", tmp_path / "data", "--out", tmp_path / "p.tar"]
    subprocess.run([*pack, "--no_wheels"], cwd=ROOT, check=True)
    with tarfile.open(tmp_path / "p.tar") as tar:
        tar.extractall(tmp_path / "machine", filter="data")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SMOKE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = ["bash", str(tmp_path / "machine/benchmarks/gpu/run.sh"), str(tmp_path / "out"), "5", "study"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in results] == ["pretrain", "segment"], done.stdout
    assert not any("error" in row for row in results) and 0 <= results[1]["best"] <= 1
    assert (tmp_path / "out/pretrain_random_0.pt").is_file()


@pytest.mark.parametrize("what", ["check", "speed"])
def test_checks_and_timings_run_on_the_cpu(tmp_path, what):
    path = os.pathsep.join([str(ROOT / "custom"), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    words = [sys.executable, "-m", f"benchmarks.gpu.{what}", "--out", str(tmp_path), "--smoke"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    if what == "check":
        lines = (tmp_path / "check.txt").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == [f"{name}: passed" for name in SMOKED]
        again = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
        assert again.stdout == ""  # what has passed is not run again
    else:
        rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
        assert {row["what"] for row in rows} == {
            *("facts", "ceiling", "pretrain", "prepare", "segment", "loader", "inference", "done"),
        }


def test_every_check_is_a_command_of_the_bundle(tmp_path):
    for name in WORKFLOWS:
        *_, run = commands(name, tmp_path / "scans", tmp_path, tmp_path / "out")
        configs = run[run.index("--config_file") + 1].strip("[]").replace("'", "").split(", ")
        assert all((ROOT / "bundle" / config).is_file() for config in configs)
        assert ("--pretrained" in run) == ("configs/train.json" in configs)
    export, run = commands("inference of TensorRT", tmp_path / "scans", tmp_path, tmp_path / "out")
    assert export[export.index("--filepath") + 1] == run[run.index("--weights") + 1] == f"{tmp_path}/model_trt.ts"


def test_the_recipe_chooses_the_rates_of_the_arms_and_few_encoders_are_kept(tmp_path):
    recipe = queue({})
    assert recipe[0].kind == "pretrain" and len(recipe) == 3 + 20
    results = {run.name: {"best": 0.5 + 0.2 * (run.options.get("learning_rate") == 0.0007)} for run in recipe}
    results["segment_random-whole8_0_5_0.0007_3000"]["best"] = 0.8
    diverged = recipe[-1].name
    assert len(queue({name: row for name, row in results.items() if name != diverged})) == len(recipe)
    runs = queue({name: row for name, row in results.items() if name != diverged}, hopeless=[diverged])
    assert [run.name for run in runs] == [run.name for run in queue(results)]
    arms = [run for run in runs if run.kind == "segment" and run.steps == 6000]
    assert {run.options["learning_rate"] for run in arms} == {0.0007}
    assert all(run.options["layer_decay"] == (0.65 if run.encoder else 1.0) for run in arms)
    assert all(run.encoder is None or "whole8" in run.encoder for run in arms)  # the best pretraining goes on
    assert {run.options["encoder#patch_size"] for run in arms} == {8}
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:  # every encoder is trained before it is used
        assert run.encoder is None or run.encoder in [r.name for r in runs[: runs.index(run)]]
    for run in runs:
        if run.kind == "pretrain":
            (tmp_path / f"{run.name}.pt").touch()
    keep_encoders(tmp_path, [run for run in runs if run.name not in results])
    kept = {file.stem for file in tmp_path.glob("*.pt")}
    assert len(kept) == ENCODERS and "pretrain_random-whole8_0" in kept
    assert "pretrain_random-clean-whole8_2" not in kept


def test_what_ships_is_trained_from_one_encoder(tmp_path):
    for name in ("brain", "hippocampus"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"training": [{}] * (110 if name == "brain" else 126)}))
    runs = weights(tmp_path)
    assert [run.name for run in runs] == ["weights_encoder", "weights_brain", "weights_hippocampus"]
    words = [command(run, tmp_path, tmp_path, tmp_path / "run", smoke=False) for run in runs]
    options = [dict(zip(line[7::2], line[8::2], strict=True)) for line in words]
    assert [line["--encoder#patch_size"] for line in options[:2]] == ["4", "4"]
    assert "--encoder#patch_size" not in options[2] and "hippocampus.json" in words[2][6]  # 8 voxels of 1 mm
    assert {line["--pretrained"] for line in options[1:]} == {str(tmp_path / "weights_encoder.pt")}
    assert [int(line["--epochs"]) for line in options] == [16, 15, 12]  # of 150, 500 and 500 steps


def test_every_contender_changes_the_pretraining_or_the_fine_tuning(tmp_path):
    (tmp_path / "brain.json").write_text(json.dumps({"training": [{}] * 110}))
    known = {run.name: {"best": 0.5} for run in queue({})}
    runs = {run.name: run for run in queue(known)}
    plain = command(runs["pretrain_random_0"], tmp_path, tmp_path, tmp_path / "run", smoke=False)
    for change in ("whole", "whole8", *DESIGNS):
        words = command(runs[f"pretrain_random-{change}_0"], tmp_path, tmp_path, tmp_path / "run", smoke=False)
        changed, _ = CHANGES[change]
        assert words != plain
        assert all(words[words.index(f"--{k}") + 1] == str(v) for k, v in changed.items() if k != "overlay")
        overlays = [Path(file) for file in words[6].strip("[]").replace("'", "").split(",")[1:]]
        assert all(file.is_file() for file in overlays)
        assert [file.name for file in overlays] == ["whole_network.json"] * change.startswith("whole")


def test_the_next_run_is_the_first_that_fits(tmp_path):
    runs = [
        Run("pretrain_a", "pretrain", steps=1500),
        Run("segment_long", "segment", encoder="pretrain_a", steps=6000),
        Run("segment_short", "segment", steps=1500),
    ]
    every, spent = {run.name: run for run in runs}, {"pretrain": 200.0, "segment": 50.0}
    chosen = [next_run(runs[n:], every, tmp_path, spent, left) for n, left in ((0, 300), (0, 100), (1, 210), (0, 20))]
    assert [run and run.name for run in chosen] == ["pretrain_a", "segment_short", "pretrain_a", None]
    (tmp_path / "pretrain_a.pt").touch()
    assert next_run(runs[1:], every, tmp_path, spent, 210).name == "segment_long"
