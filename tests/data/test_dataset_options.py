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
        ({"val_fraction": 1}, r"val_fraction must be in \[0, 1\), got 1"),
        ({"val_fraction": "nan"}, "val_fraction must be in"),
        ({"val_fraction": "few"}, "val_fraction cannot be 'few'"),
        ({"seed": 2.7}, "seed cannot be 2.7"),
        ({"max_subjects": True}, "max_subjects cannot be True"),
        ({"skip_unreadable": "perhaps"}, "skip_unreadable cannot be 'perhaps'"),
        ({"min_size": 1}, "min_size must be at least 2, got 1"),
        ({"max_volumes": 0}, "max_volumes must be at least 1, got 0"),
        ({"subject_pattern": "("}, "subject_pattern cannot be"),
        ({"dataset_dir": None}, "dataset_dir cannot be None"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        DatasetOptions(**{"dataset_dir": "scans", **wrong})
