"""Write weights for distribution: a plain state dict in half precision.

    python scripts/half_precision.py output/segmentation/models/model.pt bundle/models/model.pt

Reads a state dict, or a checkpoint's "network", with weights_only; prints size and SHA-256 of what it wrote.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch


def main(source: str, target: str) -> None:
    state = torch.load(source, map_location="cpu", weights_only=True)
    state = state.get("network", state)
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    if broken := [name for name, value in half.items() if not value.isfinite().all()]:
        sys.exit(f"{source} has values that half precision cannot hold, in {len(broken)} tensors such as {broken[0]}")
    part = Path(f"{target}.part")  # a kill leaves the old file
    part.parent.mkdir(parents=True, exist_ok=True)
    torch.save(half, part)
    part.replace(target)
    content = Path(target).read_bytes()
    print(f"{target}: {len(content) / 1e6:.1f} MB, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
