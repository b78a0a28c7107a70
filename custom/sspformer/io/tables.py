"""Tables: as CSV files and as text for the log."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_atomically


def write_csv(
    path: str | os.PathLike,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    line_end: str = "\r\n",
) -> None:
    """Writes rows as CSV; a reader sees the old file or the new one, never half of one.

    Args:
        path: the file.
        rows: a mapping each; a missing column is an empty cell.
        columns: their order. None: that in which the rows name them.
        line_end: of every line.

    Raises:
        ValueError: when a row has a column that is not in ``columns``.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, _columns(rows) if columns is None else columns, restval="", lineterminator=line_end)
    table.writeheader()
    table.writerows(rows)
    write_atomically(Path(path), text.getvalue())


def format_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    header: bool = True,
    max_rows: int | None = None,
) -> str:
    """Rows as aligned columns of text, one line each.

    Args:
        rows: a mapping each; a missing column is an empty cell.
        columns: those to show. None: all, in the order in which the rows name them.
        header: begin with the names of the columns.
        max_rows: show so many rows, then how many more there are. None: all.
    """
    columns = _columns(rows) if columns is None else columns
    lines = [list(columns)] if header else []
    lines += [[str(row.get(column, "")) for column in columns] for row in rows[:max_rows]]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if max_rows is not None and len(rows) > max_rows:
        text.append(f"... and {len(rows) - max_rows} more")
    return "\n".join(text)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))
