"""Fixtures of the launch tests."""

import pathlib
import sys

import pytest

from tests.launch import harness

# The scripts of launch/ stand beside each other, in no package.
sys.path.insert(0, str(harness.ROOT / "launch"))


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> harness.Checkout:
  return harness.Checkout(tmp_path)
