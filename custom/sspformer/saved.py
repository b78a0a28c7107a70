"""Files of ``torch.save``: written whole or not at all, and read only if every bit is as it was written."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from .io.files import replacing
from .io.formats import UNFINISHED

__all__ = ["load_checked", "save_atomically"]

logger = logging.getLogger("sspformer")

#: weights of other formats, by how their names end
FORMATS = {
    (".safetensors",): "a safetensors file (torch.save(safetensors.torch.load_file(path), 'weights.pt') converts it)",
    (".onnx",): "an ONNX file, a network and not its weights alone",
    (".engine", ".plan", ".trt"): "a TensorRT engine, a network and not its weights alone",
    (".h5", ".hdf5", ".keras", ".pb", ".index"): "a file of TensorFlow or Keras",
    (".npy", ".npz"): "a file of numpy",
}


class _NoWeights(ValueError):
    """What a file is that torch cannot load."""


def save_atomically(content: Any, path: str | os.PathLike) -> None:
    """``torch.save``: a kill or a full disk leaves the old file or the new one, never half of one.

    Args:
        content: what is written.
        path: of the file; its folder is created.

    Raises:
        OSError: if it cannot be written, see :func:`sspformer.io.replacing`.
    """
    with replacing(path) as part, open(part, "wb") as file:  # torch would not say why its own file failed
        torch.save(content, file)


def load_checked(path: str | os.PathLike, fix: str, map_location: torch.device | str | None = "cpu") -> Any:
    """``torch.load`` with ``weights_only``, once the check sums of the file's zip archive are found right.

    ``torch.load`` alone does not look at them: it takes flipped bits for numbers. The format from before torch 1.6 has
    no check sums, nor has safetensors; such a file is loaded, and the log says so.

    Args:
        path: of the file.
        fix: what to do if it cannot be loaded, the end of the message.
        map_location: see ``torch.load``.

    Raises:
        ValueError: if the file is missing, damaged, of another format, or holds pickled code; with ``fix``.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\3\4") or zipfile.is_zipfile(path):
            _check_sums(path)
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many types here: pickle's, zip's, RuntimeError, EOFError
        raise ValueError(f"{path} is {_what(Path(path), error)}: {fix}.") from error
    if not head.startswith(b"PK"):
        kind = "a safetensors file" if Path(path).suffix == ".safetensors" else "in the format from before torch 1.6"
        logger.warning(f"{path} is {kind}, without check sums: damage would not show")
    return content


def _check_sums(path: str | os.PathLike) -> None:
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            raise _NoWeights("a TorchScript archive, of which torch.jit.load(path).state_dict() has the weights")
        if "archive_format" in names:
            raise _NoWeights("a network of torch.export, of which torch.export.load(path).state_dict has the weights")
        if "data.pkl" not in names:
            raise _NoWeights("a zip archive without weights: damaged, or a bundle or model that must be unpacked first")
        if broken := archive.testzip():
            raise _NoWeights(f"damaged, for {broken} in it has another check sum")


def _what(path: Path, error: Exception) -> str:
    """What a file is that cannot be loaded."""
    if isinstance(error, _NoWeights):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"not to be read ({error.strerror})"
    known = [what for endings, what in FORMATS.items() if path.name.lower().endswith(endings)]
    with open(path, "rb") as file:
        head = file.read(64).lower()
    known += [what for start, what in UNFINISHED.items() if head.startswith(start)]
    return known[0] if known else f"damaged or holds more than weights ({type(error).__name__})"
