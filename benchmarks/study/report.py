"""The report of the study: from the rows of all runs to tables with intervals and a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.common import RESULTS, read_csv, save_csv, save_figure
from benchmarks.study import protocol
from benchmarks.study.intervals import compare
from benchmarks.study.runs import Study, fine_tuned
from sspformer.io import format_table

#: columns of a pretraining's history in the report
ERRORS = {
    "masked_error": "all hidden patches",
    "high_frequency_error": "quarter with the highest energy",
    "ssim": "SSIM",
}


def report(study: Study) -> None:
    """Write the tables and pictures of the published rows, after replacing those of runs that are complete here.

    So the tables need no run, and a study can go on on another machine.
    """
    clean, robust = collect(study)
    curves = with_published("study_curves.csv", collect_curves(study))
    pretrained = with_published("study_pretraining.csv", collect_pretraining(study), ["arm", "seed"])
    clean = with_published("study_segmentation.csv", clean)
    restored = with_published("study_restoration.csv", collect_restoration(study))
    robust = with_published("study_robustness.csv", robust)
    summaries: list[dict] = []
    if curves:
        save_csv(RESULTS / "study_curves.csv", curves)
        plot_curves(curves, protocol.CURVES)
    if pretrained:
        save_csv(RESULTS / "study_pretraining.csv", pretrained)
    if clean:
        save_csv(RESULTS / "study_segmentation.csv", clean)
        summaries += publish(compare(clean, ["task", "n_labels"], protocol.N_PRIMARY), "study_segmentation_summary.csv")
    if restored:
        save_csv(RESULTS / "study_restoration.csv", restored)
        every = mean_over(restored, "degradation", "gain", protocol.N_DEGRADATIONS)
        summary = compare(every, ["task", "degradation"], protocol.N_PRIMARY, "gain", 3)
        summary += compare(restored, ["task", "degradation"], None, "gain", 3)
        summaries += publish(summary, "study_restoration_summary.csv")
    if robust:
        save_csv(RESULTS / "study_robustness.csv", robust)
        # each subject's loss against its own scan without the artifact
        key = ("task", "n_labels", "start", "seed", "subject")
        before = {tuple(row[name] for name in key): row["dice"] for row in clean}
        losses = [
            {**row, "dice": row["dice"] - before[scan]}
            for row in robust
            if (scan := tuple(row[name] for name in key)) in before
        ]
        every = mean_over(losses, "artifact", "dice", {protocol.ROBUSTNESS[0]: len(protocol.ARTIFACTS)})
        summary = compare([*losses, *every], ["task", "n_labels", "artifact"], None)
        summaries += publish(summary, "study_robustness_summary.csv")
    tables = page_tables(summaries, pretrained, curves) | {"gpu": gpu_table(read_results("study_gpu.csv"))}
    protocol.PAGE.write_text(with_tables(protocol.PAGE.read_text(), tables))
    print(f"tables written to {protocol.PAGE}")


def collect_pretraining(study: Study) -> list[dict]:
    """Last validation of every complete pretraining."""
    rows = []
    for arm in protocol.ARMS:
        for seed in protocol.SEEDS:
            if study.pretrain(arm, seed).complete():
                last = read_csv(study.pretraining_of(arm, seed) / "history.csv")[-1]
                rows.append({"arm": arm, "seed": seed, **{name: round(float(last[name]), 5) for name in ERRORS}})
    return rows


def segmentations(study: Study) -> Iterator[tuple[dict, Path]]:
    """Every fine-tuning that was begun: what the name of its folder says, and the folder."""
    for task in protocol.TASKS:
        for run in sorted((study.work_dir / f"{task}_{protocol.TASKS[task]['steps']}").glob("*_*")):
            n_labels, rest = run.name.split("_", 1)
            start, seed = rest.rsplit("_", 1)
            yield {"task": task, "n_labels": int(n_labels), "start": start, "seed": int(seed)}, run


def collect(study: Study) -> tuple[list[dict], list[dict]]:
    """Mean Dice of every test subject in the complete runs, on scans as they are and on those with artifacts."""
    clean, robust = [], []
    for here, run in segmentations(study):
        for evaluation in sorted(run.glob("evaluation*/metrics.csv")):
            artifact = evaluation.parent.name.removeprefix("evaluation").removeprefix("_")
            rows = [
                {**here, "subject": row["name"], "dice": float(row["dice"])}
                for row in read_csv(evaluation)
                if row["structure"] == "mean"
            ]
            if artifact:
                robust += [{"artifact": artifact, **row} for row in rows]
            else:
                clean += rows
    return clean, robust


def collect_curves(study: Study) -> list[dict]:
    """Dice of the validation subjects by step, of every complete training."""
    return [
        {**here, "step": int(float(row["iteration"])), "dice": round(float(row["dice"]), 4)}
        for here, run in segmentations(study)
        if fine_tuned(run, here["task"], here["n_labels"], here["start"])
        for row in read_csv(run / "history.csv")
        if row["dice"]
    ]


def collect_restoration(study: Study) -> list[dict]:
    """Gain in PSNR, dB, of every test subject in the complete runs, by degradation; the mean of its scans."""
    lines = []
    for task, (settings, _) in protocol.RESTORATION.items():
        for file in sorted((study.work_dir / f"{task}_{settings['epochs']}").glob("*/quality.csv")):
            start, seed = file.parent.name.rsplit("_", 1)
            rows = read_csv(file)
            gains: dict[tuple[str, str, str], list[float]] = {}
            key = "level" if task == "denoising" else "degradation"
            before = {(r["scan"], r[key]): r for r in rows if r["method"] in ("input", "zero-filled")}
            for row in rows:
                if row["method"] == start or (row["method"] == "cubic" and start == "scratch"):  # every file has it
                    gain = float(row["psnr"]) - float(before[row["scan"], row[key]]["psnr"])
                    gains.setdefault((row["method"], row[key], row["subject"]), []).append(gain)
            for (method, degradation, subject), values in gains.items():
                here = {"task": task, "degradation": degradation, "start": method, "seed": int(seed)}
                lines.append({**here, "subject": subject, "gain": sum(values) / len(values)})
    return lines


def read_results(name: str) -> list[dict]:
    """The rows of a CSV file in the results, without empty cells; none if there is no such file."""
    texts = ("task", "start", "subject", "degradation", "artifact", "arm", "of_each_seed", "settings", "gpu")
    kinds = {**dict.fromkeys(texts, str), **dict.fromkeys(("n_labels", "seed", "seeds", "step", "steps"), int)}
    return [{k: kinds.get(k, float)(v) for k, v in row.items() if v} for row in read_csv(RESULTS / name)]


def with_published(
    name: str,
    rows: Sequence[dict],
    run: Sequence[str] = ("task", "n_labels", "degradation", "artifact", "start", "seed"),
) -> list[dict]:
    """Published rows of other runs, then these.

    Args:
        name: CSV file in the results.
        rows: of the runs here.
        run: columns that tell one run from another, as far as the rows have them.
    """

    def of(row: Mapping) -> tuple:
        return tuple(row.get(column) for column in run)

    here = {of(row) for row in rows}
    return [*(row for row in read_results(name) if of(row) not in here), *rows]


def publish(summary: list[dict], name: str) -> list[dict]:
    """Write a summary to the results, print it and return it."""
    save_csv(RESULTS / name, summary)
    print(format_table(summary))
    return summary


def mean_over(rows: Sequence[dict], column: str, score: str, wanted: Mapping[str, int]) -> list[dict]:
    """Average the runs that have all values of a column, as many as ``wanted`` by task; it becomes "mean of all"."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        group = tuple(value for name, value in row.items() if name not in (column, score))
        groups.setdefault(group, []).append(row)
    return [
        {**group[0], column: "mean of all", score: sum(row[score] for row in group) / len(group)}
        for group in groups.values()
        if len(group) == wanted[group[0]["task"]]
    ]


def page_tables(summary: Sequence[dict], pretrained: Sequence[dict], curves: Sequence[dict] = ()) -> dict[str, str]:
    """The tables of docs/study.md, in markdown, by their names there.

    A cell has a mean, the 95 % interval of a difference, and the number of seeds in brackets where it is not three.
    """
    restored = {"mean of all": "mean", **{str(level): f"{100 * level:.0f} % noise" for level in protocol.LEVELS}}
    names = {"brain_structures": "17 structures", "hippocampus": "hippocampus"}
    groups = {(task, n): f"{names[task]}, {n} labelled, Dice" for task in names for n in protocol.TASKS[task]["labels"]}
    groups |= {("denoising", key): f"denoising, {name}, dB" for key, name in restored.items()}
    degradations = ("mean of all", *protocol.DEGRADATIONS)
    groups |= {
        ("super_resolution", key): f"super-resolution, {key.removesuffix(' of all')}, dB" for key in degradations
    }
    robust = [(*protocol.ROBUSTNESS, artifact) for artifact in (*protocol.ARTIFACTS, "mean of all")]
    cells = {}
    for row in summary:
        group = tuple(row[name] for name in ("task", "n_labels", "degradation", "artifact") if name in row)
        digits = 2 if row["task"] in protocol.RESTORATION else 3
        text = f"{row['mean']:{'+' if ' - ' in row['arm'] else ''}.{digits}f}"
        if " - " in row["arm"]:
            text += f" [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
        cells[group, row["arm"]] = text + ("" if row["seeds"] == len(protocol.SEEDS) else f" ({row['seeds']})")

    def table(rows: dict, columns: Collection[str]) -> str:
        """``rows`` maps the key of a group to a title; columns are arms and differences."""
        body = [[name, *(cells.get((row, column), "") for column in columns)] for row, name in rows.items()]
        body = [line for line in body if any(line[2:])]  # the first arm alone is no comparison
        return markdown(["", *(" - ".join(map(title, column.split(" - "))) for column in columns)], body)

    pairs = [f"{a} - {b}" for a, b, _ in protocol.COMPARISONS]
    main = [*protocol.MAIN, *(pair for pair in pairs if set(pair.split(" - ")) <= set(protocol.MAIN))]
    others = [name for name in protocol.ARMS if name not in protocol.MAIN]
    more = [*others, *(pair for pair in pairs if set(pair.split(" - ")) & set(others))]
    peers = [*protocol.PEERS, "cubic"]
    against = ["scratch", *peers, *(f"{peer} - scratch" for peer in peers)]
    body = []
    for arm in protocol.ARMS:
        if seeds := [row for row in pretrained if row["arm"] == arm]:
            values = [[row[name] for row in seeds] for name in ERRORS]
            spread = [f" [{min(v):.4f}, {max(v):.4f}]" if len(v) > 1 else "" for v in values]
            cells_of_arm = [f"{sum(v) / len(v):.4f}{text}" for v, text in zip(values, spread, strict=True)]
            body.append([title(arm), str(len(seeds)), *cells_of_arm])
    return {
        "main": table(groups, main),
        "others": table(groups, more),
        "peers": table(groups, against),
        "robustness": table({group: group[-1] for group in robust}, main),
        "pretraining": markdown(["arm", "seeds", *ERRORS.values()], body),
        "curves": speed_table(curves, names),
        "design": design_table(curves),
    }


def title(start: str) -> str:
    """The name of a start in tables."""
    return protocol.TITLES.get(start, start)


def design_table(curves: Sequence[dict]) -> str:
    """Dice of the contenders of the design by step, with the first seed."""
    task = next(iter(protocol.TASKS))
    group = {"task": task, "n_labels": protocol.TASKS[task]["labels"][0], "seed": protocol.SEEDS[0]}
    rows = [row for row in curves if group.items() <= row.items()]
    steps = sorted({row["step"] for row in rows})
    body = []
    for start in protocol.DESIGN:
        dice = {row["step"]: f"{row['dice']:.3f}" for row in rows if row["start"] == start}
        body += [[title(start), *(dice.get(step, "") for step in steps)]] if dice else []
    return markdown(["start", *(f"{step} steps" for step in steps)], body)


def speed_table(curves: Sequence[dict], names: Mapping[str, str]) -> str:
    """Steps until a run reaches 95 % of the best Dice that scratch reaches on the validation with the same seed."""
    runs: dict[tuple, dict[int, list[tuple[int, float]]]] = {}
    for row in curves:
        by_seed = runs.setdefault((row["task"], row["n_labels"], row["start"]), {})
        by_seed.setdefault(row["seed"], []).append((row["step"], row["dice"]))
    body = []
    compared = {run: seeds for run, seeds in runs.items() if run[2] in protocol.EVERY}
    for (task, n_labels, start), seeds in sorted(compared.items(), key=lambda item: protocol.EVERY.index(item[0][2])):
        scratch = runs.get((task, n_labels, "scratch"), {})
        line = [f"{names[task]}, {n_labels} labelled", title(start), [], []]
        for seed in sorted(seeds.keys() & scratch.keys()):
            wanted = 0.95 * max(dice for _, dice in scratch[seed])
            line[2].append(f"{max(dice for _, dice in seeds[seed]):.3f}")
            line[3].append(str(next((step for step, dice in sorted(seeds[seed]) if dice >= wanted), "never")))
        body += [[*line[:2], ", ".join(line[2]), ", ".join(line[3])]] if line[2] else []
    body.sort(key=lambda line: line[0])
    return markdown(["", "start", "best Dice of each seed", "steps to 95 % of the best of scratch"], body)


def gpu_rows(file: Path) -> list[dict]:
    """The fine-tunings in what a GPU brought back; the last line of a run counts."""
    rows = {}
    for run in map(json.loads, file.read_text().splitlines()):
        if run["name"].startswith("segment") and "error" not in run:
            arm, seed, n_labels = run["name"].split("_")[1:4]
            known = {"start": arm, "n_labels": int(n_labels), "seed": int(seed), "steps": run["steps"]}
            settings = {name.split("#")[-1]: value for name, value in run["options"].items() if name != "overlay"}
            known |= {"learning_rate": settings["learning_rate"], "settings": json.dumps(settings, sort_keys=True)}
            figures = {name: run[name] for name in ("best", "last", "to_95", "seconds", "gpu") if name in run}
            rows[run["name"]] = known | figures
    return list(rows.values())


def gpu_table(rows: Sequence[dict]) -> str:
    """Best Dice of the validation on a GPU: mean, lowest and highest seed, and the mean lead over scratch's seeds."""
    groups: dict[tuple, dict[int, dict]] = {}
    scratch: dict[tuple, float] = {}  # the best of its networks and rates
    for row in rows:
        groups.setdefault((row["n_labels"], row["steps"], row["start"], row["settings"]), {})[row["seed"]] = row
        if row["start"].startswith("scratch"):
            key = (row["n_labels"], row["steps"], row["seed"])
            scratch[key] = max(row["best"], scratch.get(key, 0.0))
    body = []
    for (n_labels, steps, start, _), seeds in sorted(groups.items(), key=lambda item: item[0][:2]):
        best = {seed: row["best"] for seed, row in seeds.items()}
        mean = sum(best.values()) / len(best)
        spread = f" [{min(best.values()):.3f}, {max(best.values()):.3f}]" if len(best) > 1 else ""
        paired = [seed for seed in best if (n_labels, steps, seed) in scratch and not start.startswith("scratch")]
        leads = [best[seed] - scratch[n_labels, steps, seed] for seed in paired]
        lead = f"{sum(leads) / len(leads):+.3f}" if leads else ""
        rate = f"{next(iter(seeds.values()))['learning_rate']:g}"
        soon = ", ".join(str(int(row["to_95"])) for _, row in sorted(seeds.items()))
        body.append([str(n_labels), str(steps), start, rate, str(len(best)), f"{mean:.3f}{spread}", lead, soon])
    header = ["labelled", "steps", "start", "rate", "seeds", "best Dice", "over the best scratch", "steps to 95 %"]
    return markdown(header, body)


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table without its empty columns."""
    keep = [at for at in range(len(header)) if at == 0 or any(row[at] for row in body)]
    rows = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(row[at] for at in keep) + " |\n" for row in rows) if body else ""


def with_tables(page: str, tables: dict[str, str]) -> str:
    """Replace the tables of a page, each below a comment with its name; an empty one stays as it was."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n\n)(\|.*\n)*\n?")
        if not place.search(page):
            raise ValueError(f"the page has no place for the table: <!-- {name} -->")
        page = place.sub(lambda match: f"{match[1]}{table}\n", page) if table else page  # noqa: B023
    return page


def plot_curves(rows: Sequence[dict], path: Path) -> None:
    """Draw the validation's Dice by step: thin lines are runs, thick ones the means of the seeds of an arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys((row["task"], row["n_labels"]) for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.6), layout="constrained", squeeze=False)
    for axis, (task, n_labels) in zip(axes[0], tasks, strict=True):
        here = [row for row in rows if (row["task"], row["n_labels"]) == (task, n_labels)]
        starts = [start for start in protocol.EVERY if any(row["start"] == start for row in here)]
        for start in starts:
            color, by_step = f"C{protocol.EVERY.index(start)}", {}
            for seed in sorted({row["seed"] for row in here if row["start"] == start}):
                run = sorted((r["step"], r["dice"]) for r in here if (r["start"], r["seed"]) == (start, seed))
                axis.plot(*zip(*run, strict=True), lw=0.7, alpha=0.5, color=color)
                for step, dice in run:
                    by_step.setdefault(step, []).append(dice)
            mean = [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]
            axis.plot(*zip(*mean, strict=True), lw=2, color=color, label=title(start))
        axis.set(title=f"{task.replace('_', ' ')}, {n_labels} labelled", xlabel="step")
        axis.set_ylabel("mean Dice of the validation subjects")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path, dpi=120)
    plt.close(figure)
