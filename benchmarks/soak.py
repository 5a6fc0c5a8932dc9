"""Soak test: interrupts one run many times and checks that it is unaffected.

  python benchmarks/soak.py docs/results/soak.json
  python benchmarks/soak.py /tmp/soak.json --cycles=5

A supervisor starts the training command on a tiny network, and ends each start
in a random way (seeded): SIGKILL at a random time, SIGTERM, or an exit at a
fault point (training/fault_injection.py). After every cycle it checks that a
checkpoint can be restored, that its step is not below the last committed one,
and that the metrics have one line per step without gaps. Finally it checks that
the run is bitwise identical to an uninterrupted one, and that the wall-clock
breakdown is consistent.
"""

import collections
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.training import fault_injection
from bcm_jax.training import goodput
from bcm_jax.utils import cli
from bcm_jax.utils import files
from bcm_jax.utils import provenance
from tests.training import starts

EVERY = 5
# Steps of the run per cycle, more than a cycle usually completes, and the
# artificial duration of a step.
PER_CYCLE = 20
STEP_SECS = 0.02
SLOW = f"""
import time
from bcm_jax.training import metric_logger
report = metric_logger.MetricLogger.__call__
def slowly(self, step, count, metrics):
  report(self, step, count, metrics)
  time.sleep({STEP_SECS})
metric_logger.MetricLogger.__call__ = slowly
from bcm_jax.training import goodput
goodput._WRITE_SECS = 0.05
"""
# Fault points that every start passes, and how often.
POINTS = {
    "before_save": 3, "mid_write": 3, "after_commit": 3, "metrics_half": 20,
}
KINDS = ("SIGKILL", "SIGTERM", "fault")


class Soak:
  """A run in a folder, and statistics of its interruptions."""

  def __init__(self, server: starts.Server, folder: pathlib.Path, cycles: int):
    self.server, self.workdir, self.cycles = server, folder / "run", cycles
    self.reference = folder / "reference"
    self.steps = PER_CYCLE * cycles
    self.flags = (
        f"training.num_steps={self.steps}", f"checkpoint.every_steps={EVERY}",
        "checkpoint.keep=3", "training.watchdog_timeout_secs=60.0",
    )
    self.random, self.remaining_kinds = random.Random(0), []
    self.kinds: collections.Counter = collections.Counter()
    self.ended: collections.Counter = collections.Counter()
    self.committed = self.repeated = self.process_secs = 0

  def start(self, code: str = SLOW, **environment: str) -> starts.Start:
    """Starts the run again."""
    return self.server.start(
        self.workdir, *self.flags, code=code, **environment
    )

  def complete(self) -> None:
    """Starts the run and lets it finish."""
    start = time.time()
    running = self.start(code="")
    running.wait(0, secs=3600)
    self.process_secs += time.time() - start
    self.ended["0"] += 1
    self.check(running)

  def cycle(self) -> bool:
    """Starts and interrupts the run; returns True if the run has finished."""
    if not self.remaining_kinds:  # All kinds are equally frequent.
      self.remaining_kinds = self.random.sample(KINDS, len(KINDS))
    name = kind = self.remaining_kinds.pop()
    start = time.time()
    if kind == "fault":
      name = self.random.choice(list(POINTS))
      count = self.random.randint(1, POINTS[name])
      running = self.start(**{fault_injection.ENVIRONMENT: f"{name}:{count}"})
      allowed = {fault_injection.EXIT_KILLED, 0}
    else:
      running = self.start()
      number = getattr(signal, kind)
      # From before the first step to long after it.
      time.sleep(self.random.uniform(0.3, 3.0))
      running.send(number)
      # Until the handler is installed, SIGTERM kills the process (-number).
      allowed = {0, -number, errors.EXIT_PREEMPTED}
    status = running.wait(secs=300)
    if status not in allowed:
      raise AssertionError(f"{name} ended with {status}:\n{running.text}")
    self.kinds[name] += 1
    self.ended[str(status)] += 1
    self.process_secs += time.time() - start
    self.check(running)
    return status == 0

  def check(self, running: starts.Start) -> None:
    """Checks checkpoints and metrics after every start."""
    saved = checkpoint.Checkpoints(self.workdir / "checkpoints")
    steps = saved.all_steps()
    newest = max(steps, default=0)
    if newest < self.committed:
      raise AssertionError(f"step {newest} after {self.committed}")
    if steps:
      step, tree, _ = saved.read_raw()
      assert (step, int(tree["step"])) == (newest, newest), running.text
    self.committed = newest
    if not (self.workdir / "metrics.jsonl").exists():
      assert not steps
      return
    text = (self.workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines(True)
             if line.endswith("\n")]
    logged = [x["step"] for x in lines if "loss" in x]
    assert logged == list(range(1, len(logged) + 1)), logged
    assert len(logged) >= newest, (len(logged), newest)
    self.repeated += len(logged) - newest

  def finish(self) -> dict:
    """Compares the run with an uninterrupted one; returns the result."""
    self.server.start(self.reference, *self.flags).wait(0, secs=3600)
    starts.assert_same_run(self.workdir, self.reference, self.steps)
    records = [
        json.loads(path.read_text())
        for path in sorted((self.workdir / goodput.FOLDER).glob("*.json"))
    ]
    for record in records:
      parts = sum(record["seconds"].values())
      assert abs(parts - record["wall"]) <= 0.01 * record["wall"], record
    total = goodput.total(str(self.workdir))
    assert 0 < total["wall"] <= self.process_secs, (total, self.process_secs)
    return {
      "steps": self.steps,
      "steps_saved_every": EVERY,
      "cycles": sum(self.kinds.values()),
      "by_kind": dict(self.kinds),
      "exit_statuses": dict(self.ended),
      "steps_repeated": self.repeated,
      "steps_repeated_by_goodput": total["repeated_steps"],
      "recoveries": self.ended.total() - 1,
      "identical_to_one_start": True,
      "seconds": {
        "all_processes": self.process_secs,
        "in_goodput": total["wall"],
        "by_part": total["seconds"],
      },
      "goodput": total["goodput"],
    }


def main() -> None:
  """Runs the cycles and one last start, prints and writes."""
  parser = cli.Parser("benchmarks/soak.py", __doc__)
  parser.add_argument("out", metavar="OUT", help="JSON to write")
  parser.add_argument("--cycles", type=int, default=200, metavar="N",
                      help="starts that are killed (%(default)s)")
  args = parser.parse_args()
  start = time.time()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    with starts.Server(folder, str(folder / "compiled")) as server:
      soak = Soak(server, folder, args.cycles)
      finished = False
      for number in range(args.cycles):
        finished = soak.cycle()
        print(
          f"cycle {number + 1}: step {soak.committed} of {soak.steps}, "
          f"{time.time() - start:.0f} s",
          flush=True,
        )
        if finished:
          break
      if not finished:
        soak.complete()
      result = soak.finish()
  result["wall_seconds"] = time.time() - start
  files.write_json(os.path.abspath(args.out), result | provenance.machine())
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  with cli.reporting():
    main()
