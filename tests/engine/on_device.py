"""The device of tests of kernels and engines: see `tests.device`."""

import torch

from tests.device import device_type

DEVICE = torch.device(device_type())
INTERPRETED = DEVICE.type == "cpu"  # Triton's kernels are
