"""Checks of settings, before any data are read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["check_settings", "check_sides"]


def check_sides(image_size: Sequence[int], spatial_dims: int) -> None:
    """Raise unless ``image_size`` has ``spatial_dims`` sides."""
    if len(image_size) != spatial_dims:
        raise ValueError(
            f"image_size {list(image_size)} has {len(image_size)} sides, but spatial_dims is {spatial_dims}; for 2D "
            "add the overlay: --config_file \"['configs/pretrain.json','configs/pretrain_2d.json']\"."
        )


def check_settings(
    spatial_dims: int,
    roi_size: Sequence[int],
    spacing: Sequence[float],
    class_names: Sequence[str] | None,
    network: nn.Module,
) -> None:
    """Raise where entries of a config do not fit each other, before any data are read.

    Args:
        spatial_dims: 2 or 3.
        roi_size: sides of the sliding window, one for each axis.
        spacing: mm, one for each axis.
        class_names: of the labels from 1 on; None: the output is no label map.
        network: whose ``head``, if there is one, has an output channel for each class.

    Raises:
        ValueError: naming the entries.
    """
    for name, value in {"roi_size": roi_size, "spacing": spacing}.items():
        if not isinstance(value, Sequence) or len(value) != spatial_dims:
            raise ValueError(f"{name} needs one number for each of {spatial_dims} axes, got {value}.")
    out_channels = getattr(getattr(network, "head", None), "out_channels", None)  # another network may have no head
    if class_names is not None and out_channels not in (None, len(class_names) + 1):
        raise ValueError(
            f"class_names has {len(class_names)} names, {len(class_names) + 1} channels with the background, but the "
            f"network has {out_channels}: set --network_def#out_channels {len(class_names) + 1}, or name the label "
            "values 1, 2, ... with --class_names."
        )
