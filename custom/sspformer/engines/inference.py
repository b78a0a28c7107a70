"""Inference on a batch of scans: a bad file does not stop the others, and an interrupted batch goes on."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from ignite.engine import Engine, Events, State
from monai.data import Dataset
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor

from ..compat import original_error
from ..geometry import free_memory, memory_needed
from ..io.files import digest, printable, stats, stem, write_atomically
from ..io.load import files_of, is_series
from ..io.tables import write_csv
from ..networks import ExportedNetwork
from ..options import flag
from .compiling import compiled_or_plain, whether_to_compile

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
    """MONAI's ``SupervisedEvaluator``, except that it goes on after a scan that fails, and begins the next one early.

    While a scan is postprocessed and written, a thread reads the next one and runs the network on it. It does so if the
    memory has room for two scans like the one at hand. Handlers, postprocessing and writers stay in the thread of the
    caller, and see one scan after the other.

    MONAI's ``ThreadBuffer`` keeps up to three results, and ends the batch without a word where its thread fails.

    The output for a scan that fails is ``{"reason": ...}``. Batches hold one scan each.

    Compiled, the network sees one size of batch only, the inferer's ``sw_batch_size``: smaller ones are filled up.
    CUDA graphs are not recorded, which PyTorch keeps for one thread.

    Args:
        args: of ``SupervisedEvaluator``.
        ahead: False: begin a scan when the one before it is written.
        compile: the network: True, False, or "auto": on a GPU, for ``COMPILE_FROM`` scans or more. Compiling takes
            about a minute. Networks of ``torch.export`` and TorchScript stay as they are.
        compile_kwargs: of ``torch.compile``.
        kwargs: of ``SupervisedEvaluator``.

    Raises:
        ValueError: if ``compile`` is none of these.
    """

    COMPILE_FROM = 200  # estimated: a minute, over the 0.3 s that a scan may gain

    def __init__(
        self,
        *args,
        ahead: bool = True,
        compile: bool | str = "auto",
        compile_kwargs: Mapping[str, Any] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.ahead, self.compile_kwargs = flag(ahead), dict(compile_kwargs or {})
        wanted = whether_to_compile(compile)
        if wanted == "auto":
            wanted = self.state.device.type == "cuda" and len(self.data_loader) >= self.COMPILE_FROM
        self._wanted = wanted and not isinstance(self.network, (ExportedNetwork, torch.jit.ScriptModule))
        self._compiled: Any = None  # the network, after its first window
        self._output: Any = None  # of the network, for the batch that the engine takes next
        self._stopped = False

    def run(self) -> None:
        if not len(self.data_loader):  # MONAI warns of an empty one, but here the batch is complete
            return
        self._stopped = False
        batches = self._batches()
        try:
            Engine.run(self, batches, max_epochs=self.state.max_epochs)
        finally:
            batches.close()  # the thread ends with the batch, however that ends

    def _batches(self) -> Iterator[dict[str, Any]]:
        """The batches; ``_output`` is then that of the network."""
        made = ((batch, self._predict(batch)) for batch in self.data_loader)
        thread = ThreadPoolExecutor(1, "network")
        try:
            following = thread.submit(next, made, None)
            while (one := following.result()) is not None:
                batch, self._output = one
                ahead = self.ahead and _has_room(self._output)
                del one, following  # or they keep the scores
                if ahead:
                    following = thread.submit(next, made, None)
                yield batch
                if not ahead:
                    following = thread.submit(next, made, None)
        finally:
            self._stopped = True
            thread.shutdown()

    def _predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The network's output, or the reason why there is none; in the thread."""
        if "reason" in batch:
            return {"reason": batch["reason"][0]}
        aside = copy.copy(self)  # MONAI's step sets the state of its engine and fires the events that postprocess
        aside.state, aside.fire_event = State(device=self.state.device), lambda event: None
        aside.inferer = lambda inputs, network, *args, **kwargs: self.inferer(inputs, self._window, *args, **kwargs)
        try:
            try:
                return super()._iteration(aside, batch)
            except torch.OutOfMemoryError:
                if getattr(self.inferer, "sw_batch_size", 1) == 1:
                    raise
            n, self.inferer.sw_batch_size = self.inferer.sw_batch_size, 1
            logger.warning(f"the GPU has no memory for {n} windows at a time: from here on it is one")
            torch.cuda.empty_cache()
            return super()._iteration(aside, batch)
        except Exception as error:  # out of memory, ...
            return {"reason": _reason(error)}

    def _window(self, windows: Tensor, *args, **kwargs) -> Tensor:
        if self._stopped:  # by Ctrl-C, say, which waits for a window instead of a scan
            raise RuntimeError("the batch was stopped")
        if not self._wanted:
            return self.network(windows, *args, **kwargs)
        n = len(windows)
        if (missing := getattr(self.inferer, "sw_batch_size", 1) - n) > 0:
            windows = torch.cat([windows, windows[-1:].expand(missing, *windows.shape[1:])])
        if self._compiled is None:
            self._compiled = compiled_or_plain(
                self.network, lambda network: network(windows, *args, **kwargs), "the network", self.compile_kwargs
            )
        try:
            return self._compiled(windows, *args, **kwargs)[:n]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of other windows than the first, which it was tried out on
            if self._compiled is self.network:
                raise
            logger.warning(f"from here on the network runs without torch.compile: {_reason(error)}")
            self._compiled = self.network
            return self.network(windows, *args, **kwargs)[:n]

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> Any:  # MONAI's hook for subclasses
        output, self._output = self._output, None
        if "reason" in output:
            return output
        engine.state.output = output
        del output
        try:
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            engine.fire_event(IterationEvents.MODEL_COMPLETED)
        except Exception as error:  # disk full, ...
            return {"reason": _reason(error)}
        return engine.state.output


def _has_room(output: Mapping[str, Any]) -> bool:
    """Whether the memory has room for two more scans like the one that has this output."""
    pred = output.get(CommonKeys.PRED)
    if not isinstance(pred, Tensor):
        return True
    need = 2 * memory_needed(pred.shape[2:], pred.shape[1])
    if pred.device.type == "cuda":
        cached = torch.cuda.memory_reserved(pred.device) - torch.cuda.memory_allocated(pred.device)
        if need > torch.cuda.mem_get_info(pred.device)[0] + cached:
            return False
    return need <= free_memory()


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
