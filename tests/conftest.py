import os
import sys
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for each of the test runner's workers, and the same for the programs they start

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import controller

controller.digits = lru_cache(controller.digits)  # drawn once for all tests of a process


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: shows what only a GPU can show")
    config.addinivalue_line("markers", "xdist_group: tests for one of the test runner's workers")


@pytest.hookimpl(tryfirst=True)  # before the test runner reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        for made in {"smoke", "undisturbed"} & set(item.fixturenames):  # runs that many tests look at: made in one worker alone
            item.add_marker(pytest.mark.xdist_group(made))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))
