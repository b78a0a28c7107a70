"""How fast a pretraining step can be: its operations, its memory traffic, and what bounds it on a card.

    python -m benchmarks.gpu.roofline --tflops 717 --gb_s 2900

Nothing is computed: the step runs on PyTorch's "meta" device, where tensors have shapes and no values. For each size of
the network, at 96^3 with patches of 8 and 48^3 with patches of 4:

- *operations*: of all matrix products and convolutions, forward and backward, as PyTorch counts them;
- *eager bytes*: what all kernels read and write if none is fused: weights and losses in float32, the rest in bfloat16,
  with the copies from one to the other that autocast makes on a GPU;
- *least bytes*: what the matrix products, convolutions and attention alone read and write: no fusion goes below it;
- *bound*: the larger of operations over the card's TFLOP/s and least bytes over its GB/s, and the share of the card's
  TFLOP/s that a step of that length reaches; *eager bound*: the same with eager bytes.

``--tflops`` and ``--gb_s`` are the ceilings that ``benchmarks.gpu.speed`` measures on a card.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import RESULTS, save_csv
from sspformer.losses import MaskedReconstructionLoss
from sspformer.networks import MaskedAutoencoder, SSPFormerEncoder
from sspformer.networks.layers import LayerNorm

#: kernels that a compiler does not fuse into others
PRODUCTS = ("mm", "bmm", "addmm", "convolution", "attention")
MOVES_NOTHING = (
    "view",
    "_unsafe_view",
    "detach",
    "alias",
    "expand",
    "transpose",
    "t.",
    "permute",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "split",
    "empty",
    "unbind",
    "as_strided",
    "_reshape_alias",
    "unfold",
    "chunk",
)


class Traffic(TorchDispatchMode):
    """Counts the bytes that each kernel reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.eager = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__
        if not name.startswith(MOVES_NOTHING):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            moved = sum(x.numel() * x.element_size() for x in tensors)
            self.eager += moved
            self.products += moved if any(word in name for word in PRODUCTS) else 0
        return out


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs) -> torch.Tensor:
    """The kernel that a GPU runs; "meta" would take the one that writes all scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def autocast() -> ExitStack:
    """As ``torch.autocast("cuda", torch.bfloat16)``, which "meta" does not know, and with the attention of a GPU."""
    linear = F.linear

    def low(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())

    patches = ExitStack()
    patches.enter_context(mock.patch("torch.nn.functional.linear", low))
    patches.enter_context(mock.patch.object(LayerNorm, "forward", LayerNorm._in_type_of))
    patches.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", flash_attention))
    return patches


def step(size: str, image_size: int, patch: int, batch: int) -> dict[str, float]:
    """Operations and bytes of a step for one crop."""
    with torch.device("meta"):
        network = MaskedAutoencoder(SSPFormerEncoder(patch_size=patch, size=size))
        image = torch.rand(batch, 1, *(image_size,) * 3)
        n = (image_size // patch) ** 3
        keep = torch.zeros(batch, n // 4, dtype=torch.int64)
        mask = torch.zeros(batch, n - n // 4, dtype=torch.int64)
    loss_function = MaskedReconstructionLoss(patch)
    target = {"image": image, "mask": mask, "keep": keep, "spacing": torch.ones(batch, 3)}
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        with autocast():
            pred = network(image, ids_keep=keep, ids_predict=mask)
        loss_function(pred.float(), target).backward()
    return {
        "gflop": flops.get_total_flops() / batch / 1e9,
        "eager_mb": traffic.eager / batch / 1e6,
        "least_mb": traffic.products / batch / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=717.0, help="of a bfloat16 product on the card")
    parser.add_argument("--gb_s", type=float, default=2900.0, help="of a copy within the card's memory")
    args = parser.parse_args()
    rows = []
    for size in ("tiny", "small", "base"):
        for image_size, patch in ((96, 8), (48, 4)):
            row = {"size": size, "crop": image_size, "patch": patch, **step(size, image_size, patch, 32)}
            work = row["gflop"] / args.tflops  # ms, as bytes in MB over GB/s are
            for name, mb in (("bound", row["least_mb"]), ("eager_bound", row["eager_mb"])):
                time = max(work, mb / args.gb_s)
                row |= {f"{name}_crops_s": round(1000 / time), f"{name}_share": round(work / time, 3)}
            rows.append({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()})
            print(rows[-1], flush=True)
    save_csv(RESULTS / "roofline.csv", rows)


if __name__ == "__main__":
    main()
