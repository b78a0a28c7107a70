"""Classes: their names, and how often each occurs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..io.load import LoadScand

__all__ = ["class_names", "class_weights"]


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


def class_names(bundle_root: str | os.PathLike) -> list[str]:
    """Names of the labels from 1 on, as ``configs/metadata.json`` gives the channels of the network's output.

    ``monai.bundle.load`` leaves ``bundle_root`` at the working directory: where that is no bundle, the one in which
    this package stands is read.
    """
    paths = [Path(root) / "configs" / "metadata.json" for root in (bundle_root, Path(__file__).parents[1])]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {paths[0]}: start in the bundle's folder, or say where it is with --bundle_root.")
    metadata = json.loads(path.read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    return [channels[str(i)] for i in range(1, len(channels))]
