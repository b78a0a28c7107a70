"""Pretrained weights into any of the networks, with a table of what was loaded, resized and skipped, and why."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import SIZES, SSPFormerEncoder

__all__ = ["load_pretrained", "resize_patch_embedding"]

logger = logging.getLogger("sspformer")

EMBEDDING = "encoder.patch_embedding.weight"


LAYOUT = "encoder.layout"  # heads, channels, patch


#: parts of a tensor's name that come from wrappers: DistributedDataParallel and torch.compile
WRAPPERS = ("module", "_orig_mod")


#: where checkpoints keep the weights: ours, Lightning's and many others'
PLACES = ("network", "state_dict", "model")


def load_pretrained(network: nn.Module, path: str | Path | None) -> nn.Module:
    """Load pretrained weights into a network, and log a table of what was loaded, resized and skipped, and why.

    The whole encoder is loaded, or the call raises and changes nothing. Decoder and head are loaded where the file has
    tensors of the same name and shape (a model of another task), and stay as initialised elsewhere. Another patch size
    or number of channels is met by :func:`resize_patch_embedding`; the image size never matters, positions are rotary.

    Args:
        network: an :class:`SSPFormerEncoder`, or a network with one as ``.encoder``; changed in place.
        path: ``encoder.pt``, a whole model or a checkpoint (with it as ``"network"``, ``"state_dict"`` or ``"model"``),
            of any floating point type, whatever comes before the encoder's names (``model.encoder.``, ``backbone.``);
            read with ``weights_only``. None loads nothing: training from scratch.

    Returns:
        ``network``.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if the file is damaged, holds pickled code, weights that are not finite or no SSPFormer encoder, or
            one whose width, depth or patch ``network`` cannot take; each message names the fix.
    """
    encoder = network if isinstance(network, SSPFormerEncoder) else getattr(network, "encoder", None)
    if not isinstance(encoder, SSPFormerEncoder):
        raise ValueError(
            "network must be an SSPFormerEncoder or have one as .encoder (SSPFormerDense, MaskedAutoencoder), got "
            f"{type(network).__name__}."
        )
    if path is None:
        logger.info("pretrained weights: none, training starts from scratch")
        return network

    source = read_weights(path)
    own = network.state_dict(prefix="encoder." if network is encoder else "")  # shares its memory with the network
    check_encoder(source, own, path)
    pretraining_only = "mask_token" in source and "mask_token" not in own
    rows = []
    for name, value in source.items():
        what, why = "loaded", ""
        if name == EMBEDDING:
            (_, *shape), (_, *wanted) = source[LAYOUT].int().tolist(), own[LAYOUT].tolist()
            if shape != wanted:
                value = resize_patch_embedding(value, shape, wanted)
                what, why = "resized", f"{as_text(shape)} in the file, {as_text(wanted)} here"
        elif name == LAYOUT:
            value = own[LAYOUT]
        elif pretraining_only and not name.startswith("encoder."):
            what, why = "skipped", "decoder of the masked autoencoder, for pretraining only"
        elif name not in own:
            what, why = "skipped", "the network has no such tensor"
        elif value.shape != own[name].shape:
            what, why = "skipped", f"{name}: {tuple(value.shape)} in the file, {tuple(own[name].shape)} here"
        rows.append((name, value, what, why))

    loaded = {name: value for name, value, what, _ in rows if what != "skipped"}
    if broken := [name for name, value in loaded.items() if not value.isfinite().all()]:
        raise ValueError(
            f"{path} has NaN or infinite weights in {len(broken)} of its tensors, such as {broken[0]}: its training "
            "diverged, so take weights of before, or train again with a lower learning rate."
        )
    for name, value in loaded.items():
        own[name].copy_(value)  # and converts half precision
    rows += [(name, value, "not loaded", "stays as initialised") for name, value in own.items() if name not in loaded]
    n_encoder = sum(name.startswith("encoder.") for name in loaded)
    logger.info(f"pretrained weights: all {n_encoder} tensors of the encoder, from {path}\n{table(rows)}")
    return network


def resize_patch_embedding(weight: Tensor, shape: Sequence[int], new_shape: Sequence[int]) -> Tensor:
    """Patch embedding for patches of another size or number of channels.

    Size: the token of a patch is the one that ``weight`` gives once the patch is resized (linear, antialiased) to the
    size it was made for. FlexiViT (Beyer et al., arXiv 2212.08013), whose idea it is, inverts the opposite resize
    instead, which keeps less of the token of a smooth image when patches shrink.
    Channels: 1 to n repeats the weights and divides them by n, n to 1 sums them, so that an image repeated in n
    channels gives the token of the one.

    Args:
        weight: ``(dim, channels * prod(patch))``, in the order of :func:`sspformer.networks.patchify`.
        shape: ``(channels, *patch)`` of ``weight``.
        new_shape: ``(channels, *patch)`` wanted.

    Raises:
        ValueError: if the numbers of channels differ, and neither is 1.
    """
    channels, new_channels = shape[0], new_shape[0]
    if channels != new_channels and 1 not in (channels, new_channels):
        raise ValueError(
            f"the pretrained encoder has {channels} channels, the network in_channels {new_channels}: which belong "
            "together is unknown, take an encoder of 1 channel or of as many as the network's."
        )
    weight = weight.float().unflatten(1, tuple(shape))  # dim C p0 p1 ...
    if channels != new_channels:
        weight = weight.sum(1, keepdim=True).repeat_interleave(new_channels, dim=1) / new_channels
    for axis, (side, new_side) in enumerate(zip(shape[1:], new_shape[1:]), start=2):
        if side != new_side:
            eye = torch.eye(new_side)[None, None]
            resize = F.interpolate(eye, size=(side, new_side), mode="bilinear", antialias=True)[0, 0]
            weight = torch.tensordot(weight, resize, dims=([axis], [0])).movedim(-1, axis)
    return weight.flatten(1)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file, without the names of what is around the network; those of an encoder alone get ``encoder.``"""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no pretrained weights at {path}: give an encoder.pt (configs/pretrain.json writes one), or null to train "
            "from scratch."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here: pickle's, zip's, RuntimeError, EOFError
        raise ValueError(
            f"{path} is damaged or holds more than weights ({type(error).__name__}): copy it again, or write it with "
            "torch.save(network.state_dict(), path)."
        ) from error
    if isinstance(content, dict):
        content = next((content[place] for place in PLACES if isinstance(content.get(place), dict)), content)
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: write it with torch.save(network.state_dict(), path).")
    tensors = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    first = "patch_embedding.weight"
    before = next((name.removesuffix(first) for name in tensors if f".{name}".endswith(f".{first}")), "")
    around = before.removesuffix("encoder.")
    alone = around == before and not any(name.startswith("encoder.") for name in tensors)
    return {
        ("encoder." if alone and name.startswith(around) else "") + name.removeprefix(around): value
        for name, value in tensors.items()
    }


def check_encoder(source: dict[str, Tensor], own: dict[str, Tensor], path: str | Path) -> None:
    """Raise unless the file covers every tensor of the network's encoder; only the patch may differ in shape."""
    first = "encoder.blocks.0.attention.q.weight"
    if EMBEDDING not in source or first not in source:
        other = next((name for name in source if "blocks" in name), next(iter(source)))
        raise ValueError(
            f"{path} holds no SSPFormer encoder: it has {other.removeprefix('encoder.')!r}, but not both "
            f"'patch_embedding.weight' and {first.removeprefix('encoder.')!r}; another project's blocks cannot be "
            "renamed into these, give an encoder.pt that configs/pretrain.json wrote."
        )
    if source[EMBEDDING].shape == own[EMBEDDING].shape:
        source.setdefault(LAYOUT, own[LAYOUT])  # files of before there was one
    size, own_size = ((state[EMBEDDING].shape[0], depth(state)) for state in (source, own))
    if size != own_size:
        preset = [name for name, row in SIZES.items() if (row["dim"], row["depth"]) == size]
        fix = f"size {preset[0]!r}" if preset else f"dim={size[0]} and depth={size[1]}"
        raise ValueError(
            f"{path} has an encoder of width {size[0]} and {size[1]} blocks, the network one of width {own_size[0]} "
            f"and {own_size[1]} blocks: build the network with {fix}."
        )
    layout, own_layout = (state[LAYOUT].int().tolist() if LAYOUT in state else [] for state in (source, own))
    if layout and len(layout) != len(own_layout):
        raise ValueError(
            f"{path} has an encoder of {len(layout) - 2}D images, the network one of {len(own_layout) - 2}D: 2D "
            "weights do not fit 3D, nor 3D ones 2D, so pretrain with the spatial_dims of the network."
        )
    if layout and layout[0] != own_layout[0]:
        raise ValueError(
            f"{path} has an encoder of {layout[0]} attention heads, the network one of {own_layout[0]}: build the "
            f"network with num_heads={layout[0]}."
        )
    wanted = [name for name in own if name.startswith("encoder.")]
    bad = [n for n in wanted if n not in source or (n != EMBEDDING and source[n].shape != own[n].shape)]
    if bad:
        raise ValueError(
            f"{path} covers {len(wanted) - len(bad)} of the encoder's {len(wanted)} tensors: {bad[0]} is missing or of "
            "another shape, so the file is incomplete or of another version; write it again with configs/pretrain.json."
        )


def depth(state: dict[str, Tensor]) -> int:
    """Number of the encoder's blocks."""
    return len({name.split(".")[2] for name in state if name.startswith("encoder.blocks.")})


def as_text(shape: Sequence[int]) -> str:
    """``(1, 8, 8, 4)`` -> "1 channel of 8 x 8 x 4 voxels"."""
    return f"{shape[0]} channel{'s' * (shape[0] > 1)} of {' x '.join(map(str, shape[1:]))} voxels"


def table(rows: Iterable[tuple[str, Tensor, str, str]]) -> str:
    """Rows of (tensor's name, tensor, what happened, why), one line for each part of the network."""
    groups: dict[tuple[str, str], list] = {}
    for name, value, what, why in rows:
        part = ".".join(name.split(".")[: 2 if name.startswith("encoder.") else 1])
        groups.setdefault((part, what), []).append((value, why))
    lines = [f"{'part':<24} {'tensors':>7} {'numbers':>11}  {'':<10} why"]
    for (part, what), members in groups.items():
        numbers = sum(value.numel() for value, _ in members)
        lines.append(f"{part:<24} {len(members):>7} {numbers:>11,}  {what:<10} {members[0][1]}".rstrip())
    return "\n".join(lines)
