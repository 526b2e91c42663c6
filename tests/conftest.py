"""Settings of all tests: none may fail because the machine is busy or has no GPU."""

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

settings.register_profile(
    "tokenwire", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("tokenwire")

# Triton chooses its interpreter when it is imported, and transformers imports it too.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
