"""What all tests need: one core for each process of pytest-xdist, as in ``pytest -n auto``."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # Threads that wait for each other on cores that other tests have make everything several times slower.
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)
