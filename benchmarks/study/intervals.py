"""Means, paired differences and bootstrap intervals over seeds and subjects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from benchmarks.study.protocol import COMPARISONS, EVERY, PRIMARY, SEEDS


def tables_of(rows: Sequence[dict], score: str) -> dict[str, dict[tuple[int, str], float]]:
    """Score of each arm by seed and subject."""
    tables: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        tables.setdefault(row["start"], {})[row["seed"], row["subject"]] = row[score]
    return tables


def as_array(*tables: dict[tuple[int, str], float]) -> tuple[np.ndarray, set[int]]:
    """Scores ``(tables, seeds, subjects)`` of the seeds that are in all tables, and these seeds.

    Raises:
        ValueError: if their subjects differ.
    """
    seeds = set.intersection(*({seed for seed, _ in table} for table in tables))
    subjects = {tuple(sorted(subject for at, subject in table if at == seed)) for table in tables for seed in seeds}
    if len(subjects) > 1:
        raise ValueError(f"runs differ in their subjects: {', '.join(sorted(set().union(*subjects)))}")
    order = next(iter(subjects), ())
    return np.array(
        [[[table[seed, subject] for subject in order] for seed in sorted(seeds)] for table in tables]
    ), seeds


def interval(values: np.ndarray, confidence: float = 0.95, draws: int = 100_000) -> tuple[float, float]:
    """Bootstrap interval of the mean of ``(seeds, subjects)``: both are drawn with replacement."""
    rng = np.random.default_rng(0)
    n_seeds, n_subjects = values.shape
    # a draw counts how often each seed and each subject is in it
    seeds = rng.multinomial(n_seeds, [1 / n_seeds] * n_seeds, size=draws) / n_seeds
    subjects = rng.multinomial(n_subjects, [1 / n_subjects] * n_subjects, size=draws) / n_subjects
    means = np.einsum("ds,sp,dp->d", seeds, values, subjects, optimize=True)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def compare(
    rows: Sequence[dict], columns: Sequence[str], primary: int | None, score: str = "dice", digits: int = 4
) -> list[dict]:
    """Means of each arm, and differences of the pairs of ``COMPARISONS``, with intervals.

    Args:
        rows: a score each, of a run and subject.
        columns: compare the rows that have these in common: task, number of labels.
        primary: number of primary comparisons, for the corrected interval of the differences in the groups ``PRIMARY``;
            None: there are none.
        score: the column to compare.
        digits: decimals.
    """
    summary = []
    for group in sorted({tuple(row[column] for column in columns) for row in rows}):
        here = dict(zip(columns, group, strict=True))
        tables = tables_of([row for row in rows if here.items() <= row.items()], score)
        for start in EVERY:
            if start in tables:
                summary.append({**here, **statistics(start, as_array(tables[start])[0][0], digits)})
        for first, second, is_primary in COMPARISONS:
            if first in tables and second in tables:
                (values, reference), seeds = as_array(tables[first], tables[second])
                if seeds:
                    asked = is_primary and primary and group in PRIMARY and seeds >= set(SEEDS)
                    corrected = 1 - 0.05 / primary if asked else None
                    difference = statistics(f"{first} - {second}", values - reference, digits, corrected)
                    summary.append({**here, **difference})
    return summary


def statistics(name: str, values: np.ndarray, digits: int, corrected: float | None = None) -> dict:
    """Mean of ``(seeds, subjects)``, its interval, and each seed's mean.

    A confidence ``corrected`` adds the interval at that confidence, and the 95 % interval from the means of the seeds
    alone (t distribution).
    """
    columns = {"mean": values.mean()}
    columns["low"], columns["high"] = interval(values)
    by_seed = values.mean(axis=1)
    if corrected is not None:
        columns["low_corrected"], columns["high_corrected"] = interval(values, corrected)
        margin = stats.t.ppf(0.975, len(by_seed) - 1) * stats.sem(by_seed)
        columns["low_of_seeds"], columns["high_of_seeds"] = values.mean() - margin, values.mean() + margin
    counts = {"arm": name, "seeds": values.shape[0], "subjects": values.shape[1]}
    means = " ".join(f"{value:.{digits}f}" for value in by_seed)
    return {**counts, **{k: round(float(v), digits) for k, v in columns.items()}, "of_each_seed": means}
