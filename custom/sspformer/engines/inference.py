"""Inference on a batch of scans: a bad file does not stop the others, and an interrupted batch goes on."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.engines import SupervisedEvaluator

from ..compat import original_error
from ..io.files import digest, printable, stats, stem, write_atomically
from ..io.load import files_of, is_series
from ..io.tables import write_csv
from ..options import flag

logger = logging.getLogger("sspformer")


class ResultWriter(Protocol):
    """A transform of the postprocessing that writes a file or a folder for each scan."""

    def path_of(self, item: Mapping[str, Any]) -> Path | None:
        """Path of what it writes for an item of :func:`sspformer.data.find_inputs`; None if that is nothing."""


class ScansFailed(RuntimeError):
    """Raised at the end of a batch in which scans failed; the message lists them with their reasons.

    Args:
        rows: of the scans that failed, as ``inference.csv`` has them.
        total: number of scans in the batch.
    """

    show_traceback = False  # read by sspformer.compat.print_cause_last

    def __init__(self, rows: Sequence[Mapping[str, Any]], total: int) -> None:
        super().__init__(rows, total)  # what a copy in another process is made from
        self.rows, self.total = list(rows), total

    def __str__(self) -> str:
        lines = [f"  {row['source'] or row['name']}: {row['reason']}" for row in self.rows]
        return "\n".join([f"{len(self.rows)} of {self.total} scans failed:", *lines])


def mark_done(
    inputs: Sequence[Mapping[str, Any]],
    writers: Sequence[ResultWriter],
    weights: str | Path,
    options: Mapping[str, Any],
    overwrite: bool = False,
) -> list[Mapping[str, Any]]:
    """Find the scans whose results are there already, so that an interrupted batch goes on where it stopped.

    A result is complete if the record beside it names the same file, weights and options, and if all that the other
    writers write for the scan is there and newer.

    Args:
        inputs: items of :func:`sspformer.data.find_inputs`.
        writers: all that write results. The first writes the NIfTI that the record belongs to.
        weights: file of the network's weights.
        options: whatever else shapes a result; compared as text.
        overwrite: process all scans again.

    Returns:
        the items. Each has ``done`` if its result is complete; a ``reason`` if a file of that name is there that was
        made from another scan or has no record; else the ``record`` (JSON) to write beside its result.
    """
    overwrite = flag(overwrite)
    return [item if item.get("reason") else _mark(item, writers, weights, options, overwrite) for item in inputs]


def _mark(
    item: Mapping[str, Any],
    writers: Sequence[ResultWriter],
    weights: str | Path,
    options: Mapping[str, Any],
    overwrite: bool,
) -> Mapping[str, Any]:
    try:
        return _compare(item, writers, weights, options, overwrite)
    except OSError as error:  # the name is too long for a result, the scan is gone, ...
        reason = f"its result cannot be looked up: {error.strerror or error}"
        return {"name": item["name"], "source": item.get("source", ""), "reason": reason}


def _compare(
    item: Mapping[str, Any],
    writers: Sequence[ResultWriter],
    weights: str | Path,
    options: Mapping[str, Any],
    overwrite: bool,
) -> Mapping[str, Any]:
    record = _record(item["image"], weights, options)
    result, *others = [path for writer in writers if (path := writer.path_of(item))]
    place = _record_path(result)
    written = place.read_text(errors="replace") if result.is_file() and place.is_file() else ""
    if overwrite or not written:
        return {**item, "record": record}
    source = _source(written)
    if source != _source(record):
        made = f"made from {source}" if source else f"and {place.name} beside it does not say what from"
        reason = f"{result} is there already, {made}: give another output_dir, or replace it with --overwrite true"
        return {"name": item["name"], "source": item.get("source", ""), "reason": reason}
    done = written == record and all(_is_newer(path, result) for path in others)
    return {**item, **({"done": True} if done else {"record": record})}


def _record_path(result: Path) -> Path:
    """Path of the file that says what a result was made from."""
    return result.with_name(result.name.removesuffix(".nii.gz").removesuffix(".csv") + ".json")


def _source(record: str) -> str:
    """What a record says that an output was made from; empty if it is none of ours."""
    try:
        return str(json.loads(record)["source"])
    except (ValueError, TypeError, KeyError):
        return ""


def _is_newer(path: Path, result: Path) -> bool:
    """Whether a file or folder is there that was made from this result."""
    return path.exists() and path.stat().st_mtime_ns >= result.stat().st_mtime_ns


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
    """MONAI's ``Dataset``, except that a scan that cannot be read or preprocessed gives the reason instead.

    Items that are ``done`` are left out; ``items`` has all of them. An item with a ``reason`` keeps it, and one of a
    DICOM series keeps the list of its ``files``.

    Args:
        data: items of :func:`mark_done`. A client's own may be ``{"image": path}``; it is then named after its file.
        transform: the preprocessing.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable | None = None) -> None:
        names = [item.get("name") or stem(files_of(item["image"])[0].name) for item in data]
        count = Counter(names)
        names = [name if count[name] == 1 else f"{name}-{i}" for i, name in enumerate(names, 1)]
        self.items = [{**item, "name": name} for item, name in zip(data, names)]
        super().__init__([item for item in self.items if not item.get("done")], transform)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        reason = item.get("reason")
        if not reason:
            try:
                files = {"files": list(item["image"])} if is_series(item["image"]) else {}
                return {**super().__getitem__(index), **files}
            except Exception as error:  # whatever is wrong with this scan, the others go on
                reason = _reason(error)
        return {"name": item["name"], "reason": reason}


class InferenceEvaluator(SupervisedEvaluator):
    """MONAI's ``SupervisedEvaluator``, except that it goes on after a scan that fails.

    The output for such a scan is ``{"reason": ...}``. Batches hold one scan each.
    """

    def run(self) -> None:
        if len(self.data_loader):  # MONAI warns of an empty one, but here the batch is complete
            super().run()

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> Any:  # MONAI's hook for subclasses
        if "reason" in batchdata:
            return {"reason": batchdata["reason"][0]}
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:  # out of memory, disk full, ...
            return {"reason": _reason(error)}


def _reason(error: Exception) -> str:
    error = original_error(error)
    return printable(error) or type(error).__name__


class InferenceReport:
    """Writes ``inference.csv``, and beside each result the record of what it was made from.

    ``inference.csv`` has one row for each scan: name, status (written, already there, failed), seconds, reason and
    source. The handler is for the evaluator of an :class:`InferenceDataset`.

    Args:
        output_dir: gets ``inference.csv``.
        writers: see :func:`mark_done`; empty: no records are written.
    """

    COLUMNS = ("name", "status", "seconds", "reason", "source")

    def __init__(self, output_dir: str | Path, writers: Sequence[ResultWriter] = ()) -> None:
        self.path, self.writers = Path(output_dir) / "inference.csv", writers
        self.sources: dict[str, str] = {}
        self.records: dict[str, tuple[Path, str]] = {}
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        dataset = engine.data_loader.dataset
        self.sources = {item["name"]: str(item.get("source", "")) for item in dataset.items}
        engine.add_event_handler(Events.STARTED, self.start, dataset.data)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.start_clock)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.count)

    def start(self, engine: Engine, to_do: Sequence[Mapping[str, Any]]) -> None:
        for item in to_do:
            if self.writers and not item.get("reason"):
                place = _record_path(self.writers[0].path_of(item))
                place.unlink(missing_ok=True)  # an earlier record must not vouch for what is written from now on
                if "record" in item:
                    self.records[item["name"]] = place, item["record"]
        write_csv(self.path, self.rows, self.COLUMNS)
        left = {item["name"] for item in to_do}
        for name in self.sources:
            if name not in left:
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
            write_atomically(*self.records[name])
        self.add(name, "failed" if reason else "written", round(time.perf_counter() - self.clock, 2), reason)

    def add(self, name: str, status: str, seconds: float | str = "", reason: str = "", **more: Any) -> None:
        row = {"name": name, "status": status, "seconds": seconds, "reason": reason, **more}
        self.rows.append(row | {"source": self.sources.get(name, "")})
        write_csv(self.path, self.rows, self.COLUMNS)

    def count(self, engine: Engine) -> None:
        """Set the numbers of scans, and the seconds, as the engine's metrics, which ``--tracking mlflow`` logs."""
        for status in ("written", "failed"):
            engine.state.metrics[status] = sum(row["status"] == status for row in self.rows)
        engine.state.metrics["seconds"] = sum(row["seconds"] or 0 for row in self.rows)

    def finish(self) -> None:
        """Log a summary.

        Raises:
            ScansFailed: if a scan failed.
        """
        count = {status: sum(row["status"] == status for row in self.rows) for status in ("written", "already there")}
        count["already there"] += 0 if self.rows else len(self.sources)  # nothing was left to do, so nothing ran
        again = " (--overwrite true writes them again)" if count["already there"] else ""
        logger.info(
            f"{count['written']} scans written to {self.path.parent}, {count['already there']} already there{again}"
        )
        if failed := [row for row in self.rows if row["status"] == "failed"]:
            raise ScansFailed(failed, len(self.sources))
