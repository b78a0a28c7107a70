"""Time of the noise transform on a whole volume, against the k-space transforms of MONAI and TorchIO, on the CPU.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.speed.transform_speed

Each contender is called as a user calls it, at its defaults, always applied (``prob=1``), on one float32 volume of
128 x 128 x 128 voxels: a MetaTensor for ours and MONAI's, a ScalarImage for TorchIO's, whose transforms copy it first.
They do not compute the same. Ours adds periodic motion, thermal noise or both (``RandFrequencyWeightedNoise``); the
others draw no noise, so our motion alone compares with them. MONAI's cut off high frequencies (``RandGibbsNoise``) or
add a spike (``RandKSpaceSpikeNoise``). TorchIO's dampen every n-th plane of k-space (``RandomGhosting``) or compose
k-space of a few poses (``RandomMotion``, which resamples the volume with SimpleITK). The comparison says what a data
loader pays for each.

``--threads`` sets PyTorch's threads and those of SimpleITK, which has its own; the script repeats for each number.
"""

from __future__ import annotations

from collections.abc import Callable

import SimpleITK
import torch
import torchio
from monai.data import MetaTensor
from monai.transforms import RandGibbsNoise, RandKSpaceSpikeNoise

from benchmarks.common import (
    RESULTS,
    add_rounds,
    argument_parser,
    facts,
    quartiles,
    save_csv,
    time_alternating,
    warn_if_busy,
)
from sspformer.io import format_table
from sspformer.transforms import RandFrequencyWeightedNoise

REFERENCE = "ours, motion alone"


def make_contenders(size: int) -> dict[str, Callable[[], object]]:
    """The transforms, each with its volume ``(1, size, size, size)``."""
    voxels = torch.rand(1, size, size, size, generator=torch.Generator().manual_seed(0))
    volume = MetaTensor(voxels, affine=torch.eye(4))
    scan = torchio.ScalarImage(tensor=voxels.clone())
    transforms = {
        REFERENCE: RandFrequencyWeightedNoise(prob=1.0, motion_prob=1.0, sigma=0.0),
        "ours, thermal noise alone": RandFrequencyWeightedNoise(prob=1.0, motion_prob=0.0),
        "ours, both": RandFrequencyWeightedNoise(prob=1.0, motion_prob=1.0),
        "MONAI RandGibbsNoise": RandGibbsNoise(prob=1.0),
        "MONAI RandKSpaceSpikeNoise": RandKSpaceSpikeNoise(prob=1.0),
    }
    for transform in transforms.values():
        transform.set_random_state(0)
    calls = {name: lambda transform=transform: transform(volume) for name, transform in transforms.items()}
    for transform in (torchio.RandomGhosting(), torchio.RandomMotion()):
        calls[f"TorchIO {type(transform).__name__}"] = lambda transform=transform: transform(scan)
    return calls


def main() -> None:
    parser = argument_parser(__doc__, RESULTS / "transform_speed.csv")
    add_rounds(parser, 30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--size", type=int, default=128, help="voxels of a side (default: %(default)s)")
    args = parser.parse_args()
    warn_if_busy()

    torch.manual_seed(0)
    contenders = make_contenders(args.size)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
        seconds = time_alternating(contenders, args.rounds, args.warmup)
        for name, values in seconds.items():
            row = {"contender": name, "size": args.size, "dtype": "float32", "rounds": len(values)}
            row |= quartiles(values, "seconds", 6) | quartiles(values / seconds[REFERENCE], "over_ours_motion", 4)
            rows.append(row | facts(packages=["torchio", "SimpleITK", "numpy"]))

    shown = ["contender", "threads", "seconds_median", "over_ours_motion_median"]
    print(f"\n{format_table(rows, shown)}")
    save_csv(args.output, rows)


if __name__ == "__main__":
    main()
