"""What works around MONAI."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.handlers import MLFlowHandler
from monai.transforms import Spacingd

__all__ = ["ResampleSpacingd", "close_tracking", "errors_last", "from_client", "log_config"]


def from_client(items: Sequence[Mapping], first_handler: str) -> bool:
    """Whether a client such as MONAI Label trains: it puts a loader of the model of before in front of our handlers.

    Args:
        items: to train on.
        first_handler: target of the first of the trainer's handlers.

    Raises:
        ValueError: if there are no items.
    """
    if not items:
        raise ValueError("there is no labelled image to train on: label some first (in MONAI Label, submit them).")
    return first_handler == "CheckpointLoader"


#: how the messages of errors begin that MONAI raises from the one that tells what to do
WRAPPERS = ("Failed to evaluate", "Failed to instantiate component", "applying transform", "'query key")


def errors_last() -> None:
    """Let Python end an error's traceback with what tells the user what to do: MONAI wraps it several times."""
    if getattr(sys.excepthook, "errors_last", False):
        return
    before = sys.excepthook

    def hook(kind, error, trace) -> None:
        before(kind, error, trace)
        while error.__cause__ is not None and str(error).startswith(WRAPPERS):
            error = error.__cause__
        said = str(error)
        if "Original Traceback" in said:  # of a DataLoader's worker: its errors arrive as text
            lines = re.findall(r"^[\w.]+: (.+)", said, re.MULTILINE)
            said = next((line for line in reversed(lines) if not line.startswith(WRAPPERS)), said)
        if isinstance(error, Exception):  # and no KeyboardInterrupt
            print(f"\nerror: {said}", file=sys.stderr)

    hook.errors_last = True
    sys.excepthook = hook


def log_config(handlers: Sequence[Any]) -> None:
    """Let ``--tracking mlflow`` log the run's config with ``--output_dir`` given too; before the run, whose handlers
    these are.

    MONAI 1.6 writes it into ``output_dir``, and then looks for a file named ``/path + '/config_20261123_120000.json'``,
    because it takes every ``output_dir`` for an expression.
    """
    for handler in handlers:
        if isinstance(handler, MLFlowHandler):
            paths = [re.sub(r" \+ '(/config_\w+\.json)'$", r"\1", path or "") for path in handler.artifacts]
            handler.artifacts = tuple(paths)


def close_tracking(handlers: Sequence[Any]) -> None:
    """End what ``--tracking mlflow`` has begun for a validator without a trainer, which MONAI leaves open."""
    for handler in handlers:
        if isinstance(handler, MLFlowHandler):
            handler.close()


class ResampleSpacingd(Spacingd):
    """MONAI's ``Spacingd`` that sees its own keys only.

    That of MONAI 1.6 updates every entry whose name starts with ``image_`` as if it were metadata, and fails on the
    path that MONAI Label keeps at ``image_path``.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        own = {key: data[key] for key in self.keys if key in data}
        return {**data, **super().__call__(own, lazy)}
