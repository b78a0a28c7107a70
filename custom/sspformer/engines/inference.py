"""Inference on a batch of scans: one bad file stops nothing, and an interrupted batch goes on."""

from __future__ import annotations

import csv
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.engines import SupervisedEvaluator
from monai.utils import str2bool

from ..io.files import dicom_path, digest, output_path, picture_path, record_path, stats, stem, write_atomically
from ..io.load import files_of, is_series

__all__ = ["InferenceDataset", "InferenceEvaluator", "InferenceReport", "unfinished"]

logger = logging.getLogger("sspformer")


def unfinished(
    inputs: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    postfix: str,
    weights: str | Path,
    options: Mapping[str, Any],
    pictures: bool = False,
    overwrite: bool = False,
    dicom: bool = False,
) -> list[Mapping[str, Any]]:
    """The items, of which some are done already, so that an interrupted batch goes on where it stopped.

    An output counts as done if the record beside it says that it was made from the same file, weights and options.

    Args:
        inputs: items of :func:`sspformer.data.find_inputs`.
        output_dir: of the outputs.
        postfix: of the outputs.
        weights: file of the network's weights.
        options: whatever else shapes an output; compared as text.
        pictures: each output needs a picture as well.
        overwrite: all are to do.
        dicom: each output of a DICOM series needs a DICOM one as well.

    Returns:
        the items: with ``done``; or, still to do, with their ``record`` (JSON); or with a ``reason`` if another scan's
        output has their name, or one beside which there is a JSON file but no record.
    """
    pictures, overwrite, dicom = map(str2bool, (pictures, overwrite, dicom))  # strings from the command line
    items = []
    for item in inputs:
        if item.get("reason"):
            items.append(item)
            continue
        record = _record(item["image"], weights, options)
        where = (item["name"], output_dir, postfix)
        output, before = output_path(*where), record_path(*where)
        beside = [picture_path(*where)] if pictures else []
        beside += [dicom_path(*where)] if dicom and is_series(item["image"]) else []
        written = before.read_text(errors="replace") if output.is_file() and before.is_file() else ""
        source = _source(written)
        if overwrite or not written or source == _source(record):
            to_do = overwrite or written != record or not all(_is_newer(path, output) for path in beside)
            items.append({**item, **({"record": record} if to_do else {"done": True})})
        else:
            made = f"made from {source}" if source else f"and {before.name} beside it does not say what from"
            reason = f"{output} is there already, {made}: give another output_dir, or replace it with --overwrite true"
            items.append({"name": item["name"], "source": item.get("source", ""), "reason": reason})
    return items


def _source(record: str) -> str:
    """What a record says that an output was made from; empty if it is none of ours."""
    try:
        return str(json.loads(record)["source"])
    except (ValueError, TypeError, KeyError):
        return ""


def _is_newer(path: Path, output: Path) -> bool:
    """Whether what goes beside an output is there, and of this output."""
    return path.exists() and path.stat().st_mtime_ns >= output.stat().st_mtime_ns


def _record(image: str | Sequence[str], weights: str | Path, options: Mapping[str, Any]) -> str:
    """What an output is made from, as JSON; a series is named by its folder."""
    files = [file.absolute() for file in files_of(image)]
    pair = [file.with_suffix(".img") for file in files if file.suffix.lower() == ".hdr"]
    model = Path(weights).absolute()
    record = {
        "source": str(files[0].parent if is_series(image) else files[0]),
        "source_version": digest(stats(files + pair)),
        "weights": str(model),
        "weights_version": digest(stats([model] if model.is_file() else [])),
        "options": {name: str(value).lower() for name, value in options.items()},
    }
    return json.dumps(record, indent=1) + "\n"


class InferenceDataset(Dataset):
    """MONAI's ``Dataset`` that gives the reason in place of a scan that cannot be read or preprocessed.

    Items are those of :func:`sspformer.data.find_inputs`; one with a ``reason`` keeps it, one of a DICOM series keeps
    its ``files``. Those that are ``done`` are left out, and are in ``items`` alone. A client's own list may be of
    ``{"image": path}``: then names are those of the files.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable | None = None) -> None:
        names = [item.get("name") or stem(files_of(item["image"])[0].name) for item in data]
        count = Counter(names)
        names = [name if count[name] == 1 else f"{name}-{i}" for i, name in enumerate(names, 1)]
        self.items = [{**item, "name": name} for item, name in zip(data, names)]
        super().__init__([item for item in self.items if not item.get("done")], transform)

    def _transform(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        reason = item.get("reason")
        if not reason:
            try:
                files = {"files": list(item["image"])} if is_series(item["image"]) else {}
                return {**super()._transform(index), **files}
            except Exception as error:  # whatever is wrong with this scan, the others do not suffer
                reason = _reason(error)
        return {"name": item["name"], "reason": reason}


class InferenceEvaluator(SupervisedEvaluator):
    """MONAI's ``SupervisedEvaluator`` that goes on after a scan that fails.

    The output of such a scan is ``{"reason": ...}``. Batches hold one scan each.
    """

    def run(self) -> None:
        if len(self.data_loader):  # of an empty one MONAI warns, but here it is a batch that is complete
            super().run()

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> Any:
        if "reason" in batchdata:
            return {"reason": batchdata["reason"][0]}
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:  # out of memory, disk full, ...
            return {"reason": _reason(error)}


def _reason(error: BaseException) -> str:
    """The message of an exception, without what MONAI's transforms wrap around it."""
    while str(error).startswith("applying transform") and error.__cause__ is not None:
        error = error.__cause__
    return f"{error}" or type(error).__name__


class InferenceReport:
    """Writes ``inference.csv``, a row a scan: name, status (written, already there, failed), seconds, reason, source;
    and beside each output the record of what it was made from, see :func:`unfinished`. For an evaluator of an
    :class:`InferenceDataset`.

    Args:
        output_dir: of the outputs and the report.
        postfix: of the outputs.
    """

    COLUMNS = ("name", "status", "seconds", "reason", "source")

    def __init__(self, output_dir: str | Path, postfix: str) -> None:
        self.sources: dict[str, str] = {}
        self.path, self.postfix = Path(output_dir) / "inference.csv", postfix
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        dataset = engine.data_loader.dataset
        self.sources = {item["name"]: str(item.get("source", "")) for item in dataset.items}
        engine.add_event_handler(Events.STARTED, self.start, dataset.data)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.start_clock)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.count)

    def start(self, engine: Engine, to_do: Sequence[Mapping[str, Any]]) -> None:
        names = {item["name"] for item in to_do}
        self.records = {item["name"]: item["record"] for item in to_do if "record" in item}
        for item in to_do:  # the record of before must not vouch for what is written from now on
            if not item.get("reason"):
                record_path(item["name"], self.path.parent, self.postfix).unlink(missing_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writeheader()
        for name in self.sources:
            if name not in names:
                self.add(name, "already there")

    def start_clock(self, engine: Engine) -> None:
        self.clock = time.perf_counter()

    def __call__(self, engine: Engine) -> None:
        batch, output = engine.state.batch, engine.state.output
        name = batch[0]["name"] if isinstance(batch, list) else batch["name"][0]
        reason = output.get("reason", "") if isinstance(output, Mapping) else ""
        if reason:
            logger.warning(f"{self.sources.get(name) or name} failed: {reason}")
        elif name in self.records:
            write_atomically(record_path(name, self.path.parent, self.postfix), self.records[name])
        self.add(name, "failed" if reason else "written", round(time.perf_counter() - self.clock, 2), reason)

    def add(self, name: str, status: str, seconds: float | str = "", reason: str = "") -> None:
        values = (name, status, seconds, reason, self.sources.get(name, ""))
        self.rows.append(dict(zip(self.COLUMNS, values)))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow(self.rows[-1])

    def count(self, engine: Engine) -> None:
        """Numbers of scans, and seconds, as the engine's metrics: what ``--tracking mlflow`` logs."""
        for status in ("written", "failed"):
            engine.state.metrics[status] = sum(row["status"] == status for row in self.rows)
        engine.state.metrics["seconds"] = sum(row["seconds"] or 0 for row in self.rows)

    def finish(self) -> None:
        """Sum up; ends the program with status 1 and the list of the scans that failed, if any did."""
        count = {status: sum(row["status"] == status for row in self.rows) for status in ("written", "already there")}
        count["already there"] += 0 if self.rows else len(self.sources)  # nothing was left to do, so nothing ran
        again = " (--overwrite true writes them again)" if count["already there"] else ""
        logger.info(
            f"{count['written']} scans written to {self.path.parent}, {count['already there']} already there{again}"
        )
        failed = [row for row in self.rows if row["status"] == "failed"]
        if failed:
            lines = [f"  {row['source'] or row['name']}: {row['reason']}" for row in failed]
            raise SystemExit("\n".join([f"{len(failed)} of {len(self.sources)} scans failed:", *lines]))
