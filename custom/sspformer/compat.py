"""What works around MONAI 1.6 and MONAI Label 0.8.5, with the report upstream of each item, or why there is none.

Elsewhere, classes of ours override methods of MONAI whose names begin with an underscore. All but one of these methods
are abstract, or documented as what subclasses implement.

- ``_compute_tensor`` and ``_compute_metric`` of metrics (:mod:`sspformer.metrics`).
  :class:`sspformer.metrics.HausdorffDistance95` gives infinity for a structure that was missed, where MONAI gives nan
  (https://github.com/Project-MONAI/MONAI/issues/9095).
- ``Workflow._iteration`` (:class:`sspformer.engines.InferenceEvaluator`). An engine ends at the first error, as it
  should; a batch of scans goes on.
- ``PersistentDataset._cachecheck`` (:class:`sspformer.data.CachedDataset`), which MONAI's own subclasses override, too.
  MONAI moves files from the temporary folder, which copies them between file systems
  (https://github.com/Project-MONAI/MONAI/issues/2146), and recognises one error of a damaged file
  (https://github.com/Project-MONAI/MONAI/pull/7244).

Two handlers and the inferers do more than MONAI's: :class:`sspformer.engines.LoadCheckpoint` restores the epoch as well
(proposed in https://github.com/Project-MONAI/MONAI/pull/6687), :class:`sspformer.engines.SaveCheckpoint` writes
atomically (we know of no proposal), and the inferers use bfloat16, also on CPUs
(https://github.com/Project-MONAI/MONAI/issues/4116).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow
from monai.data.utils import affine_to_spacing
from monai.handlers import MLFlowHandler
from monai.transforms import Spacingd
from monai.utils import ensure_tuple

from .geometry import check_resampled_shape

__all__ = [
    "ResampleSpacingd",
    "close_tracking",
    "from_monai_label",
    "log_config",
    "original_error",
    "print_cause_last",
    "running_config",
]

# --- errors

#: how the messages begin with which MONAI wraps the error that says what to do
WRAPPERS = ("Failed to evaluate", "Failed to instantiate component", "applying transform", "'query key")


def original_error(error: BaseException) -> BaseException:
    """The error that MONAI's parser or transforms have wrapped, perhaps several times.

    MONAI names the expression, component or transform that failed. Its messages have become shorter since
    https://github.com/Project-MONAI/MONAI/issues/7451, but the one that says what to do is still not the last.
    """
    while error.__cause__ is not None and str(error).startswith(WRAPPERS):
        error = error.__cause__
    return error


def print_cause_last() -> None:
    """On the command line, end the output of an error with the message that tells the user what to do.

    This replaces ``sys.excepthook``, and therefore only in a process of ``python -m monai.bundle``. A program that
    imports this package or MONAI keeps its own.
    """
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is not None and program.name == "monai.bundle.__main__":
        sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    cause = original_error(error)
    if not getattr(cause, "show_traceback", True):
        print(f"\n{cause}", file=sys.stderr)
        return
    sys.__excepthook__(kind, error, trace)
    message = str(cause)
    if "Original Traceback" in message:  # errors of a DataLoader's worker arrive as text
        lines = re.findall(r"^[\w.]+: (.+)", message, re.MULTILINE)
        message = next((line for line in reversed(lines) if not line.startswith(WRAPPERS)), message)
    if isinstance(cause, Exception):  # no KeyboardInterrupt
        print(f"\nerror: {message}", file=sys.stderr)


# --- the config


def running_config() -> tuple[ConfigParser, list[Path]]:
    """The parser that evaluates the expression from which this is called, and the files of its config.

    MONAI's expressions see single entries of their config, and a ``ConfigWorkflow`` does not keep the names of its
    files; we know of no proposal. So both are taken from the callers. For a ``ConfigWorkflow`` that a program made,
    the files are all those beside its first one.

    Raises:
        RuntimeError: outside of a config.
    """
    parser, files, frame = None, [], sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if parser is None and isinstance(owner, ConfigParser):
            parser = owner
        elif isinstance(owner, ConfigWorkflow):
            files = sorted(owner.config_root_path.glob("*.json"))
        elif frame.f_code is create_workflow.__code__:
            files = [Path(file) for file in ensure_tuple(frame.f_locals["config_file"])]
        frame = frame.f_back
    if parser is None:
        raise RuntimeError("running_config is for expressions of a config.")
    return parser, files


# --- MONAI Label


def from_monai_label(items: Sequence[Mapping]) -> bool:
    """Whether MONAI Label runs this training.

    Then training goes on from the bundle's weights and writes them there, because Label reads and offers these. Label
    passes a bundle no sign of itself, so there is no option that could say it; that is its design, and not reported.
    Label calls ``monai.bundle.run`` in its own process, where ``monailabel`` is imported. On several GPUs it starts
    ``monai.bundle`` with a config that it writes, ``monailabel_train.json`` (``BundleTrainTask`` in
    https://github.com/Project-MONAI/MONAILabel/blob/main/monailabel/tasks/train/bundle.py).

    Args:
        items: to train on.

    Raises:
        ValueError: if there are no items.
    """
    if not items:
        raise ValueError("there is no labelled image to train on: label some first (in MONAI Label, submit them).")
    return "monailabel" in sys.modules or any("monailabel_train.json" in word for word in sys.argv)


class ResampleSpacingd(Spacingd):
    """MONAI's ``Spacingd`` that sees its own keys only.

    MONAI 1.6 takes each entry whose name starts with ``image_`` for metadata of ``image``, to keep the voxel size in it
    up to date (https://github.com/Project-MONAI/MONAI/issues/6840), and fails on the path that MONAI Label keeps as
    ``image_path``. We know of no report of that.

    Before it allocates anything, it refuses a shape that does not fit, see
    :func:`sspformer.geometry.check_resampled_shape`.

    Args:
        args: of ``Spacingd``.
        class_names: the labels of which the network gives scores on the new grid; they need memory, too.
        kwargs: of ``Spacingd``.
    """

    def __init__(self, *args, class_names: Sequence[str] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.channels = len(class_names) + 1 if class_names else 0

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        own = {key: data[key] for key in self.keys if key in data}
        for image in super().__call__(own, lazy=True).values():
            spacing = " x ".join(f"{size:.3g}" for size in affine_to_spacing(image.peek_pending_affine()).tolist())
            name = image.meta.get("filename_or_obj", "the scan")
            check_resampled_shape(image.peek_pending_shape(), f"a spacing of {spacing} mm", name, self.channels)
        return {**data, **super().__call__(own, lazy)}


# --- tracking with MLflow


def log_config(handlers: Sequence[Any]) -> None:
    """Let ``--tracking mlflow`` log the config of a run that has an ``--output_dir``; to be called before the run.

    MONAI writes the config into ``output_dir``, but then looks for a file named ``/path + '/config_20261123.json'``: it
    appends to the option as if it were an expression, as in the bundles that the feature was made for
    (https://github.com/Project-MONAI/MONAI/pull/5666). We know of no report.

    Args:
        handlers: of the engine that runs.
    """
    for handler in handlers:
        if isinstance(handler, MLFlowHandler):
            paths = [re.sub(r" \+ '(/config_\w+\.json)'$", r"\1", path or "") for path in handler.artifacts]
            handler.artifacts = tuple(paths)


def close_tracking(handlers: Sequence[Any]) -> None:
    """End the MLflow run of a validator that runs without a trainer.

    MONAI closes the runs of trainers and evaluators (https://github.com/Project-MONAI/MONAI/pull/5656), but leaves that
    of a validator to its trainer, which an evaluation does not have.

    Args:
        handlers: of the validator.
    """
    for handler in handlers:
        if isinstance(handler, MLFlowHandler):
            handler.close()
