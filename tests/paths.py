"""Paths of the checkout."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_MODEL = REPOSITORY / "models" / "demo"
