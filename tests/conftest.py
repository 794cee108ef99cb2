"""Tests run on one thread: small tensors, and machines with other work to do."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import torch
from hypothesis import settings

torch.set_num_threads(1)
# A deadline would measure the machine, not the law.
settings.register_profile("lethe", deadline=None)
settings.load_profile("lethe")
