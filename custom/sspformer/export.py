"""Export a network for other programs: ``python -m sspformer.export pt2``.

MONAI 1.6 has commands for TorchScript, ONNX and TensorRT, and none for ``torch.export``. This one takes the options of
``monai.bundle ckpt_export``. The archive has the configs and the metadata where MONAI's own reader for this format will
look for them (https://github.com/Project-MONAI/MONAI/pull/8777).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import fire
import torch
from monai.bundle import ConfigParser

from .networks.exported import export_network, save_exported
from .networks.pretrained import load_weights

logger = logging.getLogger("sspformer")


def pt2(
    net_id: str = "network_def",
    filepath: str = "models/model.pt2",
    ckpt_file: str = "models/model.pt",
    meta_file: str = "configs/metadata.json",
    config_file: str | Sequence[str] = "configs/inference.json",
    input_shape: Sequence[int] | None = None,
    **override,
) -> None:
    """Export a network of the configs, with its weights, by torch.export.

    Args:
        net_id: entry of the network.
        filepath: what is written, NAME.pt2.
        ckpt_file: its weights, which must fit exactly.
        meta_file: metadata of the bundle.
        config_file: config, or a list of them; they and the metadata are put into the file.
        input_shape: [B, C, X, Y, Z]: only images of these sides are taken, in any batch; without it, all whose sides
            are multiples of the patch, and at least two patches long. Classification and regression need it.
        override: entries of the configs, as --encoder#size small.
    """
    files = [config_file] if isinstance(config_file, str) else list(config_file)
    parser = ConfigParser()
    parser.read_config(files)
    parser.read_meta(meta_file)
    parser.update(override)
    network = load_weights(parser.get_parsed_content(net_id), ckpt_file)
    texts = {f"{Path(file).stem}.json": json.dumps(ConfigParser.load_config_file(file)) for file in files}
    texts["metadata.json"] = json.dumps({**parser["_meta_"], "pytorch_version": torch.__version__})
    save_exported(export_network(network, input_shape), filepath, texts)
    logger.info(f"exported to {filepath}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fire.Fire({"pt2": pt2})
