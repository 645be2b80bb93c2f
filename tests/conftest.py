import os
import sys
from functools import lru_cache
from pathlib import Path

# One thread for each of the test runner's workers, and the same for the programs they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import controller

# Drawn once for all tests of a process.
controller.draw_digits = lru_cache(controller.draw_digits)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: shows what only a GPU can show")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))
