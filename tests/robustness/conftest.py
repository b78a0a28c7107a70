"""Inputs that go wrong: see docs/inputs.md."""

import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small inputs: threads only get in each other's way, and a forked process must have none."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)
