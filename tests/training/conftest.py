"""Starts of the real command, for the modules that ask for them."""

from concurrent import futures

import pytest

from tests.training import starts


@pytest.fixture(scope="session")
def server(tmp_path_factory):
  """Forks starts, see starts.py."""
  with starts.Server(tmp_path_factory.mktemp("starts")) as server:
    yield server


@pytest.fixture(scope="session")
def unbroken(server, tmp_path_factory):
  """The work directory of a run of one start."""
  workdir = tmp_path_factory.mktemp("unbroken")
  server.start(workdir).wait(0)
  return workdir


class Once(dict):
  """Name -> future of what a function returns for it, called when asked for."""

  def __init__(self, pool, function, names):
    super().__init__()
    self._pool, self._function = pool, function
    for name in names:
      self[name]  # Before it is waited for.

  def __missing__(self, name):
    self[name] = self._pool.submit(self._function, name)
    return self[name]


@pytest.fixture(scope="module")
def once(request):
  """Makes a `Once`, two calls at a time, of the parameters of the module."""
  selected = {
      value for item in request.session.items
      if item.path == request.path and hasattr(item, "callspec")
      for value in item.callspec.params.values()
  }
  with futures.ThreadPoolExecutor(2) as pool:
    yield lambda function, names: Once(
        pool, function, [name for name in names if name in selected]
    )
