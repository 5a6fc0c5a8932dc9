"""Kills one run again and again, and sees that nothing comes of it.

  python benchmarks/soak.py docs/results/soak.json
  python benchmarks/soak.py /tmp/soak.json --cycles=5

A supervisor starts the real command on a tiny network, and ends each start in
a way drawn from a seed: SIGKILL at a random moment, SIGTERM, or death at a
fault point (training/faults.py). After every cycle: a checkpoint restores, its
step is not below the last committed one, the metrics hold one line a step up
to where they end. In the end the run is the same bit for bit as one of a
single start, and the accounts of the time add up.
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
# Steps of the run by cycles, more than these win, and the seconds that a step
# is made to last in them.
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
# Fault points that lie in every start, and how often one passes them.
POINTS = {
    "before_save": 3, "mid_write": 3, "after_commit": 3, "metrics_half": 20,
}
KINDS = ("SIGKILL", "SIGTERM", "fault")


class Soak:
  """One run in a folder, and what it has gone through."""

  def __init__(self, server: starts.Server, folder: pathlib.Path, cycles: int):
    self.server, self.workdir, self.cycles = server, folder / "run", cycles
    self.whole = folder / "whole"
    self.steps = PER_CYCLE * cycles
    self.flags = (
        f"training.num_steps={self.steps}", f"checkpoint.every_steps={EVERY}",
        "checkpoint.keep=3", "training.watchdog_timeout_secs=60.0",
    )
    self.random, self.deck = random.Random(0), []
    self.kinds: collections.Counter = collections.Counter()
    self.ended: collections.Counter = collections.Counter()
    self.committed = self.lost = self.outside = 0

  def start(self, code: str = SLOW, **environment: str) -> starts.Start:
    """The next start of the run."""
    return self.server.start(
        self.workdir, *self.flags, code=code, **environment
    )

  def undisturbed(self) -> None:
    """The start that finishes the run."""
    began = time.time()
    running = self.start(code="")
    running.wait(0, secs=3600)
    self.outside += time.time() - began
    self.ended["0"] += 1
    self.check(running)

  def cycle(self) -> bool:
    """One start and its end; whether the run was finished in it."""
    if not self.deck:  # Every kind equally often.
      self.deck = self.random.sample(KINDS, len(KINDS))
    name = kind = self.deck.pop()
    began = time.time()
    if kind == "fault":
      name = self.random.choice(list(POINTS))
      count = self.random.randint(1, POINTS[name])
      running = self.start(**{fault_injection.ENVIRONMENT: f"{name}:{count}"})
      allowed = {fault_injection.EXIT_KILLED, 0}
    else:
      running = self.start()
      number = getattr(signal, kind)
      # Sometimes before the first step, sometimes long after.
      time.sleep(self.random.uniform(0.3, 3.0))
      running.send(number)
      # Before it listens, SIGTERM ends a process as it ends any other.
      allowed = {0, -number, errors.EXIT_PREEMPTED}
    status = running.wait(secs=300)
    if status not in allowed:
      raise AssertionError(f"{name} ended with {status}:\n{running.text}")
    self.kinds[name] += 1
    self.ended[str(status)] += 1
    self.outside += time.time() - began
    self.check(running)
    return status == 0

  def check(self, running: starts.Start) -> None:
    """What must hold after every end."""
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
    done = [x["step"] for x in lines if "loss" in x]
    assert done == list(range(1, len(done) + 1)), done
    assert len(done) >= newest, (len(done), newest)
    self.lost += len(done) - newest

  def finish(self) -> dict:
    """What must hold in the end; the result."""
    self.server.start(self.whole, *self.flags).wait(0, secs=3600)
    starts.assert_same_run(self.workdir, self.whole, self.steps)
    records = [
        json.loads(path.read_text())
        for path in sorted((self.workdir / goodput.FOLDER).glob("*.json"))
    ]
    for record in records:
      parts = sum(record["seconds"].values())
      assert abs(parts - record["wall"]) <= 0.01 * record["wall"], record
    total = goodput.total(str(self.workdir))
    assert 0 < total["wall"] <= self.outside, (total, self.outside)
    return {
      "steps": self.steps,
      "steps_saved_every": EVERY,
      "cycles": sum(self.kinds.values()),
      "by_kind": dict(self.kinds),
      "exit_statuses": dict(self.ended),
      "steps_lost": self.lost,
      "steps_lost_by_accounts": total["repeated_steps"],
      "recoveries": self.ended.total() - 1,
      "identical_to_one_start": True,
      "seconds": {
        "all_processes": self.outside,
        "in_accounts": total["wall"],
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
  asked = parser.parse_args()
  began = time.time()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    with starts.Server(folder, str(folder / "compiled")) as server:
      soak = Soak(server, folder, asked.cycles)
      done = False
      for number in range(asked.cycles):
        done = soak.cycle()
        print(
          f"cycle {number + 1}: step {soak.committed} of {soak.steps}, "
          f"{time.time() - began:.0f} s",
          flush=True,
        )
        if done:
          break
      if not done:
        soak.undisturbed()
      result = soak.finish()
  result["wall_seconds"] = time.time() - began
  files.write_json(os.path.abspath(asked.out), result | provenance.machine())
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  with cli.reporting():
    main()
