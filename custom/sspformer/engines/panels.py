"""Pictures of a run: handlers and a transform that draw them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, ResampleToMatch

from ..io.files import POSTFIX, picture_path
from ..pictures import figure_to_array, reconstruction_panel, restoration_panel, segmentation_panel
from ..transforms.masking import MaskIndices
from .inference import _reason
from .report import _names, _samples

__all__ = ["ReconstructionPanel", "RestorationPanel", "SavePictured", "SegmentationPanel"]

logger = logging.getLogger("sspformer")


class ReconstructionPanel:
    """A PNG panel a validation, ``pictures/epoch_0010.png``, and the same picture in TensorBoard; for the evaluator.

    Args:
        output_dir: the panels go to its ``pictures``.
        n_images: rows at the most, taken from the first batch.
        mask: the mask strategy of the training, to show a mask of it as well; or None.
        summary_writer: TensorBoard writer, or None.
    """

    def __init__(
        self, output_dir: str, n_images: int = 4, mask: Callable[..., MaskIndices] | None = None, summary_writer=None
    ) -> None:
        self.directory = Path(output_dir) / "pictures"
        self.n_images = n_images
        self.mask = mask
        self.writer = summary_writer

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch  # MONAI's ValidationHandler hands over the trainer's
        figure = reconstruction_panel(engine.state.output, self.n_images, engine.state.batch.get("name"), self.mask)
        self.directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.directory / f"epoch_{epoch:04d}.png", dpi=100)
        if self.writer is not None:
            self.writer.add_image("reconstruction", figure_to_array(figure), epoch, dataformats="HWC")


class SavePictured(MapTransform):
    """A PNG a scan: labels over the scan, or before and after; last of the postprocessing, when the result is written.

    One that cannot be drawn is a warning.

    Args:
        keys: the prediction as it was written, one key.
        output_dir: gets ``pictures/<name>_<postfix of the task>.png``.
        task: "segmentation", "denoising" or "super_resolution".
        class_names: of the structures without the background. None, or names that are not as many as the network's
            classes: their numbers are shown.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, task: str, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__(keys)
        self.output_dir, self.task, self.class_names = output_dir, task, class_names

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            try:
                self.draw(data["image"], data[key], data["name"])
            except Exception as error:  # the result is there, and counts
                logger.warning(f"no picture of {data['name']}: {_reason(error)}")
        return dict(data)

    def draw(self, image: MetaTensor, pred: MetaTensor, name: str) -> None:
        """Draws one scan, the image on the network's grid and the prediction on the file's."""
        if self.task == "segmentation":
            names = self.class_names if len(self.class_names or ()) + 1 == pred.meta.get("n_classes") else None
            image = ResampleToMatch(mode="bilinear", padding_mode="border")(image, pred)
            figure = segmentation_panel([{"image": image, "pred": pred, "name": name}], names)
        else:
            figure = restoration_panel([{"image": image, "pred": pred, "name": name}])
        path = picture_path(name, self.output_dir, POSTFIX[self.task])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)


class _Panel:
    """Keeps the first samples of an evaluation and draws them at its end."""

    tag: str

    def __init__(self, output_dir: str, n_images: int = 2, separate: bool = False, summary_writer=None) -> None:
        self.directory = Path(output_dir) / "pictures"
        self.n_images, self.separate, self.writer = n_images, separate, summary_writer

    def figure(self, samples: Sequence[Mapping]) -> Figure:
        raise NotImplementedError

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def reset(self, engine: Engine) -> None:
        self._samples: list[dict] = []

    def collect(self, engine: Engine) -> None:
        batch = engine.state.batch
        for output, item, name in zip(_samples(engine.state.output), _samples(batch), _names(batch)):
            if len(self._samples) < self.n_images:
                sample = {**{key: output.get(key) for key in ("image", "label", "pred")}, "name": name}
                if not isinstance(sample["image"], MetaTensor) and isinstance(item["image"], MetaTensor):
                    sample["image"] = MetaTensor(sample["image"], affine=item["image"].affine)
                self._samples.append(sample)
                if self.separate:
                    self._save(self.figure(self._samples[-1:]), name)
                    self._samples[-1] = {}

    def __call__(self, engine: Engine) -> None:
        if self.separate or not self._samples:
            return
        epoch = engine.state.epoch  # MONAI's ValidationHandler hands over the trainer's
        figure = self.figure(self._samples)
        self._save(figure, f"epoch_{epoch:04d}")
        if self.writer is not None:
            self.writer.add_image(self.tag, figure_to_array(figure), epoch, dataformats="HWC")
        self._samples = []

    def _save(self, figure: Figure, name: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.directory / f"{name}.png", dpi=100)


class SegmentationPanel(_Panel):
    """True and predicted labels of the first samples, a PNG an evaluation, ``pictures/epoch_0010.png``, and the same
    picture in TensorBoard; for the evaluator.

    Args:
        output_dir: the pictures go to its ``pictures``.
        class_names: of the labels from 1 on; None: their numbers.
        n_images: samples at the most.
        separate: a file for each sample, ``pictures/<name>.png``, instead of one for all.
        summary_writer: TensorBoard writer, or None.
    """

    tag = "segmentation"

    def __init__(
        self,
        output_dir: str,
        class_names: Sequence[str] | None = None,
        n_images: int = 2,
        separate: bool = False,
        summary_writer=None,
    ) -> None:
        super().__init__(output_dir, n_images, separate, summary_writer)
        self.class_names = class_names

    def figure(self, samples: Sequence[Mapping]) -> Figure:
        return segmentation_panel(samples, self.class_names)


class RestorationPanel(_Panel):
    """Scans before and after, the truth and the errors of the first samples, a PNG an evaluation; for the evaluator.

    Args:
        output_dir, n_images, separate, summary_writer: as of :class:`SegmentationPanel`.
    """

    tag = "restoration"

    def figure(self, samples: Sequence[Mapping]) -> Figure:
        return restoration_panel(samples)
