"""Time of the segmentation network on one window: eager, exported, and compiled ahead of time by AOTInductor.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.exported_time

The window has 64 x 64 x 64 voxels, in float32, with the weights that ship. The exported network is that of
``python -m sspformer.export pt2``; AOTInductor compiles it for this window, which needs a C++ compiler. Contenders take
turns, in an order drawn anew each round, and ratios are of the same round. ``compile`` is the time that compiling
takes, in s, and ``difference`` the largest one from the eager logits.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import (
    BUNDLE,
    RESULTS,
    add_rounds,
    argument_parser,
    facts,
    quartiles,
    save_csv,
    time_alternating,
    warn_if_busy,
)


def main() -> None:
    parser = argument_parser(__doc__, RESULTS / "exported_time.csv")
    add_rounds(parser, 15)
    args = parser.parse_args()
    warn_if_busy()
    from sspformer.networks import SSPFormerDense, SSPFormerEncoder, export_network, load_weights

    network = load_weights(SSPFormerDense(SSPFormerEncoder(), 18), BUNDLE / "models/model.pt").eval()
    window = torch.rand(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    programs, compile_time = {"eager": network}, {}
    begun = time.perf_counter()
    programs["exported"] = export_network(network).module()
    compile_time["exported"] = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        begun = time.perf_counter()
        package = str(Path(folder, "compiled.pt2"))
        torch._inductor.aoti_compile_and_package(torch.export.export(network, (window,)), package_path=package)
        programs["AOTInductor"] = torch._inductor.aoti_load_package(package)
        compile_time["AOTInductor"] = time.perf_counter() - begun
        expected = network(window)
        differences = {name: (program(window) - expected).abs().max().item() for name, program in programs.items()}
        times = time_alternating(
            {name: lambda program=program: program(window) for name, program in programs.items()},
            args.rounds,
            args.warmup,
        )
    rows = []
    for name, seconds in times.items():
        row = {"network": name, **quartiles(seconds, "seconds"), **quartiles(times["eager"] / seconds, "speedup", 3)}
        row |= {"compile": round(compile_time.get(name, 0), 1), "difference": f"{differences[name]:.1e}"}
        rows.append(row | facts())
        print(row)
    save_csv(args.output, rows)


if __name__ == "__main__":
    main()
