"""Networks of torch.export: the file ``.pt2`` brings its network, so that nothing else has to define it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

__all__ = ["ExportedNetwork", "export_network", "is_exported", "network_to_run", "place", "save_exported"]

logger = logging.getLogger("sspformer")

#: patches along a side, and images in a batch, that an exported network takes at most
MOST = 4096


def is_exported(path: str | Path) -> bool:
    """Whether a file is the network of :func:`save_exported`, by its name: ``.pt2``."""
    return Path(path).suffix == ".pt2"


class ExportedNetwork(nn.Module):
    """The network of a ``.pt2`` file, float32, with its weights.

    It takes the sizes that it was exported for, see :func:`export_network`. PyTorch's own module refuses ``train()``
    and ``eval()``, which MONAI's engines call; here they do nothing, for the graph has one mode.

    Args:
        path: of the file.
        device: where it computes; the graph names a device.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if it is no exported network.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(f"no network at {path}: write it with python -m sspformer.export pt2.")
        try:
            program = torch.export.load(path)
        except Exception as error:  # of zip, JSON or pickle, KeyError, RuntimeError, ...
            raise ValueError(
                f"{path} is no network of torch.export, or damaged ({type(error).__name__}): write it again with "
                "python -m sspformer.export pt2."
            ) from error
        if (device := torch.device(device)).type != "cpu":
            from torch.export.passes import move_to_device_pass  # since torch 2.7

            program = move_to_device_pass(program, device)
        self.__dict__["graph"] = program.module()  # no submodule, or train() would reach it
        logger.info(f"network from {path}")

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *S)`` -> what the exported network gives."""
        return self.graph(image)


def network_to_run(network: nn.Module, weights: str | Path, device: torch.device | str) -> nn.Module:
    """The network of the file ``weights`` if that is a ``.pt2``, else ``network``, whose weights are loaded later; both
    on the device (:func:`place`)."""
    return ExportedNetwork(weights, device) if is_exported(weights) else place(network, device)


def place(network: nn.Module, device: torch.device | str, channels_last: bool | None = None) -> nn.Module:
    """A network on its device; convolutions on a GPU have their channels last in memory.

    Args:
        network: moved in place, before an optimiser or a parallel wrapper sees it.
        device: where it computes.
        channels_last: whether weights of convolutions are laid out so; None: on a GPU. Values stay, and weights of
            either layout load into the other.

    Returns:
        ``network``.
    """
    network = network.to(device)
    if torch.device(device).type == "cuda" if channels_last is None else channels_last:
        nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
        nn.utils.convert_conv3d_weight_memory_format(network, torch.channels_last_3d)
    return network


def export_network(network: nn.Module, shape: list[int] | None = None) -> ExportedProgram:
    """A network as a graph of PyTorch's operators, for any batch.

    The guards that ``torch.export`` sets let sides through that are multiples of the patch, at least two patches long.
    :class:`sspformer.networks.ScanPredictor` takes a share of the patches, whose number is part of its graph: it needs
    a ``shape``.

    Args:
        network: one of this package, with its ``encoder``; on the CPU.
        shape: ``(B, C, *S)``: fixes the sides S; None: they are free.
    """
    encoder = network.encoder
    sides = [patch * tokens for patch, tokens in zip(encoder.patch_size, (3, 4, 5))] if shape is None else shape[2:]
    image = torch.rand(2, encoder.in_channels, *sides)  # a batch of 1 would be taken for a constant
    free = {0: Dim("batch", min=1, max=MOST)}
    if shape is None:
        free |= {2 + i: patch * Dim(f"n{i}", min=2, max=MOST) for i, patch in enumerate(encoder.patch_size)}
    program = torch.export.export(network.eval(), (image,), dynamic_shapes=(free,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this computer
    return program


def save_exported(program: ExportedProgram, path: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a ``.pt2`` file.

    Args:
        program: of :func:`export_network`.
        path: of the file; its folder is created.
        texts: more files for the archive, by name. ``torch.export.load(path, extra_files=...)`` reads them.

    Raises:
        ValueError: if ``path`` does not end in ``.pt2``.
    """
    if not is_exported(path):
        raise ValueError(f"the file of an exported network ends in .pt2, not {path}.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path, extra_files=dict(texts or {}))
