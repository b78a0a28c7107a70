"""Time of a pretraining step, and of the masks and the noise that precede it, against MONAI's masked autoencoder.

    python -m benchmarks.speed.step_speed

A step is forward pass, loss, backward pass and AdamW update on one batch of 96 x 96 x 96 images (``--image_size``,
``--batch_size``). Both networks have the same patch, mask ratio, and widths, depths, attention heads and mlp widths of
encoder and decoder. The designs differ:

- Ours embeds the visible patches only, uses rotary positions and PyTorch's fused attention, and its decoder lets mask
  tokens attend to visible tokens only.
- MONAI's ``MaskedAutoEncoderViT`` embeds all patches and then drops the masked ones. It has a class token and learnable
  position embeddings (its 3D sin-cos embedding needs widths that divide by 6, and 256 does not), computes attention
  weights explicitly, and its decoder attends over all tokens. It draws its mask inside the step, which costs it well
  under a millisecond; ours come from outside and are timed below.

Contenders:

- ``ours fp32``, ``ours bf16``: fp32 and bfloat16 autocast.
- ``MONAI fp32``: as released. Under autocast its forward pass raises, and the script shows the error.
- ``MONAI fp32, fused attention`` and ``MONAI bf16, patched``: what MONAI could reach with small changes that its class
  does not offer. Every block uses ``use_flash_attention``; for bf16 the decoder's tokens are cast to fp32 as well.

Then the preparation of a step, each part as a share of our step: the masks (:class:`InverseFrequencyMask` at its
defaults), the noise (:class:`NoiseSampler` at its defaults, with and without motion; the mean weighs them by
``motion_prob``), and the whole of :class:`PrepareMaskedBatch`. Shares are medians and quartiles of ratios within the
same round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from monai.data import MetaTensor, list_data_collate
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    add_device,
    add_rounds,
    argument_parser,
    facts,
    parameters,
    prepare_machine,
    quartiles,
    save_csv,
    time_alternating,
)
from benchmarks.peers import MonaiMaskedAutoencoder, monai_loss
from sspformer.engines import PrepareMaskedBatch
from sspformer.io import format_table
from sspformer.losses import MaskedReconstructionLoss
from sspformer.networks import SIZES, MaskedAutoencoder, SSPFormerEncoder, patchify
from sspformer.transforms import InverseFrequencyMask, NoiseSampler

OURS = ("ours fp32", "ours bf16")


def training_step(network: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    """One update of the network by AdamW at PyTorch's defaults."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    return step


def our_step(args, image: Tensor, dtype: torch.dtype) -> tuple[Callable[[], None], nn.Module]:
    """A step of the masked autoencoder of this package, with a fixed mask."""
    network = MaskedAutoencoder(SSPFormerEncoder(patch_size=args.patch_size, size=args.size)).to(image.device)
    loss_function = MaskedReconstructionLoss(args.patch_size)
    indices = InverseFrequencyMask(args.patch_size, ratio=args.mask_ratio)(image)
    target = {"image": image, "mask": indices.mask, "keep": indices.keep}

    def loss_of() -> Tensor:
        with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            pred = network(image, indices.keep, indices.mask)
        return loss_function(pred, target)

    return training_step(network, loss_of), network


def monai_step(
    args, image: Tensor, dtype: torch.dtype, fused_attention: bool = False, patched: bool = False
) -> tuple[Callable[[], None], nn.Module]:
    """A step of MONAI's; ``patched`` adds the cast without which its forward pass fails under autocast."""
    network = MonaiMaskedAutoencoder(args.size, args.image_size, args.patch_size, args.mask_ratio).to(image.device)
    for block in [*network.blocks[:-1], *network.decoder_blocks[:-1]]:
        block.attn.use_flash_attention = fused_attention
    if patched:
        network.decoder_embed.register_forward_hook(lambda module, inputs, output: output.float())

    def loss_of() -> Tensor:
        with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            pred, mask = network(image)
        return monai_loss(pred, mask, patchify(image, network.patch_size))

    return training_step(network, loss_of), network


def autocast_error(args, image: Tensor) -> str:
    """The error of MONAI's network under bfloat16 autocast; empty if it runs."""
    step, _ = monai_step(args, image, torch.bfloat16)
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def batch_preparation(args, image: Tensor) -> dict[str, Callable[[], object]]:
    """The masks, the noise, and both as pretraining calls them."""
    generator = torch.Generator(image.device).manual_seed(0)
    spacing = torch.ones(image.shape[0], 3, device=image.device)
    masks = InverseFrequencyMask(args.patch_size, ratio=args.mask_ratio)
    batch = list_data_collate([{"image": MetaTensor(sample, affine=torch.eye(4))} for sample in image])
    calls: dict[str, Callable[[], object]] = {"masks": partial(masks, image, spacing, generator)}
    for name, prob in (("without motion", 0.0), ("with motion", 1.0)):
        noise = NoiseSampler(motion_prob=prob)
        prepare = PrepareMaskedBatch(masks, noise)
        calls[f"noise, {name}"] = partial(noise, image, spacing, generator, prepare.R)
        calls[f"masks and noise, {name}"] = partial(prepare, batch, image.device)
    return calls


def main() -> None:
    parser = argument_parser(__doc__, RESULTS / "step_speed.csv")
    add_rounds(parser, 30)
    add_device(parser)
    parser.add_argument("--batch_size", type=int, default=1, help="images in a step (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=96, help="voxels of a side (default: %(default)s)")
    parser.add_argument("--patch_size", type=int, default=8, help="voxels of a patch's side (default: %(default)s)")
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="share of masked patches (default: %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="of both networks (default: %(default)s)")
    args = parser.parse_args()
    prepare_machine(parser, args)

    torch.manual_seed(0)
    image = torch.rand(args.batch_size, 1, *(args.image_size,) * 3, device=args.device)
    error = autocast_error(args, image)
    print(f"MONAI under bfloat16 autocast: {error or 'runs'}")

    steps = {
        "ours fp32": our_step(args, image, torch.float32),
        "ours bf16": our_step(args, image, torch.bfloat16),
        "MONAI fp32": monai_step(args, image, torch.float32),
        "MONAI fp32, fused attention": monai_step(args, image, torch.float32, fused_attention=True),
        "MONAI bf16, patched": monai_step(args, image, torch.bfloat16, fused_attention=True, patched=True),
    }
    calls = {name: step for name, (step, _) in steps.items()} | batch_preparation(args, image)
    seconds = time_alternating(calls, args.rounds, args.warmup, args.device)
    prob = NoiseSampler().motion_prob
    for name in ("noise", "masks and noise"):
        seconds[f"{name}, mean"] = (1 - prob) * seconds[f"{name}, without motion"] + prob * seconds[
            f"{name}, with motion"
        ]

    setting = {"size": args.size, "batch_size": args.batch_size, "image": args.image_size, "patch": args.patch_size}
    setting["mask_ratio"] = args.mask_ratio
    rows = []
    for name, values in seconds.items():
        row = {"contender": name, "what": "step" if name in steps else "preparation"}
        row["dtype"] = "bf16 autocast" if "bf16" in name else "fp32"
        row["parameters"] = parameters(steps[name][1]) if name in steps else ""
        row |= {"rounds": len(values)} | quartiles(values, "seconds", 6)
        for ours in OURS:
            row |= quartiles(values / seconds[ours], f"over_{ours.replace(' ', '_')}", 4)
        rows.append(row | {"note": ""} | setting | facts(args.device))
    if error:
        missing = {"contender": "MONAI bf16", "what": "step", "dtype": "bf16 autocast", "rounds": 0}
        rows.append(missing | {"note": f"raises: {error}"} | setting | facts(args.device))

    shown = ["contender", "seconds_median", *(f"over_{ours.replace(' ', '_')}_median" for ours in OURS)]
    print(f"\n{format_table(rows, shown)}")
    save_csv(args.output, rows)


if __name__ == "__main__":
    main()
