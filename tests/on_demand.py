"""What only `make models` tries, of which `make test` tries a sample."""

import os

import pytest

ALL_MODELS = bool(os.environ.get("ALL_MODELS"))

on_demand = pytest.mark.skipif(not ALL_MODELS, reason="`make models` runs it")
