"""The weights that ship are those of the documentation: their checksums, and published figures recomputed from them."""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("nilearn", reason="the MNI152 brain comes with the nilearn package")

from benchmarks.figures import mni152  # noqa: E402

PUBLISHED = {
    (row["weights"], row["figure"]): float(row["value"])
    for row in csv.DictReader((ROOT / "benchmarks" / "results" / "mni152.csv").open(newline="", encoding="utf-8"))
}
TOLERANCE = {"Dice": 0.005, "gain": 0.1}  # other processors, other rounding: bfloat16, other convolutions


def test_documentation_names_the_checksum_of_every_file():
    text = (ROOT / "bundle" / "docs" / "README.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"\| `(models/[^`]+\.pt)` \| `([0-9a-f]{64})`", text))
    files = sorted((ROOT / "bundle" / "models").rglob("*.pt"))
    sums = {
        f"{file.relative_to(ROOT / 'bundle').as_posix()}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
    assert named == sums
    shipped = (ROOT / "bundle" / "models" / "SHA256SUMS").read_text().split()
    assert dict(zip(shipped[1::2], shipped[::2])) == {name.removeprefix("models/"): sha for name, sha in sums.items()}


def test_the_default_inference_segments_the_mni152_brain_as_published(tmp_path):
    for row in mni152.segmentation(tmp_path):
        assert row["value"] == pytest.approx(PUBLISHED[row["weights"], row["figure"]], abs=TOLERANCE["Dice"]), row


@pytest.mark.parametrize("task", ["denoising", "super_resolution"])
def test_restoration_of_the_mni152_brain_is_as_published(task, tmp_path):
    row = mni152.restoration(task, tmp_path)
    assert row["value"] == pytest.approx(PUBLISHED[row["weights"], row["figure"]], abs=TOLERANCE["gain"]), row
