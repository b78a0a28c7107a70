"""Tables as files and as text."""

import csv

import pytest

from sspformer.io import format_table, write_csv

ROWS = [{"name": "a, b", "dice": 0.5}, {"name": "c", "volume": 12}]


def test_a_csv_file_has_all_columns_in_the_order_of_the_rows(tmp_path):
    write_csv(tmp_path / "new" / "t.csv", ROWS)
    with open(tmp_path / "new" / "t.csv", newline="") as file:
        assert list(csv.reader(file)) == [["name", "dice", "volume"], ["a, b", "0.5", ""], ["c", "", "12"]]


def test_a_csv_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_csv(tmp_path / "t.csv", [], ["name"])
    with pytest.raises(ValueError, match="dice"):
        write_csv(tmp_path / "t.csv", ROWS, ["name"])
    assert (tmp_path / "t.csv").read_bytes() == b"name\r\n" and len(list(tmp_path.iterdir())) == 1


def test_a_table_is_aligned_and_ends_with_what_it_leaves_out():
    assert format_table(ROWS) == "name  dice  volume\na, b  0.5\nc           12"
    assert format_table(ROWS, ["volume", "name"], header=False) == "    a, b\n12  c"
    assert format_table(ROWS, ["name"], max_rows=1) == "name\na, b\n... and 1 more"
    assert format_table([], ["name"]) == "name" and format_table([]) == ""
