"""Parameter groups of the optimizer, and its schedule."""

from __future__ import annotations

import torch
from monai.optimizers import WarmupCosineSchedule
from torch import nn


def warmup_cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_share: float = 0.05
) -> WarmupCosineSchedule:
    """MONAI's ``WarmupCosineSchedule`` from 5 % of the learning rate to all of it and then to 0, in this many steps.

    Args:
        optimizer: whose learning rates.
        total_steps: of the whole run.
        warmup_share: share of the steps in which the learning rate rises, at least one step.
    """
    warmup_steps = max(1, round(warmup_share * total_steps))
    return WarmupCosineSchedule(optimizer, warmup_steps, total_steps, warmup_multiplier=0.05)


def weight_decay_groups(network: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: matrices decay; biases, norms and the mask token do not."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def layer_decay_groups(
    network: nn.Module,
    learning_rate: float,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
    head_factor: float | None = None,
) -> list[dict]:
    """Parameter groups for AdamW with layer-wise learning rates in the encoder.

    The decoder learns at ``learning_rate``, the encoder's last block at ``layer_decay`` times that, the block before it
    at ``layer_decay ** 2`` times that, and so on down to the patch embedding (Clark et al., arXiv 2003.10555; Bao et
    al., arXiv 2106.08254). Weight decay is for matrices and convolutions, not for biases and norms.

    The head may learn faster: see :class:`sspformer.networks.SSPFormerDense`.

    Args:
        network: with an ``encoder`` (:class:`sspformer.networks.Encoder`), or its parallel wrapper.
        learning_rate: of the decoder, above 0.
        layer_decay: in (0, 1]; 1 is one learning rate for all.
        weight_decay: of AdamW, at least 0.
        head_factor: learning rate of ``network.head`` over that of the decoder, above 0; None: ``network.head_factor``,
            or 1 for networks without.

    Raises:
        ValueError: if ``layer_decay`` or ``head_factor`` is outside its range.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}; 1 gives all layers one learning rate.")
    network = getattr(network, "module", network)
    factor = getattr(network, "head_factor", 1.0) if head_factor is None else head_factor
    if not factor > 0:
        raise ValueError(f"head_factor must be above 0, got {factor}; 1 lets the head learn as the decoder.")
    if factor != 1 and not hasattr(network, "head"):
        raise ValueError(f"head_factor {factor} is of a head, which {type(network).__name__} lacks: leave it out.")
    encoder = network.encoder
    layers = [encoder, *encoder.blocks, encoder.norm]  # a parameter is of the last one that has it
    distances = [*range(len(encoder.blocks) + 1, 0, -1), 1]  # from the decoder
    distance_of = {p: distance for layer, distance in zip(layers, distances, strict=True) for p in layer.parameters()}
    of_head = set(network.head.parameters()) if factor != 1 else set()
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for parameter in network.parameters():  # the decoder's come first
        group = distance_of.get(parameter, 0), parameter in of_head, parameter.ndim > 1
        groups.setdefault(group, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay**distance * (factor if in_head else 1.0),
            "weight_decay": weight_decay if matrices else 0.0,
        }
        for (distance, in_head, matrices), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
