"""Settings of all tests: none may fail because the machine is busy or has no GPU."""

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.device import CHOICES, device_type, interpret_triton

settings.register_profile(
    "tokenwire", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("tokenwire")

# A child that is forked would start gRPC's threads, whose descriptors are closed before its exec:
# one in fifty ends there. Tests start processes, and none of them serves gRPC after a fork.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# Variables that commands set for the processes that they start.
_OF_COMMANDS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "GRPC_VERBOSITY")

# Triton chooses its interpreter when it is imported, and transformers imports it too.
interpret_triton(device_type())


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device`: where tests of kernels and engines run."""
    parser.addoption(
        "--device",
        choices=CHOICES,
        help="for the engine's tests; by default a GPU where there is one, else Triton's "
        "interpreter and the CPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Shares the processors out; ends the run at once if a GPU that is asked for cannot be used.

    Raises:
        pytest.UsageError: it cannot.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        # Threads of two processes would spin for each other's processors.
        torch.set_num_threads(max(torch.get_num_threads() // 2, 1))
    if config.getoption("--device") != "cuda":
        return
    from engine.model.device import choose_device
    from engine.protocol.errors import ModelLoadError

    try:
        choose_device("cuda")
    except ModelLoadError as error:
        raise pytest.UsageError(f"--device cuda: {str(error).split(';')[0]}") from error


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    """A command that a test runs in this process sets up the log, on streams that end with it.

    It decides on progress bars, too, for all processes that are started later.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    variables = {name: os.environ.get(name) for name in _OF_COMMANDS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
