"""Simulate a federation on one machine: each folder of scans is a hospital, and NVFlare averages their weights.

    python examples/federated/simulate.py --dataset_dirs /path/to/site1,/path/to/site2 --output_dir /path/to/output

In each round, every site trains the global weights on its own scans. The server then averages the results, weighted by
the number of steps of each site (federated averaging).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv, set_per_site_config

BUNDLE = Path(__file__).resolve().parents[2] / "bundle"
#: options of the configs that the simulation sets itself, and what to use instead
INSTEAD = {
    "epochs": "use --rounds and --local_epochs",
    "dataset_dir": "use --dataset_dirs, a folder for each site",
    "resume": "a federation starts afresh; --pretrained gives train.json weights to start from",
}


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
        dataset_dirs: one folder for each site, separated by commas.
        output_dir: gets ``global.pt`` and a folder for each site.
        config_file: ``pretrain.json`` or ``train.json`` of the bundle, then overlays, separated by commas.
        rounds: how often the server averages.
        local_epochs: epochs of each site in a round.
        key_metric: score on the sites' held-out scans; ``dice`` or ``psnr`` for fine-tuning. NVFlare keeps the global
            weights with the best score as ``best_FL_global_model.pt``.
        options: options of the configs, for all sites: ``--batch_size 4``, ``--encoder#size small``, ...

    Raises:
        ValueError: for an option that the simulation sets itself, for a folder that is given twice, and for an
            ``output_dir`` with a space.
        FileNotFoundError: if one of ``dataset_dirs`` or ``config_file`` does not exist.
        RuntimeError: if a site failed; the message names the logs.
    """
    for name, instead in INSTEAD.items():
        if name in options:
            raise ValueError(f"--{name} is not an option here: {instead}.")
    folders = [Path(folder).absolute() for folder in listed(dataset_dirs)]
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"dataset_dirs: {folder} does not exist.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"dataset_dirs names a folder twice: {', '.join(str(folder) for folder in folders)}.")
    for name, value in options.items():  # the sites run in other folders
        if isinstance(value, str) and os.path.exists(value):
            options[name] = os.path.abspath(value)
    output = Path(output_dir).absolute()
    if " " in str(output):
        raise ValueError(f"output_dir {str(output)!r} contains a space, where NVFlare would cut it: give one without.")
    configs = [f"configs/{name}" for name in listed(config_file)]
    if missing := [config for config in configs if not (BUNDLE / config).is_file()]:
        raise FileNotFoundError(f"config_file: {', '.join(missing)} is not in {BUNDLE}.")
    output.mkdir(parents=True, exist_ok=True)
    options["epochs"] = rounds * local_epochs  # the schedules of learning rate and beta span all rounds

    parser = ConfigParser()
    parser.read_config([str(BUNDLE / config) for config in configs])
    parser.update({"bundle_root": str(BUNDLE), **options})
    set_determinism(parser["seed"])
    torch.save(parser.get_parsed_content("network").cpu().state_dict(), output / "initial.pt")
    of_network = component(parser, "network_def")

    sites = {}
    for i, folder in enumerate(folders, start=1):
        own = {"dataset_dir": str(folder), "output_dir": str(output / f"site-{i}")}
        shared = {"bundle_root": str(BUNDLE), "config_file": configs, "local_epochs": local_epochs, **options}
        settings = output / f"site-{i}.json"
        settings.write_text(json.dumps({**shared, **own}, indent=4))
        sites[f"site-{i}"] = {"train_args": f"--site_file {settings}"}

    recipe = FedAvgRecipe(
        name="sspformer",
        model=of_network,
        initial_ckpt=str(output / "initial.pt"),
        min_clients=len(sites),
        num_rounds=rounds,
        key_metric=key_metric,
        key_metric_mode="min" if key_metric.endswith("error") else "max",
        train_script=str(Path(__file__).with_name("client.py")),
    )
    set_per_site_config(recipe, sites)
    environment = SimEnv(clients=list(sites), workspace_root=str(output / "nvflare"))
    try:
        result = recipe.execute(environment).get_result()
        written = torch.load(Path(result, "server/simulate_job/app_server/FL_global_model.pt"), weights_only=True)
    except (RuntimeError, FileNotFoundError):
        logs = sorted(map(str, Path(environment.workspace_root, recipe.name).glob("*/log.txt")))
        raise RuntimeError(f"the federation failed: see the errors in {', '.join(logs)}.") from None
    torch.save(written["model"], output / "global.pt")
    print(f"{rounds} rounds of {len(sites)} sites: {output / 'global.pt'}")


def component(parser: ConfigParser, key: str) -> dict[str, Any]:
    """An object of the configs as NVFlare builds it: its class and arguments, of which some are objects themselves."""
    args = {}
    for name, value in parser[key].items():
        other = parser[value[1:]] if isinstance(value, str) and value.startswith("@") else None
        is_object = isinstance(other, dict) and "_target_" in other
        args[name] = component(parser, value[1:]) if is_object else parser.get_parsed_content(f"{key}#{name}")
    return {"class_path": args.pop("_target_"), "args": args}


def listed(names: str | Sequence[str]) -> list[str]:
    """Names that commas separate; fire has made a tuple of some already."""
    return names.split(",") if isinstance(names, str) else list(names)


if __name__ == "__main__":
    fire.Fire(simulate)
