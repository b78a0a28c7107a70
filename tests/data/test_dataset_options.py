"""What a command line may give for the options of a data set."""

from pathlib import Path

import pytest

from sspformer.data import DatasetOptions


def test_words_of_a_command_line_are_converted_once():
    words = {"skip_unreadable": "false", "max_subjects": "null", "subject_pattern": "None", "val_fraction": "0.2"}
    options = DatasetOptions("scans", "none", seed="7", num_workers=0, **words)
    assert options == DatasetOptions(Path("scans"), seed=7, val_fraction=0.2, num_workers=1)
    assert options.dataset_dir == Path.cwd() / "scans" and options.output_dir is options.max_subjects is None
    assert DatasetOptions("scans", skip_unreadable="true", max_subjects="3").max_subjects == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"val_fraction": 1}, r"val_fraction takes a number in \[0, 1\), not 1"),
        ({"val_fraction": "nan"}, r"val_fraction takes a number in \[0, 1\), not 'nan'"),
        ({"val_fraction": "few"}, "val_fraction takes a number in .*, not 'few'"),
        ({"seed": 2.7}, "seed takes an integer .*, not 2.7"),
        ({"max_subjects": True}, "max_subjects takes .*, not True"),
        ({"skip_unreadable": "perhaps"}, "skip_unreadable takes true or false, not 'perhaps'"),
        ({"min_size": 1}, "min_size takes an integer of at least 2, not 1"),
        ({"max_volumes": 0}, "max_volumes takes an integer of at least 1, not 0"),
        ({"subject_pattern": "("}, "subject_pattern takes .* a regular expression, not '\\('"),
        ({"dataset_dir": None}, "dataset_dir takes a path, not None"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        DatasetOptions(**{"dataset_dir": "scans", **wrong})
