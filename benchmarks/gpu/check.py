"""What can only be seen on a GPU: the tests that need one, and one epoch of each workflow through the command line.

    python -m benchmarks.gpu.check --out OUT [--minutes 3] [--smoke]

Writes ``check.txt``: a line a workflow (passed or failed, seconds, the last line of its output), then the end of
pytest's report. ``--smoke`` runs the workflows on the CPU and leaves the tests out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import BUNDLE, ROOT
from benchmarks.gpu.speed import write_heads

SMALL = ["--epochs", "1", "--crops_per_scan", "1", "--batch_size", "2", "--bundle_root", "."]
#: name: workflow, configs, options
WORKFLOWS = {
    "pretrain": ("training", ["pretrain"], [*SMALL, "--crop_size", "[32,32,32]"]),
    "pretrain, compiled": ("training", ["pretrain"], [*SMALL, "--crop_size", "[32,32,32]", "--compile", "true"]),
    "pretrain on slices": ("training", ["pretrain", "pretrain_2d"], [*SMALL, "--crop_size", "[64,64]"]),
    "denoising": ("training", ["train", "restoration", "denoising"], [*SMALL, "--pretrained", "null"]),
    "super-resolution": ("training", ["train", "restoration", "super_resolution"], [*SMALL, "--pretrained", "null"]),
    "inference": ("inference", ["inference"], ["--weights", "{model}", "--bundle_root", "."]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    end, lines = time.monotonic() + 60 * args.minutes, []
    args.out.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        (args.out / "check.txt").write_text("\n".join(lines) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "scans"
        data.mkdir()
        write_heads(data, (80, 80, 80), 4)
        for name, (workflow, configs, options) in list(WORKFLOWS.items())[: 1 if args.smoke else None]:
            model = BUNDLE / "models/model.pt"
            if time.monotonic() > end or (name == "inference" and not model.is_file()):
                continue
            command = [sys.executable, "-m", "monai.bundle", "run", workflow]
            command += ["--config_file", str([f"configs/{config}.json" for config in configs])]
            command += ["--dataset_dir", str(data), "--output_dir", f"{folder}/{len(lines)}"]
            command += [option.format(model=model) for option in options]
            start = time.perf_counter()
            done = subprocess.run(command, cwd=BUNDLE, capture_output=True, text=True)
            last = (done.stderr or done.stdout).strip().splitlines()[-1][:200] if done.returncode else ""
            seconds = time.perf_counter() - start
            say(f"{name}: {'failed' if done.returncode else 'passed'}, {seconds:.0f} s {last}".strip())
    if args.smoke:
        return
    left = end - time.monotonic()
    try:
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=5", "-k", "cuda or gpu", "tests"]
        report = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, timeout=max(left, 30)).stdout
    except subprocess.TimeoutExpired as error:
        report = (error.stdout or b"").decode() + "\nout of time"
    for line in report.splitlines()[-25:]:
        say(line)


if __name__ == "__main__":
    main()
