"""The parts of the study that are not the bundle's own: masks by loss, intervals, tables, the matrix."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sspformer.networks import MaskedAutoencoder
from sspformer.transforms import patch_energy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import study  # noqa: E402
from hard_patches import HardPatchSampler  # noqa: E402


@pytest.fixture
def images() -> torch.Tensor:
    """Two crops with air on one side, ``(2, 1, 32, 32, 32)``."""
    images = torch.rand(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    images[:, :, :8] = 0
    return images


@pytest.fixture
def network() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(dim=32, depth=1, num_heads=2, decoder_dim=24, decoder_depth=1, decoder_num_heads=1)


def test_every_patch_is_hidden_once_or_twice_when_its_loss_is_measured(network, images, monkeypatch):
    seen = []
    forward = network.forward
    monkeypatch.setattr(
        network, "forward", lambda image, keep, mask: (seen.append(mask), forward(image, keep, mask))[1]
    )
    sampler = HardPatchSampler(network, 8, amp=False)
    _, foreground = patch_energy(images, (8, 8, 8))
    loss = sampler.patch_loss(images, foreground, torch.Generator().manual_seed(0))
    assert loss.shape == (2, 64) and (loss > 0).all() and not loss.requires_grad
    hidden = torch.cat(seen, dim=1)
    assert all(set(row.tolist()) == set(range(64)) for row in hidden)


def test_the_hardest_patches_are_hidden_and_the_rest_is_drawn(network, images, monkeypatch):
    loss = torch.arange(64.0).repeat(2, 1)  # the last are the hardest
    monkeypatch.setattr(HardPatchSampler, "patch_loss", lambda *_: loss)
    sampler = HardPatchSampler(network, 8, ratio=0.75, beta=0.5, amp=False)
    masks = [sampler(images, None, torch.Generator().manual_seed(seed))[0].to_map() for seed in range(40)]
    often = torch.stack(masks).float().mean(dim=(0, 1))
    assert all(mask.sum(dim=1).tolist() == [48, 48] for mask in masks)
    assert (often[-24:] == 1).all()  # half of 48, all of them foreground here
    assert 0.2 < often[:16].min() and often[16:40].max() < 1  # nobody else is sure of it


def test_no_network_is_asked_while_the_share_is_zero(network, images, monkeypatch):
    monkeypatch.setattr(HardPatchSampler, "patch_loss", lambda *_: pytest.fail("measured for nothing"))
    indices, energy, foreground = HardPatchSampler(network, 8, beta=0.0)(images, None, torch.Generator().manual_seed(0))
    assert indices.mask.shape == (2, 48) and energy.shape == foreground.shape == (2, 64)


def test_intervals_are_as_wide_as_the_seeds_differ():
    rng = np.random.default_rng(0)
    subjects = rng.normal(0, 0.02, 40)
    alike = np.stack([subjects, subjects, subjects]) + 0.8
    apart = alike + np.array([[-0.05], [0.0], [0.05]])
    (low, high), (wide_low, wide_high) = study.interval(alike), study.interval(apart)
    assert high - low == pytest.approx(2 * 1.96 * subjects.std() / 40**0.5, rel=0.1)
    assert wide_high - wide_low > 4 * (high - low)
    corrected = study.interval(apart, confidence=1 - 0.05 / 16)
    assert corrected[0] < wide_low and corrected[1] > wide_high


def test_differences_are_paired_over_seeds_and_subjects():
    rng = np.random.default_rng(0)
    base = {(seed, subject): rng.normal(0.8, 0.1) for seed in range(3) for subject in "abcdefgh"}
    rows = [
        {"task": "t", "n_labels": 10, "start": start, "seed": seed, "subject": subject, "dice": dice + gain}
        for (seed, subject), dice in base.items()
        for start, gain in (("scratch", 0.0), ("random", 0.0), ("scheduled", 0.01))
    ]
    lines = {line["arm"]: line for line in study.compare(rows[::-1], ["task", "n_labels"], primary=2)}
    difference = lines["scheduled - scratch"]
    assert difference["mean"] == difference["low"] == difference["high_corrected"] == 0.01  # no spread of its own
    assert lines["scratch"]["high"] - lines["scratch"]["low"] > 0.02
    assert "low_corrected" not in lines["random - scratch"]  # not a primary comparison


def test_the_reduced_matrix_is_part_of_the_full_one(tmp_path):
    (tmp_path / "manifest.csv").write_text("file,split\n")
    namespace = {"arms": list(study.ARMS), "peers": list(study.PEERS), "tasks": list(study.TASKS), "seeds": [0, 1, 2]}
    of = study.Study(tmp_path, tmp_path / "work", jobs=2)
    reduced, full = (study.matrix(of, study.argparse.Namespace(**namespace, full=full)) for full in (False, True))
    for stage in ("pretrain", "segment", "robustness"):
        names = [cell.name for cell in reduced[stage]]
        assert len(set(names)) == len(names) and set(names) <= {cell.name for cell in full[stage]}
        assert not any(cell.complete() for cell in reduced[stage])
    assert len(full["segment"]) == 3 * 2 * 3 * (1 + len(study.ARMS) + len(study.PEERS))
