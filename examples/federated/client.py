"""One site of a federation: NVFlare brings the global weights, and MONAI's ``MonaiAlgo`` trains them on its scans.

Weights, scores and the number of steps leave the site. Its scans stay, and so does the file that says where they are.
"""

import json
from pathlib import Path

import fire
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject


def site(bundle_root: str, config_file: list[str], output_dir: str, local_epochs: int, **options) -> MonaiAlgo:
    """Return what trains and scores at one site.

    Args:
        bundle_root: folder of the bundle.
        config_file: ``configs/pretrain.json`` or ``configs/train.json``, relative to the bundle, then overlays.
        output_dir: output folder of the site. Its folder ``global`` gets what concerns the global weights.
        local_epochs: epochs between two averages.
        options: options of the configs: ``dataset_dir`` of the site, ``epochs`` of all rounds together, ...
    """
    options = {"cache_dir": str(Path(output_dir, "cache")), **options}  # training and scoring share one
    return MonaiAlgo(
        bundle_root,
        local_epochs=local_epochs,
        send_weight_diff=False,
        config_train_filename=config_file,
        # resuming from a checkpoint would replace the global weights
        train_kwargs={**options, "output_dir": output_dir, "resume": False},
        config_evaluate_filename=config_file,
        eval_kwargs={**options, "output_dir": str(Path(output_dir, "global"))},
    )


def main(site_file: str) -> None:
    """Take part until the server ends the federation. ``site_file`` is JSON with the arguments of `site`."""
    import nvflare.client as flare

    flare.init()
    algorithm = site(**json.loads(Path(site_file).read_text()))
    algorithm.initialize({ExtraItems.CLIENT_NAME: flare.get_site_name()})
    while flare.is_running():
        received = ExchangeObject(weights=flare.receive().params)
        metrics = algorithm.evaluate(received).metrics
        algorithm.train(received)
        trained = algorithm.get_weights()
        steps = trained.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS]
        flare.send(flare.FLModel(params=trained.weights, metrics=metrics, meta={"NUM_STEPS_CURRENT_ROUND": steps}))
    algorithm.finalize()


if __name__ == "__main__":
    fire.Fire(main)
