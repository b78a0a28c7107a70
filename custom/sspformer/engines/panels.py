"""Handlers and a transform that draw pictures of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, ResampleToMatch

from ..compat import original_error
from ..pictures import figure_to_array, reconstruction_panel, restoration_panel, segmentation_panel
from ..transforms.masking import MaskIndices
from .report import names_of, samples_of

logger = logging.getLogger("sspformer")


class SavePNGd(MapTransform):
    """Draws a PNG of each result, the last step of the postprocessing. One that cannot be drawn is a warning.

    Args:
        keys: the prediction as it was written, one key.
        output_dir: gets ``pictures/<name>_<postfix>.png``.
        postfix: of the result.
        panel: draws a list of samples, of which there is one, with ``image`` (on the prediction's grid), ``pred`` and
            ``name``, such as :func:`sspformer.pictures.segmentation_panel`.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, postfix: str, panel: Callable[[Sequence[Mapping]], Figure]
    ) -> None:
        super().__init__(keys)
        self.directory, self.postfix, self.panel = Path(output_dir) / "pictures", postfix, panel

    def path_of(self, item: Mapping[Hashable, Any]) -> Path:
        """Path of the picture of an item."""
        return self.directory / f"{item['name']}_{self.postfix}.png"

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            try:
                self._draw(data["image"], data[key], data)
            except Exception as error:  # the result is there, and counts
                logger.warning(f"no picture of {data['name']}: {original_error(error)}")
        return dict(data)

    def _draw(self, image: MetaTensor, pred: MetaTensor, item: Mapping[Hashable, Any]) -> None:
        if image.shape[1:] != pred.shape[1:] or not torch.equal(image.affine, pred.affine):
            image = ResampleToMatch(mode="bilinear", padding_mode="border")(image, pred)
        figure = self.panel([{"image": image, "pred": pred, "name": item["name"]}])
        self.directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path_of(item), dpi=100)


class Panel:
    """Draws the first samples of an evaluation: a PNG and a picture in TensorBoard. For the evaluator.

    Args:
        output_dir: gets ``pictures/epoch_0010.png``.
        n_images: largest number of samples.
        separate: one file for each sample, ``pictures/<name>.png``, instead of one for all.
        summary_writer: TensorBoard writer, or None.
    """

    tag: str  # in TensorBoard

    def __init__(self, output_dir: str, n_images: int = 2, separate: bool = False, summary_writer=None) -> None:
        self.directory = Path(output_dir) / "pictures"
        self.n_images, self.separate, self.writer = n_images, separate, summary_writer

    def figure(self, samples: Sequence[Mapping]) -> Figure:
        """The panel of samples with ``image``, ``label``, ``pred`` and ``name``."""
        raise NotImplementedError

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def reset(self, engine: Engine) -> None:
        self._samples: list[dict] = []

    def collect(self, engine: Engine) -> None:
        if len(self._samples) >= self.n_images:
            return
        batch = engine.state.batch
        for output, item, name in zip(samples_of(engine.state.output), samples_of(batch), names_of(batch)):
            if len(self._samples) < self.n_images:
                sample = {**{key: output.get(key) for key in ("image", "label", "pred")}, "name": name}
                if not isinstance(sample["image"], MetaTensor) and isinstance(item["image"], MetaTensor):
                    sample["image"] = MetaTensor(sample["image"], affine=item["image"].affine)
                self._samples.append(sample)
                if self.separate:
                    self._save(self.figure(self._samples[-1:]), name)
                    self._samples[-1] = {}

    def __call__(self, engine: Engine) -> None:
        if self._samples and not self.separate:
            self._publish(self.figure(self._samples), engine)
        self._samples = []

    def _publish(self, figure: Figure, engine: Engine) -> None:
        epoch = engine.state.epoch  # the trainer's, which MONAI's ValidationHandler hands over
        self._save(figure, f"epoch_{epoch:04d}")
        if self.writer is not None:
            self.writer.add_image(self.tag, figure_to_array(figure), epoch, dataformats="HWC")

    def _save(self, figure: Figure, name: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.directory / f"{name}.png", dpi=100)


class ReconstructionPanel(Panel):
    """Masks and reconstructions of the first batch of a validation, see :class:`Panel`.

    Args:
        output_dir, n_images, summary_writer: see :class:`Panel`.
        mask: the mask strategy of the training, to show a mask of it as well; or None.
    """

    tag = "reconstruction"

    def __init__(
        self, output_dir: str, n_images: int = 4, mask: Callable[..., MaskIndices] | None = None, summary_writer=None
    ) -> None:
        super().__init__(output_dir, n_images, summary_writer=summary_writer)
        self.mask = mask

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, engine: Engine) -> None:
        names = engine.state.batch.get("name")
        self._publish(reconstruction_panel(engine.state.output, self.n_images, names, self.mask), engine)


class SegmentationPanel(Panel):
    """True and predicted labels, see :class:`Panel`.

    Args:
        output_dir, n_images, separate, summary_writer: see :class:`Panel`.
        class_names: of the labels from 1 on; None: their numbers.
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


class RestorationPanel(Panel):
    """Scans before and after, the truth and the errors, see :class:`Panel`."""

    tag = "restoration"

    def figure(self, samples: Sequence[Mapping]) -> Figure:
        return restoration_panel(samples)
