"""Checkpoints that survive a kill, and the weights that are written beside them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import CallableEventWithFilter, Engine, Events
from ignite.handlers import Checkpoint
from monai.transforms import Transform

from ..networks.pretrained import load_weights
from ..options import flag, is_null
from ..saved import load_checked, save_atomically

__all__ = [
    "LoadCheckpoint",
    "SaveBestModel",
    "SaveCheckpoint",
    "SaveEncoder",
    "StrictCheckpointLoader",
    "find_checkpoint",
    "save_atomically",
    "save_network",
]

logger = logging.getLogger("sspformer")


#: the file in an output folder from which an interrupted training goes on
CHECKPOINT = "models/checkpoint.pt"


class LoadCheckpoint:
    """Let an interrupted training go on: like MONAI's ``CheckpointLoader``, but epoch and iteration are restored as
    well, and a damaged checkpoint is refused.

    Without a checkpoint in the output folder it does nothing.

    Args:
        output_dir: of the run; its checkpoint is ``models/checkpoint.pt``, as :class:`SaveCheckpoint` writes it.
        load_dict: name to object with ``load_state_dict``; ``network`` is one of them.
        data: what is trained on, a list of items with ``image`` and perhaps ``name``.
        settings: what else must be the same for the run to go on, see :func:`find_checkpoint`.
        resume: False: start afresh.
        map_location: device that the checkpoint is loaded to.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        load_dict: Mapping[str, Any],
        data: Sequence[Mapping],
        settings: Mapping[str, Any],
        resume: bool = True,
        map_location: torch.device | str | None = None,
    ) -> None:
        network = getattr(load_dict["network"], "module", load_dict["network"])
        settings = {
            "training data": [str(item.get("name", item["image"])) for item in data],
            "parameters": [list(parameter.shape) for parameter in network.parameters()],
            **settings,
        }
        self.found = find_checkpoint(str(Path(output_dir, CHECKPOINT)), flag(resume), settings)
        self.load_dict, self.map_location = load_dict, map_location

    def attach(self, engine: Engine) -> None:
        if self.found:
            engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        fix = "pass --resume false to start afresh"
        checkpoint = load_checked(self.found, fix, self.map_location)
        max_epochs = engine.state.max_epochs
        try:
            Checkpoint.load_objects({**self.load_dict, "trainer": engine}, checkpoint)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.found} is damaged or of another run ({error}): {fix}.") from error
        engine.state.max_epochs = max_epochs
        if engine.state.epoch >= engine.state.max_epochs:
            logger.info(f"this run is complete: {engine.state.epoch} of {engine.state.max_epochs} epochs are done")


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
        save_dict: name to object with ``state_dict``; the trainer's own state joins them.
        interval: epochs between two writes; the last epoch is always written.
    """

    def __init__(self, output_dir: str | os.PathLike, save_dict: Mapping[str, Any], interval: int = 1) -> None:
        self.path, self.save_dict, self.interval = Path(output_dir, CHECKPOINT), save_dict, interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(_every_and_last(self.interval), self)

    def __call__(self, engine: Engine) -> None:
        objects = {**self.save_dict, "trainer": engine}
        # without parallel wrappers, so that the number of processes may change when a run goes on
        save_atomically({name: getattr(obj, "module", obj).state_dict() for name, obj in objects.items()}, self.path)


class SaveEncoder:
    """Write the plain state dict of the encoder, which loads with ``weights_only=True``.

    Args:
        network: the masked autoencoder.
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
    save_atomically({name: value.detach().cpu() for name, value in state.items()}, path)


def find_checkpoint(path: str, resume: bool, settings: Mapping[str, Any]) -> str | None:
    """The checkpoint to resume from, or None to start afresh; writes ``settings`` beside it for the next time.

    Args:
        path: of the checkpoint in the output folder.
        resume: False: start afresh even if there is one, which is kept as ``*_previous.pt``.
        settings: what must be the same for a run to be resumed (data, seed, epochs, ...): what JSON holds, and
            transforms, losses and other objects, whose attributes are compared.

    Raises:
        ValueError: if the checkpoint belongs to a run with other settings, naming them.
    """
    record = Path(path).with_suffix(".json")
    settings = json.loads(json.dumps(settings, default=_attributes))
    settings = {name: None if isinstance(value, str) and is_null(value) else value for name, value in settings.items()}
    if resume and os.path.isfile(path):
        before = json.loads(record.read_text()) if record.is_file() else settings
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            details = [f"{name}: {_short(before.get(name))} then, {_short(settings[name])} now" for name in changed]
            raise ValueError(
                f"{path} belongs to a run with other settings ({'; '.join(details)}). Give this run an --output_dir "
                "of its own, or pass --resume false to start afresh in this one."
            )
        logger.info(f"going on from {path}; pass --resume false to start afresh")
        return path
    with contextlib.suppress(FileNotFoundError):  # there is none, or another process of this run has renamed it
        os.replace(path, record.with_name(record.stem + "_previous.pt"))
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=4) + "\n")
    return None


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
