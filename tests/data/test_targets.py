"""Targets of whole scans: matched to the scans, checked before training, and split class by class."""

import csv
import json
import logging

import nibabel as nib
import numpy as np
import pytest

from sspformer.data import TargetOptions, prepare_targets, prepare_test_targets, target_classes

SUBJECTS = [f"sub-{i:02d}" for i in range(8)]
AGES = {subject: 20 + 5 * i for i, subject in enumerate(SUBJECTS)}


@pytest.fixture(scope="module")
def bids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bids")
    for i, subject in enumerate(SUBJECTS):
        (folder / subject / "anat").mkdir(parents=True)
        voxels = np.random.default_rng(i).integers(0, 99, (9, 9, 9)).astype(np.uint8)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / subject / "anat" / f"{subject}_T1w.nii.gz")
    return folder


def table(path, rows, header=("participant_id", "age", "sex"), delimiter="\t"):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def options(bids, tmp_path, rows, target="age", classes=None, **kwargs):
    path = table(tmp_path / "participants.tsv", rows)
    return TargetOptions(bids, tmp_path / "out", targets=path, target=target, classes=classes, **kwargs)


def rows(**changes):
    """A row for each subject, (id, age, sex); a change replaces the age."""
    return [
        (subject, changes.get(subject.replace("-", "_"), AGES[subject]), "FM"[i % 2])
        for i, subject in enumerate(SUBJECTS)
    ]


def targets_of(lists):
    return {item["subject"]: item["target"] for split in lists.values() for item in split}


@pytest.mark.parametrize("prefix", ["sub-", ""])
@pytest.mark.parametrize("name, delimiter", [("a.tsv", "\t"), ("a.csv", ","), ("b.csv", ";")])
def test_numbers_of_any_table_find_their_scans(prefix, name, delimiter, bids, tmp_path):
    lines = [(prefix + subject[4:], age, "x") for subject, age, _ in rows()]
    path = table(tmp_path / name, lines, delimiter=delimiter)
    lists = prepare_targets(TargetOptions(bids, tmp_path / "out", targets=path, target="age"))
    assert targets_of(lists) == AGES and all(isinstance(value, float) for value in targets_of(lists).values())
    assert [len(lists[split]) for split in ("training", "validation")] == [7, 1]
    with (tmp_path / "out/scans.csv").open(newline="") as file:
        assert {row["subject"]: float(row["target"]) for row in csv.DictReader(file)} == AGES


def test_the_table_beside_the_scans_and_a_first_column_of_another_name(bids, tmp_path):
    path = table(bids / "participants.tsv", rows(), header=("who", "age", "sex"))
    try:
        assert targets_of(prepare_targets(TargetOptions(bids, target="age"))) == AGES
    finally:
        path.unlink()


def test_scans_that_are_named_in_the_table_by_their_file(bids, tmp_path):
    lines = [(f"{subject}_T1w", age, "x") for subject, age, _ in rows()]
    assert targets_of(prepare_targets(options(bids, tmp_path, lines))) == AGES


@pytest.mark.parametrize("seed", range(4))
def test_each_class_is_in_both_splits(seed, bids, tmp_path):
    lines = [(subject, "", "ABB"[i % 3]) for i, subject in enumerate(SUBJECTS)]
    lists = prepare_targets(options(bids, tmp_path, lines, "sex", ["A", "B"], val_fraction=0.25, seed=seed))
    counts = {split: [[item["target"] for item in lists[split]].count(c) for c in (0, 1)] for split in lists}
    assert counts == {"training": [2, 4], "validation": [1, 1]}  # of 3 and 5
    found = targets_of(lists)
    assert all(found[subject] == "AB".index(letter) for subject, _, letter in lines)


def test_names_of_classes_are_sorted_or_those_of_the_training(bids, tmp_path):
    path = table(tmp_path / "t.tsv", [("1", "b"), ("2", "a"), ("3", "n/a"), ("4", "b")], ("participant_id", "group"))
    assert target_classes(tmp_path / "model.pt", bids, path, "group") == ["a", "b"]
    (tmp_path / "checkpoint.json").write_text(json.dumps({"class_names": ["b", "a"]}))
    assert target_classes(tmp_path / "model.pt", bids, None, None) == ["b", "a"]


def test_missing_targets_and_rows_without_scans_are_warnings(bids, tmp_path, caplog):
    lines = [*rows(sub_02="n/a", sub_05="NaN"), ("sub-99", 30, "F")]
    with caplog.at_level(logging.WARNING):
        lists = prepare_targets(options(bids, tmp_path, lines))
    assert targets_of(lists).keys() == set(SUBJECTS) - {"sub-02", "sub-05"}
    assert "missing for 02, 05" in caplog.text and "1 subjects in the table" in caplog.text and "99" in caplog.text


@pytest.mark.parametrize(
    "lines, target, classes, said",
    [
        (rows(), "aeg", None, ["no column 'aeg'", "did you mean 'age'", "age, sex"]),
        (rows(), None, None, ["no target chosen", "--target", "age, sex"]),
        ([], "age", None, ["no rows"]),
        (rows()[:-1], "age", None, ["1 of 8 scans", "sub-07", "no row in the table of targets", "skip_unreadable"]),
        (rows(sub_01="old", sub_03="inf"), "age", None, ["age must be a finite number", "'old' of 01", "'inf' of 03"]),
        (rows(), "sex", None, ["must be a finite number", "configs/classification.json"]),
        ([*rows(), ("sub-03", 99, "F")], "age", None, ["differ in age", "03 (35 and 99)"]),
        ([(s, 30, x) for s, _, x in rows()], "age", None, ["age is 30 for all subjects"]),
        ([(f"x{i}", i, "F") for i in range(9)], "age", None, ["no subject of", "sub-00, sub-01", "x0, x1", "Rename"]),
        (rows(), "sex", ["F", "X"], ["sex must be a class (F, X)", "'M' of 01", "--class_names"]),
        (rows(), "sex", ["F", "M", "X"], ["two subjects of each", "X (0)"]),
        (rows()[:-1] + [("sub-07", 1, "D")], "sex", ["D", "F", "M"], ["D (1)", "n/a", "regression.json"]),
        ([(s, a, "F") for s, a, _ in rows()], "sex", ["F"], ["two classes or more", "F"]),
    ],
)
def test_what_is_wrong_is_named_before_training(lines, target, classes, said, bids, tmp_path):
    with pytest.raises(ValueError) as caught:
        prepare_targets(options(bids, tmp_path, lines, target, classes))
    assert all(words in str(caught.value) for words in said), caught.value


def test_scans_without_a_row_can_be_skipped(bids, tmp_path):
    lists = prepare_targets(options(bids, tmp_path, rows()[:-1], skip_unreadable="true"))
    assert targets_of(lists).keys() == set(SUBJECTS[:-1])


def test_no_table(bids, tmp_path):
    with pytest.raises(FileNotFoundError, match="no table of targets at .*participants.tsv.*--targets"):
        prepare_targets(TargetOptions(bids, target="age"))
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        prepare_targets(TargetOptions(bids, targets=tmp_path / "nowhere.csv", target="age"))


def test_the_validation_scans_of_a_run_are_evaluated(bids, tmp_path):
    chosen = options(bids, tmp_path, rows())
    validation = prepare_targets(chosen)["validation"]
    again = TargetOptions(tmp_path / "out/datalist.json", targets=chosen.targets, target="age")
    assert prepare_test_targets(again) == validation
    one = [row if row[0] == validation[0]["subject"] else (row[0], "n/a", "F") for row in rows()]
    assert len(prepare_test_targets(options(bids, tmp_path, one))) == 1  # one subject suffices to evaluate
