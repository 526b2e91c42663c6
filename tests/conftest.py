"""What all tests share: no test may fail because the machine is busy."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "tokenwire", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("tokenwire")
