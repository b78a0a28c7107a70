"""The report of an evaluation."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from torch import Tensor

from ..metrics import _mean_of_finite, summarize

__all__ = ["EvaluationReport", "names_of", "samples_of"]

logger = logging.getLogger("sspformer")


class EvaluationReport:
    """Writes every subject's scores and their summary; for the evaluator, whose metrics keep their details.

    - ``metrics.csv``: a row a subject; of segmentation a row for each structure of each subject, and one for the mean
      over the structures that the true map has. A structure that is not there is left blank; one that was missed has
      Dice 0 and an infinite Hausdorff distance. Of restoration the row says what was drawn to degrade the scan:
      ``sigma``, or ``factor`` along each axis of the network's input (RAS).
    - ``summary.csv`` and ``summary.json``: over subjects, n, mean, its 95 % confidence interval (bootstrap), standard
      deviation, median, and how many scores are infinite, which the other columns leave out.

    Of a metric and the same one ``*_of_input`` there is also the gain. Names of subjects are those of the batch.

    Args:
        output_dir: where the files go.
        class_names: of the structures, without the background, where metrics have a column for each.
        settings: what else ``summary.json`` should say, for example the weights.
        seed: of the bootstrap.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        class_names: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.directory, self.class_names = Path(output_dir), class_names
        self.settings, self.seed = dict(settings or {}), seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self)

    def reset(self, engine: Engine) -> None:
        self.names: list[str] = []
        self.subjects: list[str] = []
        self.drawn: list[dict[str, Any]] = []

    def collect(self, engine: Engine) -> None:
        names = names_of(engine.state.batch)
        self.names += names
        samples = samples_of(engine.state.batch)
        self.subjects += [str(sample.get("subject", name)) for sample, name in zip(samples, names, strict=True)]
        drawn = getattr(engine.prepare_batch, "drawn", {})
        self.drawn += [{key: _as_cell(values[i]) for key, values in drawn.items()} for i in range(len(names))]

    def __call__(self, engine: Engine) -> None:
        details = {name: scores.cpu().double().numpy() for name, scores in engine.state.metric_details.items()}
        for name in [name for name in details if f"{name}_of_input" in details]:
            details[f"{name}_gain"] = details[name] - details[f"{name}_of_input"]
        n_columns = max(scores.shape[1] for scores in details.values())
        structures = [""]
        if n_columns > 1:
            named = list(self.class_names or [f"label {i + 1}" for i in range(n_columns)])
            if len(named) != n_columns:
                raise ValueError(f"class_names has {len(named)} names, but the metrics have {n_columns} structures.")
            structures = ["mean", *named]
            details = {name: np.column_stack([_mean_of_finite(scores), scores]) for name, scores in details.items()}
        key = {"structure": structures} if n_columns > 1 else {}
        rows = [
            {
                "name": name,
                "subject": self.subjects[i],
                **self.drawn[i],
                **{column: values[j] for column, values in key.items()},
                **{name: scores[i, j] for name, scores in details.items()},
            }
            for i, name in enumerate(self.names)
            for j in range(len(structures))
        ]
        summary = [
            {
                "metric": name,
                **{column: values[j] for column, values in key.items()},
                **summarize(scores[:, j], self.seed, self.subjects),
            }
            for name, scores in details.items()
            for j in range(len(structures))
        ]
        self.directory.mkdir(parents=True, exist_ok=True)
        _write_csv(self.directory / "metrics.csv", rows)
        _write_csv(self.directory / "summary.csv", summary)
        counts = {"scans": len(self.names), "subjects": len(set(self.subjects))}
        content = {**self.settings, **counts, "summary": [_without_nan(row) for row in summary]}
        (self.directory / "summary.json").write_text(json.dumps(content, indent=4) + "\n")
        said = ", ".join(f"{count} {what}" for what, count in counts.items())
        logger.info(f"{said} evaluated; scores in {self.directory}\n{_table(summary)}")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if np.isnan(value) else f"{value:.5g}"


def _as_cell(value: Tensor) -> float | str:
    """A number, or several as ``1x1x2.5``."""
    return value.item() if value.ndim == 0 else "x".join(f"{number:.4g}" for number in value.tolist())


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no nan."""
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary for the log: a line a structure, or a metric where there are no structures."""
    lines: dict[str, list[str]] = {}
    metrics = list(dict.fromkeys(row["metric"] for row in summary))
    for row in summary:
        text = f"{row['mean']:.4g}"
        if not np.isnan(row["ci_low"]):
            text += f" [{row['ci_low']:.4g}, {row['ci_high']:.4g}]"
        if row["infinite"]:
            text += f" ({row['infinite']} infinite)"
        lines.setdefault(row.get("structure", row["metric"]), []).append(text)
    if "structure" in summary[0]:
        lines = {"": metrics, **lines}
    first = max(map(len, lines))
    widths = [max(map(len, cells)) for cells in zip(*lines.values())]
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.ljust(width) for cell, width in zip(cells, widths))]).rstrip()
        for name, cells in lines.items()
    )


def samples_of(output: Mapping | Sequence[Mapping]) -> list[Mapping]:
    """The samples of an engine's output or batch, decollated or not."""
    if not isinstance(output, Mapping):
        return list(output)
    n = len(output["image"])
    return [{key: _take(value, i) for key, value in output.items()} for i in range(n)]


def _take(value: Any, i: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _take(part, i) for key, part in value.items()}
    return value[i] if isinstance(value, (Tensor, Sequence)) else value


def names_of(batch: Mapping | Sequence[Mapping]) -> list[str]:
    """The names of a batch's samples; ``sample_0`` and so on for those without."""
    return [str(sample.get("name", f"sample_{i}")) for i, sample in enumerate(samples_of(batch))]
