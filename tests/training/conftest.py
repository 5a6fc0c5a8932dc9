"""Starts of the real command, for the modules that ask for them."""

import pytest

from tests.training import starts


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """Forks starts, see starts.py."""
  with starts.Server(tmp_path_factory.mktemp("starts")) as server:
    yield server


@pytest.fixture(scope="module")
def unbroken(server, tmp_path_factory):
  """The work directory of a run of one start."""
  workdir = tmp_path_factory.mktemp("unbroken")
  server.start(workdir).wait(0)
  return workdir
