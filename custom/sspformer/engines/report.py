"""The report of an evaluation: each scan's scores, and their summary over subjects."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import decollate_batch
from torch import Tensor

from ..io.tables import format_table, write_csv
from ..metrics import mean_of_finite, summarize

logger = logging.getLogger("sspformer")


class EvaluationReport:
    """Writes the scores of each scan, and their summary over subjects; for an evaluator that keeps metric details.

    - ``metrics.csv``: one row for each scan. For segmentation, one for each structure of each scan, and one for the
      mean over the structures that the true label map has. The score of a structure that is not there is blank; one
      that was missed has a Dice of 0 and an infinite Hausdorff distance. For restoration, the row also says what was
      drawn to degrade the scan: ``sigma``, or ``factor`` along each axis of the network's input (RAS).
    - ``summary.csv`` and ``summary.json``: over subjects, n, mean, its 95 % confidence interval (bootstrap), standard
      deviation, median, and how many scores are infinite. The other columns leave these out.

    Where there are a metric and the same with ``_of_input``, the gain is written, too. Scans have the names of the
    batch.

    Args:
        output_dir: where the files go.
        class_names: of the structures, without the background, if metrics have a column for each.
        settings: what else ``summary.json`` should say, for example the weights.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        class_names: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.class_names = Path(output_dir), class_names
        self.settings = dict(settings or {})

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self)

    def reset(self, engine: Engine) -> None:
        self.scans: list[dict[str, Any]] = []

    def collect(self, engine: Engine) -> None:
        drawn = getattr(engine.prepare_batch, "drawn", {})
        samples = samples_of(engine.state.batch)
        for i, (sample, name) in enumerate(zip(samples, names_of(samples), strict=True)):
            scan = {"name": name, "subject": str(sample.get("subject", name))}
            self.scans.append({**scan, **{key: _as_cell(values[i]) for key, values in drawn.items()}})

    def __call__(self, engine: Engine) -> None:
        details = {name: scores.cpu().double().numpy() for name, scores in engine.state.metric_details.items()}
        for name in [name for name in details if f"{name}_of_input" in details]:
            details[f"{name}_gain"] = details[name] - details[f"{name}_of_input"]
        keys: list[dict[str, str]] = [{}]  # of the columns of the scores
        if (n_structures := max(scores.shape[1] for scores in details.values())) > 1:
            named = list(self.class_names or [f"label {i + 1}" for i in range(n_structures)])
            if len(named) != n_structures:
                raise ValueError(f"class_names has {len(named)} names, but the metrics have {n_structures} structures.")
            keys = [{"structure": name} for name in ("mean", *named)]
            details = {name: np.column_stack([mean_of_finite(scores), scores]) for name, scores in details.items()}
        rows = [
            {**scan, **key, **{name: scores[i, j] for name, scores in details.items()}}
            for i, scan in enumerate(self.scans)
            for j, key in enumerate(keys)
        ]
        subjects = [scan["subject"] for scan in self.scans]
        summary = [
            {"metric": name, **key, **summarize(scores[:, j], subjects=subjects)}
            for name, scores in details.items()
            for j, key in enumerate(keys)
        ]
        write_scores(self.directory, rows, summary, self.settings)


def write_scores(
    directory: Path, rows: Sequence[Mapping], summary: Sequence[Mapping], settings: Mapping[str, Any]
) -> None:
    """Writes ``metrics.csv``, ``summary.csv`` and ``summary.json``, and logs the summary."""
    for file, table in (("metrics.csv", rows), ("summary.csv", summary)):
        write_csv(directory / file, [{name: _cell(value) for name, value in row.items()} for row in table])
    counts = {what: len({row[key] for row in rows}) for what, key in (("scans", "name"), ("subjects", "subject"))}
    content = {**settings, **counts, "summary": [_without_nan(row) for row in summary]}
    (directory / "summary.json").write_text(json.dumps(content, indent=4) + "\n")
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    logger.info(f"{said} evaluated; scores in {directory}\n{_table(summary)}")


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
    """The summary for the log: a line for each structure, or for each metric if there are no structures."""
    lines: dict[str, dict[str, str]] = {}
    structured = "structure" in summary[0]
    for row in summary:
        text = f"{row.get('mean', row.get('value')):.4g}"
        if not np.isnan(row["ci_low"]):
            text += f" [{row['ci_low']:.4g}, {row['ci_high']:.4g}]"
        if row.get("infinite"):
            text += f" ({row['infinite']} infinite)"
        first = row["structure" if structured else "metric"]
        lines.setdefault(first, {"": first})[row["metric"] if structured else "score"] = text
    return format_table(list(lines.values()), header=structured)


def samples_of(output: Mapping | Sequence[Mapping]) -> list[Mapping]:
    """The samples of an engine's output or batch, decollated or not."""
    return decollate_batch(output) if isinstance(output, Mapping) else list(output)


def names_of(batch: Mapping | Sequence[Mapping]) -> list[str]:
    """The names of the samples of a batch; ``sample_0`` and so on for those without."""
    return [str(sample.get("name", f"sample_{i}")) for i, sample in enumerate(samples_of(batch))]
