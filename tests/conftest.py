"""The order of the tests."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Trainings come first in the stretch of the list that ``--dist worksteal`` gives each process: others then steal
    what follows. By their names alone, one process would end with all of them."""
    total, shares = len(items), [[] for _ in range(getattr(config, "workerinput", {}).get("workercount", 1))]
    trainings = [item for item in items if item.path.name == "test_workflow.py"]
    rest = iter([item for item in items if item not in trainings])
    for n, item in enumerate(trainings):  # those that share the longest fixture stay together
        shared = "trained" in item.fixturenames
        shares[0 if shared else -1 - n % max(1, len(shares) - 1)].append(item)
    items.clear()
    for n, share in enumerate(shares):
        n_others = (total - len(items)) // (len(shares) - n) - len(share)
        items += share + [item for _, item in zip(range(n_others), rest)]
    items += rest
