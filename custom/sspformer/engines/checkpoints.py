"""Checkpoints that survive a kill, and the weights that are written beside them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import CallableEventWithFilter, Engine, Events
from ignite.handlers import Checkpoint
from monai.transforms import Transform

from ..io.files import digest, printable, sha256, write_atomically
from ..io.load import files_of
from ..networks.pretrained import load_weights
from ..options import flag, is_null
from ..saved import load_checked, save_atomically

logger = logging.getLogger("sspformer")


#: the file in an output folder from which an interrupted training goes on
CHECKPOINT = "models/checkpoint.pt"
#: the state in it of a loader that has one
LOADER = "data_loader"


class LoadCheckpoint:
    """Let an interrupted training go on: like MONAI's ``CheckpointLoader``, but epoch and iteration are restored as
    well, and a damaged checkpoint is refused.

    Without a checkpoint in the output folder it does nothing.

    Args:
        output_dir: of the run; its checkpoint is ``models/checkpoint.pt``, as :class:`SaveCheckpoint` writes it.
        load_dict: name to object with ``load_state_dict``; ``network`` is one of them.
        data: what is trained on, a list of items with ``image``, and perhaps ``label`` and ``name``. Their files are
            known by their SHA-256, wherever they lie; only those whose path, size or times changed are read again.
        settings: what else must be the same for the run to go on, see :func:`find_checkpoint`. ``batch_size`` is that
            of one process; compared is that of all together, so the number of processes may change.
        resume: False: start afresh.
        map_location: device that the checkpoint is loaded to.
        validation: what is validated on, as ``data``.
        pretrained: file of the weights that training starts from, known by its SHA-256; None: none.

    Raises:
        ValueError: if the checkpoint belongs to another run, see :func:`find_checkpoint`.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        load_dict: Mapping[str, Any],
        data: Sequence[Mapping],
        settings: Mapping[str, Any],
        resume: bool = True,
        map_location: torch.device | str | None = None,
        validation: Sequence[Mapping] = (),
        pretrained: str | os.PathLike | None = None,
    ) -> None:
        network = getattr(load_dict["network"], "module", load_dict["network"])
        path = Path(output_dir, CHECKPOINT)
        weights = [] if is_null(pretrained) else [{"image": pretrained, "name": "the weights"}]
        parts = {"training data": data, "validation data": validation, "pretrained": weights}
        hashes = _hashes([item for items in parts.values() for item in items], _read_record(path).get(HASHES, {}))
        settings = {
            **{part: [_identity(item, hashes) for item in items] for part, items in parts.items()},
            "parameters": [list(parameter.shape) for parameter in network.parameters()],
            **settings,
            HASHES: {_state(file): value for file, value in hashes.items()},
        }
        if "batch_size" in settings:
            settings["batch_size"] *= idist.get_world_size()
        self.found = find_checkpoint(str(path), flag(resume), settings)
        self.load_dict, self.map_location = load_dict, map_location

    def attach(self, engine: Engine) -> None:
        if self.found:
            engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        fix = "pass --resume false to start afresh"
        checkpoint = load_checked(self.found, fix, self.map_location)
        max_epochs = engine.state.max_epochs
        objects = {**self.load_dict, "trainer": engine}
        loader = getattr(engine, "data_loader", None)
        if LOADER in checkpoint and hasattr(loader, "load_state_dict"):
            objects[LOADER] = loader
        try:
            Checkpoint.load_objects(objects, checkpoint)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.found} is damaged or of another run ({error}): {fix}.") from error
        for optimizer in self.load_dict.values():
            if isinstance(optimizer, torch.optim.Optimizer):
                _lay_out_as_parameters(optimizer)
        engine.state.max_epochs = max_epochs
        if engine.state.epoch >= engine.state.max_epochs:
            logger.info(f"this run is complete: {engine.state.epoch} of {engine.state.max_epochs} epochs are done")


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Fused optimisers read a parameter and its state as they lie in memory: on a GPU with the channels last, and
    perhaps not so where the checkpoint was written."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _every_and_last(interval: int) -> CallableEventWithFilter:
    """The event at the end of each ``interval``-th epoch and of the last one."""
    return Events.EPOCH_COMPLETED(
        event_filter=lambda engine, epoch: epoch % interval == 0 or epoch == engine.state.max_epochs
    )


class SaveCheckpoint:
    """Write the whole state of the training after each epoch, atomically, to one file that :class:`LoadCheckpoint`
    reads.

    MONAI's ``CheckpointSaver`` writes in place: a kill at the wrong moment would leave nothing to resume from.

    Args:
        output_dir: of the run; the file is ``models/checkpoint.pt`` in it.
        save_dict: name to object with ``state_dict``; the trainer's own state joins them, and that of its loader.
        interval: epochs between two writes; the last epoch is always written.
    """

    def __init__(self, output_dir: str | os.PathLike, save_dict: Mapping[str, Any], interval: int = 1) -> None:
        self.path, self.save_dict, self.interval = Path(output_dir, CHECKPOINT), save_dict, interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(_every_and_last(self.interval), self)

    def __call__(self, engine: Engine) -> None:
        objects = {**self.save_dict, "trainer": engine}
        if hasattr(loader := getattr(engine, "data_loader", None), "state_dict"):
            objects[LOADER] = loader
        # without parallel wrappers, so that the number of processes may change when a run goes on
        save_atomically({name: getattr(obj, "module", obj).state_dict() for name, obj in objects.items()}, self.path)


class SaveEncoder:
    """Write the plain state dict of the encoder, which loads with ``weights_only=True``.

    Args:
        network: the masked autoencoder; or a :class:`sspformer.networks.MaskedDense`, of which the segmentation network
            is written, without its head.
        path: of the file, usually ``models/pretrained/encoder.pt``.
        interval: epochs between two writes; the last epoch is always written.
    """

    def __init__(self, network: torch.nn.Module, path: str, interval: int = 1) -> None:
        self.network, self.path, self.interval = network, path, interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.COMPLETED, self)  # also for a run that was already complete

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration > 0:
            save_network(getattr(self.network, "module", self.network).encoder, self.path)


class SaveBestModel:
    """Write the plain state dict of the network after the best validation so far.

    The handler is for the evaluator. Without validation scans it is for the trainer, and writes at its end. The later
    of two equal values is the better one. A value that is not finite, as of labels that no validation scan has, does
    not count; until there is a finite one, the last weights are kept. The best value is the handler's state, which
    belongs into the checkpoint.

    Args:
        network: whose weights are written.
        path: of the file, usually ``models/model.pt``.
    """

    def __init__(self, network: torch.nn.Module, path: str) -> None:
        self.network, self.path = network, Path(path)
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        best = state["best"]
        self.best = best if best is not None and np.isfinite(best) else None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        name = engine.state.key_metric_name
        value = None if name is None else float(engine.state.metrics[name])
        finite = value is not None and np.isfinite(value)
        better = self.best is None or (finite and not engine.metric_cmp_fn(self.best, value))
        if better or not self.path.is_file():
            self.best = value if finite else None
            save_network(self.network, self.path)
            logger.info(f"weights written to {self.path}" + ("" if name is None else f": {name} {value:.4g}"))


def save_network(network: torch.nn.Module, path: str | os.PathLike) -> None:
    """Write the plain state dict of a network, on the CPU, without the prefix of a parallel wrapper."""
    state = getattr(network, "module", network).state_dict()
    save_atomically({name: value.detach().cpu().contiguous() for name, value in state.items()}, path)


def find_checkpoint(path: str, resume: bool, settings: Mapping[str, Any]) -> str | None:
    """The checkpoint to resume from, or None to start afresh; writes ``settings`` beside it for the next time.

    Args:
        path: of the checkpoint in the output folder.
        resume: False: start afresh even if there is one, which is kept as ``*_previous.pt``.
        settings: what must be the same for a run to be resumed (data, seed, epochs, ...): what JSON holds, and
            transforms, losses and other objects, whose attributes are compared.

    Raises:
        ValueError: if the checkpoint belongs to a run with other settings, naming them, or to an unknown one.
    """
    record = Path(path).with_suffix(".json")
    settings = json.loads(json.dumps(settings, default=_attributes))
    settings = {name: None if isinstance(value, str) and is_null(value) else value for name, value in settings.items()}
    goes_on = resume and os.path.isfile(path)
    if goes_on:
        if why := _why_other(_read_record(path), settings):
            raise ValueError(
                f"{path} {why}. Give this run an --output_dir of its own, or pass --resume false to start afresh in "
                "this one."
            )
        logger.info(f"going on from {path}; pass --resume false to start afresh")
    else:
        with contextlib.suppress(FileNotFoundError):  # there is none, or another process of this run has renamed it
            os.replace(path, record.with_name(record.stem + "_previous.pt"))
    write_atomically(record, json.dumps(settings, indent=4) + "\n")
    return path if goes_on else None


def _read_record(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """The settings beside a checkpoint; empty if there are none, or no whole ones."""
    try:
        content = json.loads(Path(checkpoint).with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _why_other(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why a checkpoint with these settings is not that of this run; empty if it is."""
    if not before:
        return "has no settings beside it (its .json), so nothing says which run it belongs to"
    if any(isinstance(item, str) for item in before.get("training data", [])):
        return "is of an earlier version, which did not record the contents of its data"
    changed = [name for name in now if name != HASHES and before.get(name) != now[name]]
    details = "; ".join(f"{name}: {_difference(before.get(name), now[name])}" for name in changed)
    return details and f"belongs to a run with other settings ({details})"


def _difference(before: Any, now: Any) -> str:
    """How two values of a setting differ; of lists of [name, hash], which names do."""
    if not all(isinstance(value, list) and value and isinstance(value[0], list) for value in (before, now)):
        return f"{_short(before)} then, {_short(now)} now"
    was, is_now = ({str(name): value for name, *value in pairs} for pairs in (before, now))
    kinds = {
        "other contents of": [name for name in was if name in is_now and was[name] != is_now[name]],
        "without": [name for name in was if name not in is_now],
        "with": [name for name in is_now if name not in was],
    }
    lists = [f"{kind} {_some(names)}" for kind, names in kinds.items() if names]
    return printable(", ".join(lists)) or "in another order"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


#: of the record: SHA-256 of each file by its state, so that it need not be read again
HASHES = "hashes"


def _files(item: Mapping) -> list[Path]:
    """The files of an item's image and of its label map."""
    files = [file for key in ("image", "label") if key in item for file in files_of(item[key])]
    return files + [file.with_suffix(".img") for file in files if file.suffix.lower() == ".hdr"]


def _state(file: Path) -> str:
    """Another one whenever a file may have been written; its time of change cannot be set, unlike the other."""
    status = file.stat()
    return digest([str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns])


def _hashes(items: Sequence[Mapping], known: Mapping[str, str]) -> dict[Path, str]:
    """SHA-256 of the files of all items.

    Args:
        items: of a datalist.
        known: SHA-256 by :func:`_state`.
    """
    files = list(dict.fromkeys(file for item in items for file in _files(item)))
    if new := sum(_state(file) not in known for file in files):
        logger.info(f"reading {new} files to their ends once, to know them again when this run goes on")
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(lambda file: known.get(_state(file)) or sha256(file), files)))


def _identity(item: Mapping, hashes: Mapping[Path, str]) -> list[str]:
    """An item's name, and a hash of all that it holds (target, volume, ...) but of where its files lie."""
    named = {key: value for key, value in item.items() if key not in ("image", "label", "name", "subject", "version")}
    return [str(item.get("name", item["image"])), digest([[hashes[file] for file in _files(item)], named])]


def _attributes(value: Any) -> Any:
    """For JSON, the attributes of an object that are plain, or such objects themselves (transforms hold others)."""
    if not hasattr(value, "__dict__"):
        return str(value)
    plain = (bool, int, float, str, tuple, list, type(None))
    return {
        name: attribute
        for name, attribute in vars(value).items()
        if not name.startswith("_") and (isinstance(attribute, (*plain, Transform)) or _is_ours(attribute))
    }


def _is_ours(value: Any) -> bool:
    return type(value).__module__.startswith(f"{__package__.partition('.')[0]}.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class StrictCheckpointLoader:
    """Loads a network's weights before the first batch: :func:`sspformer.networks.load_weights` as a handler.

    MONAI's ``MonaiAlgo`` brings weights of its own, and disables handlers with "CheckpointLoader" in their names.

    Args:
        network: to load into.
        path: of its state dict, or of a checkpoint.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path) -> None:
        self.network, self.path = network, path

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        load_weights(self.network, self.path)
