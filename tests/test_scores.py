"""Scores of whole scans and their intervals: oracles and laws."""

import numpy as np
import pytest
import torch

from sspformer.metrics import classification_scores, regression_scores, score_intervals


def draw(n, n_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, n_classes, generator=generator).softmax(1), torch.randint(n_classes, (n,), generator=generator)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_scores_of_classes_by_counting(n_classes):
    pred, target = draw(60, n_classes)
    chosen, areas, recalls = pred.argmax(1), [], []
    for c in range(n_classes):
        inside, outside = pred[target == c, c], pred[target != c, c]
        areas.append(float((inside[:, None] > outside).double().mean()))  # how often a pair is in order
        recalls.append(float((chosen[target == c] == c).double().mean()))
    scores = classification_scores(pred, target)
    expected = {"auc": np.mean(areas), "balanced_accuracy": np.mean(recalls)}
    expected["accuracy"] = float((chosen == target).double().mean())
    assert scores == pytest.approx(expected)


def test_the_ends_of_the_scales():
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    perfect = classification_scores(torch.eye(3)[target], target)
    assert perfect == {"auc": 1, "balanced_accuracy": 1, "accuracy": 1}
    constant = classification_scores(torch.tensor([[0.5, 0.3, 0.2]]).expand(6, 3), target)
    assert constant["auc"] == 0.5 and constant["balanced_accuracy"] == pytest.approx(1 / 3)
    assert np.isnan(classification_scores(torch.eye(3)[:1], torch.tensor([0]))["auc"])
    numbers = torch.tensor([1.0, 2, 4, 9])
    assert regression_scores(numbers, numbers) == {"r2": 1, "mae": 0}
    assert regression_scores(numbers.mean().expand(4), numbers) == {"r2": 0, "mae": 2.5}
    assert np.isnan(regression_scores(numbers, torch.ones(4))["r2"])


def test_an_interval_holds_the_score_and_narrows_with_more_subjects_but_not_with_more_scans_of_theirs():
    def width(n, scans_each=1):
        generator = torch.Generator().manual_seed(n)
        target = torch.randn(n, generator=generator)
        pred = target + torch.randn(n, generator=generator)
        pred, target = pred.repeat(scans_each), target.repeat(scans_each)
        mae = score_intervals(regression_scores, pred, target, [str(i % n) for i in range(n * scans_each)])["mae"]
        assert mae["ci_low"] < mae["value"] < mae["ci_high"]
        return mae["ci_high"] - mae["ci_low"]

    assert width(200) < 0.6 * width(40)
    assert width(40, scans_each=5) == pytest.approx(width(40))


def test_intervals_where_a_class_is_rare_and_where_there_is_one_subject():
    pred, target = draw(12, 2)
    target[:] = 0
    target[0] = 1  # a third of the draws are without it
    auc = score_intervals(classification_scores, pred, target, list(map(str, range(12))), n_resamples=200)["auc"]
    assert 0 <= auc["ci_low"] <= auc["ci_high"] <= 1
    alone = score_intervals(regression_scores, pred[:, 0], pred[:, 1], ["a"] * 12)["mae"]
    assert alone["value"] > 0 and np.isnan([alone["ci_low"], alone["ci_high"]]).all()
