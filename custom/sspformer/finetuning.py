"""What fine-tuning needs besides MONAI's own: weights of rare classes, learning rates that fall towards the encoder's
first layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .data import LoadScand
from .files import is_null

__all__ = ["check_settings", "class_weights", "is_null", "layer_decay_groups"]


def check_settings(
    task: str,
    spatial_dims: int,
    roi_size: Sequence[int],
    spacing: Sequence[float],
    class_names: Sequence[str],
    network: nn.Module,
) -> None:
    """Raise where entries of a config do not fit each other, before any data are read."""
    for name, value in {"roi_size": roi_size, "spacing": spacing}.items():
        if not isinstance(value, Sequence) or len(value) != spatial_dims:
            raise ValueError(f"{name} needs one number for each of {spatial_dims} axes, got {value}.")
    out_channels = getattr(getattr(network, "head", None), "out_channels", None)  # another network may have no head
    if task == "segmentation" and out_channels not in (None, len(class_names) + 1):
        raise ValueError(
            f"class_names has {len(class_names)} names, {len(class_names) + 1} channels with the background, but the "
            f"network has {out_channels}: set --network_def#out_channels {len(class_names) + 1}, or name the label "
            "values 1, 2, ... with --class_names."
        )


def layer_decay_groups(
    network: nn.Module, learning_rate: float, layer_decay: float = 1.0, weight_decay: float = 0.0
) -> list[dict]:
    """Parameter groups for AdamW, with layer-wise learning-rate decay in the encoder.

    The decoder learns at ``learning_rate``; the encoder's last block at ``layer_decay`` times that, the block before it
    at ``layer_decay ** 2`` times, and so on to the patch embedding (Clark et al., arXiv 2003.10555; Bao et al.,
    arXiv 2106.08254). Matrices and convolutions decay their weights; biases and norms do not.

    Args:
        network: a dense network with an ``encoder``, or its parallel wrapper.
        learning_rate: of the decoder, above 0.
        layer_decay: in (0, 1]; 1: one learning rate for all.
        weight_decay: of AdamW, at least 0.

    Raises:
        ValueError: if ``layer_decay`` is outside its range.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}; 1 gives all layers one learning rate.")
    network = getattr(network, "module", network)
    n_blocks = len(network.encoder.blocks)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        distance = 0  # from the decoder, in layers
        if name.startswith("encoder.blocks."):
            distance = n_blocks - int(name.split(".")[2])
        elif name.startswith("encoder.norm."):
            distance = 1
        elif name.startswith("encoder."):
            distance = n_blocks + 1
        groups.setdefault((distance, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay**distance,
            "weight_decay": weight_decay if matrices else 0.0,
        }
        for (distance, matrices), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def class_weights(items: Sequence[Mapping], n_classes: int, power: float = 0.5, max_items: int = 32) -> Tensor:
    """Weights of the classes for cross entropy, ``(n_classes,)``: frequency to the minus ``power``, 1 for a voxel on
    average.

    Args:
        items: with a ``label`` each, as of :func:`sspformer.data.prepare_pairs`.
        n_classes: background included; a class that does not occur weighs as much as the rarest that does.
        power: 0: all alike; 1: every class has the same sum over its voxels.
        max_items: labels that are read, evenly spaced among all.

    Raises:
        ValueError: naming a label map that has other values.
    """
    load = LoadScand("label")
    counts = torch.zeros(n_classes, dtype=torch.float64)
    for item in items[:: -(-len(items) // max_items)]:
        label = load(item)["label"].as_tensor().flatten().long()
        if label.min() < 0 or label.max() >= n_classes:
            raise ValueError(
                f"the label map {item['label']} has values from {label.min()} to {label.max()}, but the classes are 0 "
                f"to {n_classes - 1}: mend it, or set --class_names and --network_def#out_channels."
            )
        counts += torch.bincount(label, minlength=n_classes)
    share = counts / counts.sum()
    weights = share.clamp(min=share[share > 0].min()) ** -power
    return (weights / (weights * share).sum()).float()
