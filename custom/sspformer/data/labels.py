"""Classes: their values, their names, and how often each occurs."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..io.load import LoadScand

MAX_VALUES = 10  # named in a message


def label_values(classes: int | Sequence[str] | Mapping | None) -> set[int] | None:
    """The label values of n classes, [names from 1 on], {value: name} or {name: value or values}; None for any.

    Raises:
        ValueError: for something else, and for fewer than 2 classes.
    """
    if classes is None:
        return None
    if isinstance(classes, int):
        values = set(range(classes))
    elif isinstance(classes, (list, tuple)):
        values = set(range(len(classes) + 1))
    elif not isinstance(classes, Mapping):
        raise ValueError(f"classes must be a number, names, a mapping or None, got {classes!r}.")
    elif all(str(key).isdecimal() for key in classes):
        values = set(map(int, classes))
    else:
        lists = (value if isinstance(value, (list, tuple)) else [value] for value in classes.values())
        values = {int(value) for values in lists for value in values}
    if len(values) < 2:
        raise ValueError(f"classes must be at least 2, background included, got {classes!r}.")
    return values


def integer_ranges(values: Collection[int]) -> str:
    """Integers in words, as `0-3, 7`."""
    runs = itertools.groupby(enumerate(sorted(values)), lambda numbered: numbered[1] - numbered[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    words = [str(low) if low == high else f"{low}-{high}" if low >= 0 else f"{low} to {high}" for low, high in ends]
    return ", ".join(words[:MAX_VALUES]) + (", ..." if len(words) > MAX_VALUES else "")


def class_weights(items: Sequence[Mapping], n_classes: int, power: float = 0.5, max_items: int = 32) -> Tensor:
    """Weights of the classes for cross entropy, ``(n_classes,)``: frequency to the power ``-power``, scaled so that
    the weight of a voxel is 1 on average.

    Args:
        items: with a ``label`` each, as from :func:`sspformer.data.prepare_pairs`.
        n_classes: background included. A class that does not occur weighs as much as the rarest that does.
        power: 0 gives all classes the same weight; 1 gives every class the same sum over its voxels.
        max_items: most label maps to read, evenly spaced.

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
                f"to {n_classes - 1}: correct it, or set --class_names and --network_def#out_channels."
            )
        counts += torch.bincount(label, minlength=n_classes)
    share = counts / counts.sum()
    weights = share.clamp(min=share[share > 0].min()) ** -power
    return (weights / (weights * share).sum()).float()


def class_names(bundle_root: str | os.PathLike) -> list[str]:
    """Names of the classes from 1 on: the output channels in the bundle's ``configs/metadata.json``.

    ``monai.bundle.load`` leaves ``bundle_root`` at the working directory. If that is no bundle, the one that holds this
    package is read.
    """
    paths = [Path(root) / "configs" / "metadata.json" for root in (bundle_root, Path(__file__).parents[2])]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {paths[0]}: start in the bundle's folder, or name it with --bundle_root.")
    metadata = json.loads(path.read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    return [channels[str(i)] for i in range(1, len(channels))]
