"""Checks of settings, before any data are read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def check_sides(crop_size: Sequence[int], spatial_dims: int) -> None:
    """Raise unless ``crop_size`` has ``spatial_dims`` sides."""
    if len(crop_size) != spatial_dims:
        raise ValueError(
            f"crop_size {list(crop_size)} has {len(crop_size)} sides, but spatial_dims is {spatial_dims}; for 2D "
            "add the overlay: --config_file \"['configs/pretrain.json','configs/pretrain_2d.json']\"."
        )


def check_settings(
    network: nn.Module,
    class_names: Sequence[str] | None,
    crop_size: Sequence[int],
    roi_size: Sequence[int],
    spacing: Sequence[float],
) -> None:
    """Raise where entries of a config do not fit each other, before any data are read.

    Args:
        network: whose ``head``, if there is one, has an output channel for each class and for the background.
        class_names: of the labels from 1 on; None: the output is no label map.
        crop_size: sides of the crops in voxels, one for each of three axes.
        roi_size: sides of the sliding window in voxels.
        spacing: mm.
    """
    for name, value in {"crop_size": crop_size, "roi_size": roi_size, "spacing": spacing}.items():
        if not isinstance(value, Sequence) or len(value) != 3:
            raise ValueError(f"{name} needs one number for each of 3 axes, got {value}.")
    out_channels = getattr(getattr(network, "head", None), "out_channels", None)  # another network may have no head
    if class_names is not None and out_channels not in (None, len(class_names) + 1):
        raise ValueError(
            f"class_names has {len(class_names)} names, {len(class_names) + 1} channels with the background, but the "
            f"network has {out_channels}: set --network_def#out_channels {len(class_names) + 1}, or name the label "
            "values 1, 2, ... with --class_names."
        )
