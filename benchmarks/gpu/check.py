"""What can only be seen on a GPU: the tests that need one, and one epoch of each workflow through the command line.

    python -m benchmarks.gpu.check --out OUT [--minutes 5] [--smoke]

Writes ``check.txt``: the end of pytest's report, then a line for each workflow: passed or failed, compiled or not,
seconds, the last line of its output if it failed. Last come a network of torch.export and, where the machine has
torch-tensorrt, one of TensorRT, each exported and run. What has passed in an earlier piece is not run again.
``--smoke`` runs two of them on the CPU and leaves the tests out.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.common import BUNDLE, ROOT
from benchmarks.gpu.speed import write_heads

HERE = ["--bundle_root", "."]
SMALL = ["--epochs", "1", "--crops_per_scan", "1", "--batch_size", "2", *HERE]
EAGER = [*SMALL, "--compile", "false"]  # a minute of compiling is spent on three of them alone
#: others import packages that the machine lacks
TESTS = ["tests/test_cuda.py", "tests/networks/test_networks.py"]
#: name: workflow, configs, options; {folder} is that of the check, {model} the weights that ship
WORKFLOWS = {
    "pretrain": ("training", ["pretrain"], [*EAGER, "--crop_size", "[32,32,32]"]),
    "pretrain, compiled": ("training", ["pretrain"], [*SMALL, "--crop_size", "[32,32,32]", "--compile", "true"]),
    "segmentation": ("training", ["train"], [*EAGER, "--pretrained", "null"]),
    "pretrain on slices": ("training", ["pretrain", "pretrain_2d"], [*EAGER, "--crop_size", "[64,64]"]),
    "pretrain the whole network": (
        "training",
        ["pretrain", "whole_network"],
        [*SMALL, "--crop_size", "[32,32,32]", "--compile", "true"],
    ),
    "denoising": ("training", ["train", "restoration", "denoising"], [*EAGER, "--pretrained", "null"]),
    "super-resolution": ("training", ["train", "restoration", "super_resolution"], [*EAGER, "--pretrained", "null"]),
    "inference": ("inference", ["inference"], [*HERE, "--weights", "{model}"]),
    "inference of torch.export": ("inference", ["inference"], [*HERE, "--weights", "{folder}/model.pt2"]),
    "inference of TensorRT": (
        "inference",
        ["inference", "inference_trt"],
        [*HERE, "--weights", "{folder}/model_trt.ts", "--inferer#sw_batch_size", "4"],
    ),
    "segmentation, compiled": ("training", ["train"], [*SMALL, "--pretrained", "null", "--compile", "true"]),
}
#: what has to be there before a workflow
EXPORTED = ["--ckpt_file", "{model}", "--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json"]
EXPORTS = {
    "inference of torch.export": ["sspformer.export", "pt2", "--filepath", "{folder}/model.pt2", *EXPORTED],
    "inference of TensorRT": [
        *["monai.bundle", "trt_export", "--net_id", "network_def", "--filepath", "{folder}/model_trt.ts", *EXPORTED],
        *["--precision", "fp32", "--input_shape", "[1,1,64,64,64]", "--dynamic_batchsize", "[1,4,8]"],
        *["--use_onnx", "True", "--use_trace", "True"],
    ],
}
SMOKED = ("pretrain", "inference of torch.export")


def commands(name: str, scans: Path, folder: Path, output: Path) -> list[list[str]]:
    """The export that a workflow needs, and the workflow."""
    workflow, configs, options = WORKFLOWS[name]
    files = [f"configs/{config}.json" for config in configs]
    data = scans if name.startswith("segmentation") else scans / "images"
    run = ["monai.bundle", "run", workflow, "--config_file", str(files), "--dataset_dir", str(data)]
    every = [EXPORTS[name]] if name in EXPORTS else []
    every.append([*run, "--output_dir", str(output), *options])
    known = {"folder": folder, "model": BUNDLE / "models/model.pt"}
    return [[sys.executable, "-m", *(word.format(**known) for word in words)] for words in every]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    end, file = time.monotonic() + 60 * args.minutes, args.out / "check.txt"
    args.out.mkdir(parents=True, exist_ok=True)
    before = file.read_text().splitlines() if file.is_file() else []
    lines = [line for line in before if ": passed" in line]
    passed = {line.split(":")[0] for line in lines}

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        file.write_text("\n".join(lines) + "\n")

    if not args.smoke and "tests" not in passed:
        tests = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", *TESTS]
        try:
            run = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, timeout=150)
            report, outcome = run.stdout, "failed" if run.returncode else "passed"
        except subprocess.TimeoutExpired as error:
            report, outcome = (error.stdout or b"").decode(), "out of time"
        for line in report.splitlines()[-25:]:
            say(line)
        say(f"tests: {outcome}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "scans"
        for part in ("images", "labels"):
            (data / part).mkdir(parents=True)
        for path in write_heads(data / "images", (80, 80, 80), 4):
            image = nib.load(path)
            label = np.uint8(np.asarray(image.dataobj) // 60)  # 17 levels
            nib.save(nib.Nifti1Image(label, image.affine), data / "labels" / path.name)
        for number, name in enumerate(SMOKED if args.smoke else WORKFLOWS):
            if end <= time.monotonic() or name in passed:
                continue
            if name.startswith("inference") and not (BUNDLE / "models/model.pt").is_file():
                say(f"{name}: left out, this pack has no weights")
                continue
            if name.endswith("TensorRT") and importlib.util.find_spec("torch_tensorrt") is None:
                say(f"{name}: left out, this machine has no torch-tensorrt")
                continue
            start, log, failed = time.perf_counter(), "", 0
            try:
                for command in commands(name, data, Path(folder), Path(folder) / f"output_{number}"):
                    left = 600 if args.smoke else max(end - time.monotonic(), 1)
                    run = subprocess.run(command, cwd=BUNDLE, capture_output=True, text=True, timeout=left)
                    log, failed = log + run.stdout + run.stderr, run.returncode
                    if failed:
                        break
            except subprocess.TimeoutExpired:
                say(f"{name}: out of time")
                continue
            last = log.strip().splitlines()[-1][:200] if failed else ""
            compiled = ", compiled" if "the training step is compiled" in log else ""
            seconds = time.perf_counter() - start
            say(f"{name}: {'failed' if failed else 'passed'}{compiled}, {seconds:.0f} s {last}".strip())


if __name__ == "__main__":
    main()
