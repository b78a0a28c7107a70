"""What can only be seen on a GPU: the tests that need one, and one epoch of each workflow through the command line.

    python -m benchmarks.gpu.check --out OUT [--minutes 3] [--smoke]

Writes ``check.txt``: the end of pytest's report, then a line for each workflow: passed or failed, compiled or not,
seconds, the last line of its output if it failed. What has passed in an earlier piece is not run again. ``--smoke``
runs the workflows on the CPU and leaves the tests out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.common import BUNDLE, ROOT
from benchmarks.gpu.speed import write_heads

SMALL = ["--epochs", "1", "--crops_per_scan", "1", "--batch_size", "2", "--bundle_root", "."]
EAGER = [*SMALL, "--compile", "false"]  # a minute of compiling is spent on two of them alone
#: others import packages that the machine lacks
TESTS = ["tests/test_cuda.py", "tests/networks/test_networks.py"]
#: name: workflow, configs, options
WORKFLOWS = {
    "pretrain": ("training", ["pretrain"], [*EAGER, "--crop_size", "[32,32,32]"]),
    "pretrain, compiled": ("training", ["pretrain"], [*SMALL, "--crop_size", "[32,32,32]", "--compile", "true"]),
    "segmentation": ("training", ["train"], [*EAGER, "--pretrained", "null"]),
    "pretrain on slices": ("training", ["pretrain", "pretrain_2d"], [*EAGER, "--crop_size", "[64,64]"]),
    "denoising": ("training", ["train", "restoration", "denoising"], [*EAGER, "--pretrained", "null"]),
    "super-resolution": ("training", ["train", "restoration", "super_resolution"], [*EAGER, "--pretrained", "null"]),
    "inference": ("inference", ["inference"], ["--weights", "{model}", "--bundle_root", "."]),
    "segmentation, compiled": ("training", ["train"], [*SMALL, "--pretrained", "null", "--compile", "true"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0)
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
        for name, (workflow, configs, options) in list(WORKFLOWS.items())[: 1 if args.smoke else None]:
            model, left = BUNDLE / "models/model.pt", end - time.monotonic()
            if left <= 0 or name in passed or (name == "inference" and not model.is_file()):
                continue
            command = [sys.executable, "-m", "monai.bundle", "run", workflow]
            command += ["--config_file", str([f"configs/{config}.json" for config in configs])]
            scans = data if name == "segmentation" else data / "images"
            command += ["--dataset_dir", str(scans), "--output_dir", f"{folder}/{len(lines)}"]
            command += [option.format(model=model) for option in options]
            start = time.perf_counter()
            try:
                run = subprocess.run(
                    command, cwd=BUNDLE, capture_output=True, text=True, timeout=600 if args.smoke else left
                )
            except subprocess.TimeoutExpired:
                say(f"{name}: out of time")
                continue
            log = run.stdout + run.stderr
            last = log.strip().splitlines()[-1][:200] if run.returncode else ""
            compiled = ", compiled" if "the training step is compiled" in log else ""
            seconds = time.perf_counter() - start
            say(f"{name}: {'failed' if run.returncode else 'passed'}{compiled}, {seconds:.0f} s {last}".strip())


if __name__ == "__main__":
    main()
