"""Train on scans in several folders as if each were a hospital, with NVFlare's simulator, on this machine.

    python examples/federated/simulate.py --dataset_dirs /path/to/site1,/path/to/site2 --output_dir /path/to/output

Federated averaging: in each round every site trains the global weights on its own scans, and the server takes the mean
of what they give back, weighed by their numbers of steps.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import fire
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv, set_per_site_config

BUNDLE = Path(__file__).resolve().parents[2] / "bundle"


def simulate(
    dataset_dirs: str | Sequence[str],
    output_dir: str,
    config_file: str | Sequence[str] = "pretrain.json",
    rounds: int = 2,
    local_epochs: int = 1,
    key_metric: str = "masked_error",
    **options,
) -> None:
    """Write the global weights to ``global.pt``, a state dict of the config's network.

    Args:
        dataset_dirs: a folder for each site, separated by commas.
        output_dir: gets ``global.pt`` and a folder for each site.
        config_file: ``pretrain.json`` or ``train.json`` of the bundle, and overlays, separated by commas.
        rounds: how often the server averages.
        local_epochs: of each site in a round.
        key_metric: of the sites' held-out scans: ``dice`` or ``psnr`` for fine-tuning; NVFlare keeps the global weights
            that it likes best as ``best_FL_global_model.pt``.
        options: of the configs, for all sites: ``--batch_size 4``, ``--network_def#size small``, ...
    """
    output = Path(output_dir).absolute()
    if " " in str(output):
        raise ValueError(f"output_dir {str(output)!r} has a space, at which NVFlare would cut it: give one without.")
    output.mkdir(parents=True, exist_ok=True)
    configs = [f"configs/{name}" for name in listed(config_file)]
    options["epochs"] = rounds * local_epochs  # what the schedules of the learning rate and of beta span

    parser = ConfigParser()
    parser.read_config([str(BUNDLE / config) for config in configs])
    parser.update({"bundle_root": str(BUNDLE), **options})
    set_determinism(parser["seed"])
    torch.save(parser.get_parsed_content("network").cpu().state_dict(), output / "initial.pt")
    of_network = {name: parser.get_parsed_content(f"network_def#{name}") for name in parser["network_def"]}

    sites = {}
    for i, folder in enumerate(listed(dataset_dirs), start=1):
        own = {"dataset_dir": str(Path(folder).absolute()), "output_dir": str(output / f"site-{i}")}
        shared = {"bundle_root": str(BUNDLE), "config_file": configs, "local_epochs": local_epochs, **options}
        settings = output / f"site-{i}.json"
        settings.write_text(json.dumps({**shared, **own}, indent=4))
        sites[f"site-{i}"] = {"train_args": f"--site_file {settings}"}

    recipe = FedAvgRecipe(
        name="sspformer",
        model={"class_path": of_network.pop("_target_"), "args": of_network},
        initial_ckpt=str(output / "initial.pt"),
        min_clients=len(sites),
        num_rounds=rounds,
        key_metric=key_metric,
        key_metric_mode="min" if key_metric.endswith("error") else "max",
        train_script=str(Path(__file__).with_name("client.py")),
    )
    set_per_site_config(recipe, sites)
    result = recipe.execute(SimEnv(clients=list(sites), workspace_root=str(output / "nvflare"))).get_result()
    written = torch.load(Path(result, "server/simulate_job/app_server/FL_global_model.pt"), weights_only=True)
    torch.save(written["model"], output / "global.pt")
    print(f"{rounds} rounds of {len(sites)} sites: {output / 'global.pt'}")


def listed(names: str | Sequence[str]) -> list[str]:
    """What stands between commas; fire makes a tuple of some."""
    return names.split(",") if isinstance(names, str) else list(names)


if __name__ == "__main__":
    fire.Fire(simulate)
