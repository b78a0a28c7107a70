"""The one reader of weights: pretrained ones into any network, and a network's own, which must fit exactly."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..options import is_null
from ..saved import load_checked

logger = logging.getLogger("sspformer")

#: parts of a tensor's name that come from wrappers: DistributedDataParallel and torch.compile
WRAPPERS = ("module", "_orig_mod")

#: where checkpoints keep the weights: ours, Lightning's and many others', nnU-Net's
PLACES = ("network", "state_dict", "model", "network_weights")

#: other networks, by what only the names of their tensors have in them
OTHERS = {
    "swinViT": "SwinUNETR",
    "encoder.stages": "nnU-Net",
    "conv_blocks_context": "nnU-Net (version 1)",
    "submodule": "MONAI's UNet",
    "unit0": "MONAI's UNet",
    "vit": "UNETR",
    "convInit": "SegResNet",
    "input_block": "DynUNet",
    "final_conv": "BasicUNet",
    "cls_token": "a ViT with a class token, such as those of timm or MAE",
    "image_encoder": "SAM or MedSAM",
}

#: the weights that ship, in their folder
SHIPPED = "SHA256SUMS"


def read_weights(path: str | Path, fix: str) -> dict[str, Tensor]:
    """Tensors of a file, by their names without those of wrappers.

    Args:
        path: a state dict, or a checkpoint with it as ``"network"``, ``"state_dict"`` or ``"model"``; read with
            ``weights_only``.
        fix: what to do if there is no such file.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if the file is damaged, holds pickled code or no state dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: {fix}.")
    _warn_unless_shipped(Path(path))
    content = load_checked(path, "copy it again, or write it with torch.save(network.state_dict(), path)")
    if isinstance(content, dict):
        content = next((content[place] for place in PLACES if isinstance(content.get(place), dict)), content)
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: write it with torch.save(network.state_dict(), path).")
    if odd := [name for name in content if not isinstance(name, str)]:
        raise ValueError(
            f"{path} holds no state dict, whose names are text, but {_short(odd[0])} among its names: write it with "
            "torch.save(network.state_dict(), path)."
        )
    return {_unwrapped(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _warn_unless_shipped(path: Path) -> None:
    """Says so if a file has the name of one that ships and other contents, as after a fine-tuning in MONAI Label."""
    for folder in path.parents[:2]:
        if (folder / SHIPPED).is_file():
            sums = {name: total for total, name in map(str.split, (folder / SHIPPED).read_text().splitlines())}
            expected = sums.get(path.relative_to(folder).as_posix())
            if expected not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
                logger.warning(
                    f"{path} is not the file of this name that ships (its SHA-256 is another): the published figures "
                    "do not hold for it."
                )


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load a network's own weights; a file with other tensors, more or fewer, is refused.

    Args:
        network: changed in place; may be wrapped.
        path: see :func:`read_weights`; of any floating point type.

    Returns:
        ``network``.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if the file does not hold exactly the network's tensors, naming those that differ, or one of them is
            not finite.
    """
    source = read_weights(
        path,
        "train the model first (configs/train.json writes models/model.pt in its output_dir), or name a file with "
        "--weights",
    )
    state = network.state_dict()
    _refuse_others(source, state, path)
    _check_numbers(source, {_unwrapped(name): value for name, value in state.items()}, path)
    own = {_unwrapped(name): name for name in state}
    try:
        network.load_state_dict({own.get(name, name): value for name, value in source.items()})
    except RuntimeError as error:
        wanted = {_unwrapped(name): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
        odd = [name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name)]
        if not odd:  # all shapes fit
            raise ValueError(f"the weights {path} are of another model: {error}") from None
        if set(odd) == {"head.weight", "head.bias"} and set(odd) <= wanted.keys() & shapes.keys():
            channels = shapes["head.weight"][0]
            raise ValueError(
                f"the weights {path} have {channels} output channels, the network {wanted['head.weight'][0]}: add "
                f"--network_def#out_channels {channels} and --class_names with the names of the {channels - 1} labels, "
                "or the overlay that they were trained with."
            ) from None
        differ = [
            f"{_short(name)} is {shapes.get(name, 'missing')} in the file and {wanted.get(name, 'missing')} in the "
            "network"
            for name in odd
        ]
        more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(
            f"the weights {path} are of another model: {'; '.join(differ[:3])}{more}. Add the overlay that they were "
            "trained with (--config_file \"['configs/inference.json','configs/denoising.json']\"), or give others with "
            "--weights."
        ) from None
    logger.info(f"weights from {path}")
    return network


def load_pretrained(network: nn.Module, path: str | Path | None) -> nn.Module:
    """Load pretrained weights into a network, and log a table of what was loaded, resized and skipped, and why.

    The whole encoder is loaded, or the call raises and changes nothing. Decoder and head are loaded where the file has
    tensors of the same name and shape (a model of another task), and stay as initialised elsewhere. The image size
    never matters to :class:`SSPFormerEncoder`, whose positions are rotary, and another patch size or number of channels
    is resized, see :func:`resize_patch_embedding`. A head that is loaded needs no higher learning rate: its
    ``head_factor`` becomes 1.

    Args:
        network: an encoder (:class:`Encoder`), or a network with one as ``.encoder``; changed in place.
        path: ``encoder.pt``, a whole model or a checkpoint, see :func:`read_weights`; of any floating point type,
            whatever comes before the encoder's names (``model.encoder.``, ``backbone.``). None (or "null", as
            a command line says it) loads nothing: training from scratch.

    Returns:
        ``network``.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if the file is damaged, holds pickled code, weights that are not finite, or no encoder that
            ``network`` can take; each message names the fix.
    """
    alone = hasattr(network, "hidden_tokens")
    encoder = network if alone else getattr(network, "encoder", None)
    if not hasattr(encoder, "hidden_tokens"):
        raise ValueError(
            "network must be an encoder or have one as .encoder (SSPFormerDense, MaskedAutoencoder), got "
            f"{type(network).__name__}."
        )
    if is_null(path):
        logger.info("pretrained weights: none, training starts from scratch")
        return network

    source = read_weights(path, "give an encoder.pt (configs/pretrain.json writes one), or null to train from scratch")
    # shares its memory with the network
    own = {_unwrapped(name): value for name, value in network.state_dict(prefix="encoder." if alone else "").items()}
    wanted = [name.removeprefix("encoder.") for name in own if name.startswith("encoder.")]
    _refuse_others(source, own, path)
    inside, around = split_encoder(source, wanted)
    changed: dict[str, str] = {}
    if hasattr(encoder, "fit_weights"):
        try:
            inside, changed = encoder.fit_weights(inside)
        except ValueError as error:
            raise ValueError(f"cannot load {path}, it {error}") from None
    if bad := [name for name in wanted if name not in inside or inside[name].shape != own[f"encoder.{name}"].shape]:
        raise ValueError(
            f"{path} covers {len(wanted) - len(bad)} of the encoder's {len(wanted)} tensors: encoder.{bad[0]} is "
            "missing or of another shape, so the file is incomplete or of another encoder; write it again with "
            "configs/pretrain.json."
        )

    rows = []
    pretraining_only = "mask_token" in around and "mask_token" not in own
    for name, value in {**{f"encoder.{name}": value for name, value in inside.items()}, **around}.items():
        what, why = "loaded", ""
        if change := changed.get(name.removeprefix("encoder.")):
            what, why = "resized", change
        elif pretraining_only and name in around and name.startswith(("mask_token", "decoder_", "head.")):
            what, why = "skipped", "decoder of the masked autoencoder, for pretraining only"
        elif name not in own:
            what, why = "skipped", "the network has no such tensor"
        elif value.shape != own[name].shape:
            what, why = "skipped", f"{name}: {tuple(value.shape)} in the file, {tuple(own[name].shape)} here"
        rows.append((name, value, what, why))
    loaded = {name: value for name, value, what, _ in rows if what != "skipped"}
    _check_numbers(loaded, own, path)
    for name, value in loaded.items():
        own[name].copy_(value)  # and converts half precision
    if any(name.startswith("head.") for name in loaded) and hasattr(network, "head_factor"):
        network.head_factor = 1.0  # the head has learnt already
    rows += [(name, value, "not loaded", "stays as initialised") for name, value in own.items() if name not in loaded]
    logger.info(f"pretrained weights: all {len(wanted)} tensors of the encoder, from {path}\n{table(rows)}")
    return network


def split_encoder(source: dict[str, Tensor], wanted: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file that are its encoder's, and the others, without what comes before their names.

    Args:
        source: tensors of the file.
        wanted: names of an encoder's tensors. What comes before most of them is what comes before the encoder's.
    """
    before = Counter(
        name.removesuffix(own) for name in source for own in wanted if f".{name}".endswith(f".{own}")
    ).most_common(1)
    prefix = before[0][0] if before else ""
    inside = {name.removeprefix(prefix): value for name, value in source.items() if name.startswith(prefix)}
    around = prefix.removesuffix("encoder.")
    others = {name.removeprefix(around): value for name, value in source.items() if not name.startswith(prefix)}
    return inside, others


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


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _short(name: object) -> str:
    text = str(name) or "''"
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_others(source: Iterable[str], own: Iterable[str], path: str | Path) -> None:
    """Raises if the names of a file's tensors are those of a network of another kind than one's own."""
    theirs, ours = (
        {kind for part, kind in OTHERS.items() if any(f".{part}." in f".{name}." for name in names)}
        for names in (source, own)
    )
    if kinds := sorted(theirs - ours):
        raise ValueError(
            f"{path} holds weights of {kinds[0]}, and the network is another: give weights that this bundle wrote "
            "(configs/train.json writes models/model.pt, configs/pretrain.json encoder.pt), or make --network_def that "
            "network."
        )


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _holds_integers(value: Tensor, own: Tensor) -> bool:
    """Whether integers came back as floating point numbers, as from the averages of federated learning."""
    return not own.is_floating_point() and value.is_floating_point() and bool((value == value.round()).all())


def _check_numbers(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises unless all tensors are dense and finite, and floating point where one's own are."""
    for name, value in tensors.items():
        kind = str(value.dtype).removeprefix("torch.")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "sparse" if not value.is_meta else "without numbers (meta)"
        elif name not in own or _kind(value) == _kind(own[name]) or _holds_integers(value, own[name]):
            continue
        raise ValueError(
            f"{path} holds no weights of this network: {_short(name)} is {kind}, and not dense floating point numbers; "
            "write it with torch.save(network.float().state_dict(), path)."
        )
    if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(
            f"the weights {path} are NaN or infinite in {len(broken)} of its tensors, such as {broken[0]}: the "
            "training that wrote them diverged, so take earlier ones, or train again with a lower learning rate."
        )
