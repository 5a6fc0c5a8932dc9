"""Threads on the cores that this process may use."""

from collections.abc import Callable
from concurrent import futures
import os


def usable_cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def for_each(
    function: Callable[[int], None], n: int, threads: int | None = None
) -> None:
  """Calls function(0), ..., function(n - 1) on several threads.

  Each thread takes a contiguous range: scheduling single images would cost as
  much as decoding small ones. PIL decodes and resizes without the GIL.

  Args:
    function: called once for each number.
    n: number of calls.
    threads: maximum; None is one per core.

  Raises:
    Exception: raised by the function, for the lowest number that failed.
  """
  workers = min(threads or usable_cores(), n)

  def run(numbers):
    for number in numbers:
      function(number)

  if workers <= 1:
    return run(range(n))
  ends = [n * k // workers for k in range(workers + 1)]
  # A pool per call: nothing to close, to pickle or to lose in a fork.
  with futures.ThreadPoolExecutor(workers) as pool:
    parts = [
        pool.submit(run, range(*ends[k : k + 2]))
        for k in range(workers)
    ]
  for part in parts:
    part.result()
