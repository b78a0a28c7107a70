"""What a step costs on a GPU, as a share of the card's ceiling and against MONAI's network; one JSON line a result.

    python -m benchmarks.gpu.speed --out OUT [--minutes 4] [--smoke]

In this order, until the minutes are over:

- ``ceiling``: a bfloat16 product of two 8192 x 8192 matrices, and a copy within the card's memory;
- ``pretrain``: forward, loss, backward, clipping and AdamW on one batch, eager and compiled, for each size and for
  96^3 with patches of 8 and 48^3 with patches of 4; MONAI's patched masked autoencoder beside it (bfloat16, fused
  attention); the operations are counted by PyTorch, forward and backward;
- ``prepare``: crops, masks and noise, each as a share of the step;
- ``segment``: a step of four crops of 64^3, eager and compiled, each with and without channels-last convolutions;
- ``loader``: crops a second of :class:`sspformer.data.DeviceLoader` alone, of the whole step fed by it, and of
  ``python -m monai.bundle run training`` on the same scans;
- ``inference``: a scan of 256 x 256 x 180 voxels from file to file, alone and each of a batch of 32, against the aims
  of 1.5 and 0.5 s; shorter batches without overlap and compiled.

A time is the median of ten, each over calls for 50 ms. ``--smoke`` runs all of it with toy sizes on the CPU: it says
whether the script runs, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import Dataset, MetaTensor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import BUNDLE, facts
from benchmarks.peers import MonaiMaskedAutoencoder, monai_loss
from sspformer.data import DeviceLoader
from sspformer.engines import PrepareMaskedBatch, TrainStep
from sspformer.losses import BalancedDiceCELoss, MaskedReconstructionLoss
from sspformer.networks import MaskedAutoencoder, SSPFormerDense, SSPFormerEncoder, patchify, place
from sspformer.transforms import BatchedContrast, CropSampler, InverseFrequencyMask, NoiseSampler


class Bench:
    """Writes results as they come, and knows the time that is left."""

    def __init__(self, out: Path, minutes: float, device: torch.device) -> None:
        self.file, self.end, self.device = out / "speed.jsonl", time.monotonic() + 60 * minutes, device
        out.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict] = []
        before = map(json.loads, self.file.read_text().splitlines() if self.file.is_file() else ())
        self.done = {row["job"] for row in before if row["what"] == "done"}  # in an earlier piece
        self.ceiling = float("nan")

    def add(self, what: str, **values) -> None:
        self.rows.append({"what": what, **{n: round(v, 5) if isinstance(v, float) else v for n, v in values.items()}})
        with self.file.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        print(self.rows[-1], flush=True)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    def ms(self, call: Callable[[], object], repeats: int = 10) -> float:
        """Milliseconds of a call, the median."""
        for _ in range(3):
            call()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        n = max(1, min(50, int(0.05 / max(time.perf_counter() - start, 1e-6)))) if self.device.type == "cuda" else 1
        times = []
        for _ in range(repeats if self.device.type == "cuda" else 2):
            self.wait()
            start = time.perf_counter()
            for _ in range(n):
                call()
            self.wait()
            times.append((time.perf_counter() - start) / n)
        return 1000 * float(np.median(times))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ceiling(bench: Bench, side: int) -> None:
    """TFLOP/s of a matrix product, and GB/s of a copy (read and written)."""
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    bench.ceiling = 2 * side**3 / bench.ms(lambda: a @ a) / 1e9
    b = torch.empty_like(a)
    bench.add("ceiling", tflops=bench.ceiling, gb_s=2 * a.nbytes / bench.ms(lambda: b.copy_(a)) / 1e6)


def stepper(network: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One update: gradients of ``loss()``, clipped, and AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def flops(call: Callable[[], object]) -> float:
    """Operations of a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def pretrain(bench: Bench, size: str, image_size: int, patch: int, batch: int) -> None:
    """Our pretraining step and MONAI's, and what precedes ours."""
    torch.manual_seed(0)
    image = torch.rand(batch, 1, *(image_size,) * 3, device=bench.device)
    setting = {"size": size, "image": image_size, "patch": patch, "batch": batch}
    network = MaskedAutoencoder(SSPFormerEncoder(patch_size=patch, size=size)).to(bench.device)
    loss_function = MaskedReconstructionLoss(patch)
    prepare = PrepareMaskedBatch(InverseFrequencyMask(patch), NoiseSampler())
    inputs, targets, _, kwargs = prepare({"image": image}, bench.device)
    work = eager = float("nan")
    for compile in (False, True) if bench.device.type == "cuda" else (False,):
        step = TrainStep(network, loss_function, compile=compile)
        backward = partial(step.backward, inputs, targets, (), kwargs)
        work = work if compile else flops(backward)
        start = time.monotonic()
        ms = bench.ms(stepper(network, backward))
        eager = ms if not compile else eager
        values = {"crops_s": 1000 * batch / ms, "share": work / ms / 1e9 / bench.ceiling, "gflop": work / batch / 1e9}
        seconds = time.monotonic() - start
        compiled = step.is_compiled
        bench.add("pretrain", name="ours", compiled=compiled, ms=ms, seconds=seconds, **values, **setting)
    prepared = bench.ms(lambda: prepare({"image": image}, bench.device))
    bench.add("prepare", ms=prepared, of_step=prepared / ms, **setting)
    if bench.over:
        return
    network = MonaiMaskedAutoencoder(size, image_size, patch, 0.75).to(bench.device)
    for block in [*network.blocks[:-1], *network.decoder_blocks[:-1]]:
        block.attn.use_flash_attention = True
    network.decoder_embed.register_forward_hook(lambda module, inputs, output: output.float())

    def loss() -> None:
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            pred, mask = network(image)
        monai_loss(pred, mask, patchify(image, network.patch_size)).backward()

    theirs = bench.ms(stepper(network, loss))
    ratios = {"over_ours_eager": theirs / eager, "over_ours": theirs / ms}
    crops_s = 1000 * batch / theirs
    bench.add("pretrain", name="MONAI patched, eager", ms=theirs, crops_s=crops_s, **ratios, **setting)


def segment(bench: Bench, crop: int, batch: int, patch: int) -> None:
    """A step of segmentation into 18 classes."""
    image = torch.rand(batch, 1, *(crop,) * 3, device=bench.device)
    label = torch.randint(0, 18, image.shape, device=bench.device)
    compiles = (False, True) if bench.device.type == "cuda" else (False,)
    for compile, channels_last in product(compiles, (False, True)):
        torch.manual_seed(0)
        network = place(SSPFormerDense(SSPFormerEncoder(patch_size=patch), 18), bench.device, channels_last)
        loss = BalancedDiceCELoss([1.0] * 18, to_onehot_y=True, softmax=True, include_background=False, batch=True).to(
            bench.device
        )
        step = TrainStep(network, loss, compile=compile)
        ms = bench.ms(stepper(network, partial(step.backward, image, label, (), {})))
        how = {"compiled": step.is_compiled, "channels_last": channels_last}
        bench.add("segment", **how, ms=ms, crop=crop, batch=batch, patch=patch)


def write_heads(folder: Path, shape: tuple[int, int, int], n: int) -> list[Path]:
    """Smooth random volumes as ``.nii.gz``, 1 mm voxels: they stand for scans where only time counts."""
    random, paths = np.random.default_rng(0), []
    for i in range(n):
        coarse = torch.from_numpy(random.random((1, 1, 6, 6, 6), dtype=np.float32))
        voxels = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0].numpy()
        paths.append(folder / f"sub-{i:03d}.nii.gz")
        nib.save(nib.Nifti1Image((1000 * voxels).astype(np.int16), np.diag([1.0, 1.0, 1.0, 1.0])), paths[-1])
    return paths


def loader(bench: Bench, folder: Path, crop: int, batch: int, scans: int, epochs: int) -> None:
    """Crops a second: of the loader, of loader and step, through the bundle."""
    shape = (100, 120, 100) if bench.device.type == "cuda" else (24, 24, 24)
    items = [{"image": MetaTensor(torch.rand(1, *shape).half())} for _ in range(scans)]
    sampler = CropSampler((crop,) * 3, scale=(0.75, 1.33), rotate=0.2, flip_prob=0.5)
    per_scan = -(-20 * batch // scans)
    made = DeviceLoader(Dataset(items), sampler, batch, bench.device, per_scan, augmentation=[BatchedContrast()])
    network = MaskedAutoencoder(SSPFormerEncoder(patch_size=8)).to(bench.device)
    step = TrainStep(network, MaskedReconstructionLoss(8))
    prepare = PrepareMaskedBatch(InverseFrequencyMask(8), NoiseSampler())
    prepared: tuple = ()
    update = stepper(network, lambda: step.backward(*prepared))

    def epoch(train: bool) -> None:
        nonlocal prepared
        for data in made:
            if train:
                prepared = prepare(data, bench.device)
                update()

    n, rates = len(made) * batch, {}
    for name, train in (("loader", False), ("bare step", True)):
        epoch(train)
        bench.wait()
        start = time.perf_counter()
        epoch(train)
        bench.wait()
        rates[name] = n / (time.perf_counter() - start)
        bench.add("loader", name=name, compiled=step.is_compiled, crops_s=rates[name], crop=crop, batch=batch)
    data = folder / "scans"
    data.mkdir()
    write_heads(data, shape, scans)
    out = folder / "run"
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", "configs/pretrain.json"]
    command += ["--dataset_dir", data, "--output_dir", out, "--epochs", epochs, "--crop_size", [crop] * 3]
    command += ["--batch_size", batch, "--crops_per_scan", per_scan, "--val_interval", epochs, "--bundle_root", "."]
    subprocess.run([str(word) for word in command], cwd=BUNDLE, check=True, stdout=subprocess.DEVNULL, timeout=240)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    ends = [event.wall_time for event in events.Scalars("train_loss")]  # the first epoch compiles, the last validates
    steps = float(np.genfromtxt(out / "history.csv", delimiter=",", names=True)["iteration"][0])
    rate = steps * batch / float(np.median(np.diff(ends)[: max(1, len(ends) - 2)]))
    bench.add(
        "loader", name="through the bundle", crops_s=rate, of_bare=rate / rates["bare step"], crop=crop, batch=batch
    )


def inference(bench: Bench, folder: Path, shape: tuple[int, int, int], n: int, *options: str) -> None:
    """Seconds from file to file of n scans, as the bundle's own report has them.

    ``each`` is the mean, whose aim is 1.5 s for one scan and 0.5 s in a batch. The first scan also pays for CUDA's
    start, and for compiling; ``later`` is the mean without it.
    """
    data, out = folder / f"{n} heads", folder / f"results {len(bench.rows)}"
    if not data.exists():
        data.mkdir()
        (head,) = write_heads(data, shape, 1)
        for i in range(1, n):
            os.link(head, data / f"sub-{i:03d}.nii.gz")
    command = [sys.executable, "-m", "monai.bundle", "run", "inference", "--config_file", "configs/inference.json"]
    command += ["--dataset_dir", data, "--output_dir", out, "--bundle_root", ".", *options]
    start = time.perf_counter()
    run = subprocess.run([str(word) for word in command], cwd=BUNDLE, capture_output=True, text=True, timeout=240)
    total = time.perf_counter() - start
    if run.returncode:
        raise RuntimeError(run.stderr.strip()[-300:])
    rows = np.genfromtxt(out / "inference.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    seconds = np.atleast_1d(rows["seconds"]).astype(float)
    values = {"first": seconds[0], "later": float(seconds[1:].mean()) if n > 1 else float("nan"), "with_start": total}
    reached = bool(seconds.mean() <= (1.5 if n == 1 else 0.5))
    compiled = "the network is compiled" in run.stdout + run.stderr
    setting = {"scans": n, "options": " ".join(options), "compiled": compiled, "shape": shape}
    bench.add("inference", each=float(seconds.mean()), reached=reached, **values, **setting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on the CPU")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        parser.exit(1, "no GPU here: --smoke tries the script on the CPU\n")
    bench = Bench(args.out, args.minutes, torch.device("cpu" if args.smoke else "cuda"))
    bench.add("facts", **facts(bench.device.type))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        jobs: list[partial] = [partial(ceiling, bench, 256 if args.smoke else 8192)]
        if args.smoke:
            jobs += [partial(pretrain, bench, "tiny", 16, 8, 2), partial(segment, bench, 16, 1, 8)]
            jobs += [partial(loader, bench, folder, 16, 4, 4, 2), partial(inference, bench, folder, (20, 24, 18), 2)]
        else:
            jobs += [partial(pretrain, bench, "tiny", 96, 8, 64), partial(pretrain, bench, "tiny", 48, 4, 64)]
            jobs += [partial(segment, bench, 64, 4, 8), partial(segment, bench, 64, 4, 4)]
            jobs += [partial(loader, bench, folder, 64, 128, 32, 8)]
            head = partial(inference, bench, folder, (256, 256, 180))
            jobs += [partial(head, 1), partial(head, 32), partial(head, 12, "--evaluator#ahead", "false")]
            jobs += [partial(head, 12, "--compile", "true")]
            for size in ("small", "base"):
                jobs += [partial(pretrain, bench, size, image, patch, 32) for image, patch in ((96, 8), (48, 4))]
        for job in jobs:
            name = " ".join([job.func.__name__, *(str(word) for word in job.args[1:] if word != folder)])
            if name in bench.done:
                continue
            if bench.over:
                print(f"next: {name}")
                break
            torch.compiler.reset()  # else sizes that changed would be compiled as dynamic
            try:
                job()
                if job.func is not ceiling:  # which every piece needs
                    bench.add("done", job=name)
            except Exception as error:  # the other tables do not suffer
                bench.add("failed", job=name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                if args.smoke:
                    raise
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
