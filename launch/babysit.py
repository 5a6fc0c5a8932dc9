#!/usr/bin/env python3
"""Runs a training job on a queued resource until it has finished.

Called by babysit.sh. babysit_policy.py decides on the next action; this module
observes the cloud, waits and acts, through queued_resource.sh and gcloud.
"""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import json
import pathlib
import re
import shlex
import subprocess
import sys
import time

from babysit_policy import Action
from babysit_policy import decide
from babysit_policy import GONE
from babysit_policy import Memory
from babysit_policy import Policy
from babysit_policy import Seen

LAUNCH = pathlib.Path(__file__).resolve().parent
EXIT_BAD_INPUT = 65
# Limits on consecutive failures.
MAX_FAILED_LOOKS = 30
MAX_FAILED_COMMANDS = 10


class LookError(RuntimeError):
  """The state of the cloud cannot be observed; the message gives the reason."""


def call(*command: str) -> subprocess.CompletedProcess:
  """Runs a command and captures its output as text; never raises."""
  return subprocess.run(
      command, capture_output=True, text=True, check=False,
      stdin=subprocess.DEVNULL,
  )


@dataclasses.dataclass(frozen=True)
class World:
  """The cloud, observed through launch/queued_resource.sh and gcloud.

  Attributes:
    marks: the work directory: gs://... or a local folder.
    arguments: arguments of the run.
    commit: commit of the code, also after re-creations.
    call: function that runs a command, see `call`.
  """

  marks: str
  arguments: tuple[str, ...]
  commit: str = "HEAD"
  call: Callable[..., subprocess.CompletedProcess] = call

  def look(self) -> Seen:
    """Observes resource and run; raises LookError if that fails."""
    state, initiator = self.resource()
    beat, done, stopped = self.marks_seen()
    return Seen(state, initiator, done, stopped, beat)

  def resource(self) -> tuple[str | None, str]:
    """Returns state and initiator of the resource; raises LookError."""
    result = self.call(str(LAUNCH / "queued_resource.sh"), "status", "--json")
    if result.returncode:
      if "NOT_FOUND" in result.stderr:
        return None, ""
      raise LookError(result.stderr.strip()[-300:])
    try:
      state = json.loads(result.stdout)["state"]
      return state["state"], state.get("stateInitiator", "")
    except (ValueError, KeyError, TypeError) as e:
      raise LookError(f"gcloud: got {result.stdout[:200]!r}") from e

  def marks_seen(self) -> tuple[str | None, bool, int | None]:
    """Returns heartbeat, done, and the exit status of a run that gave up."""
    if not self.marks.startswith("gs://"):
      return self._local_marks(pathlib.Path(self.marks))
    result = self.call(
        "gcloud", "storage", "objects", "list", f"{self.marks}/*",
        f"{self.marks}/lock/*", "--format=csv[no-heading](name,generation)",
    )
    if result.returncode and not re.search("matched", result.stderr):
      raise LookError(result.stderr.strip()[-300:])
    generations, beats = {}, []
    for line in result.stdout.splitlines():
      name, _, generation = line.partition(",")
      generations[name.rpartition("/")[2]] = generation
      # Every heartbeat replaces lock/NNNNNN.json; in earlier versions
      # lock.json.
      if name.rpartition("/")[0].endswith("/lock") or (
          name.endswith("/lock.json")
      ):
        beats.append(generation)
    stopped = None
    if "STOPPED" in generations:
      stopped = self.call("gcloud", "storage", "cat", f"{self.marks}/STOPPED")
      stopped = _status(stopped.stdout)
    return ",".join(beats) or None, "DONE" in generations, stopped

  def _local_marks(self, folder) -> tuple[str | None, bool, int | None]:
    note, beats = folder / "STOPPED", []
    for claim in (folder / "lock.json", *folder.glob("lock/*.json")):
      with contextlib.suppress(OSError):  # Replaced or removed meanwhile.
        beats.append(claim.stat().st_mtime_ns)
    beat = ",".join(map(str, sorted(beats))) or None
    stopped = _status(note.read_text()) if note.exists() else None
    return beat, (folder / "DONE").exists(), stopped

  def command(self, action: Action) -> list[str]:
    """Returns the command of an action."""
    words = [str(LAUNCH / "queued_resource.sh"), action.value]
    if action is Action.DELETE:
      words += ["--yes"]
    if action is Action.CREATE:
      words += [f"--commit={self.commit}", "--", *self.arguments]
    return words

  def act(self, action: Action) -> bool:
    """Runs an action; reports a failure; returns True on success."""
    result = self.call(*self.command(action))
    if result.returncode:
      say(f"{action.value} failed: {result.stderr.strip()[-1000:]}")
    return result.returncode == 0


def _status(text: str) -> int:
  return int(text) if text.strip().isdigit() else 1


def say(text: str) -> None:
  """Prints a line with a time stamp."""
  print(time.strftime("%F %T"), text, file=sys.stderr, flush=True)


def babysit(
    world: World,
    policy: Policy,
    poll_secs: float,
    delete_when_done: bool = False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
  """Observes and acts until the run has finished or cannot continue.

  Args:
    world: the cloud.
    policy: limits and delays.
    poll_secs: seconds between observations.
    delete_when_done: delete the resource at the end.
    clock, sleep: replaced in tests.

  Returns:
    The exit status.
  """
  memory, last_line, failed_looks, failed_commands = Memory(), "", 0, 0
  while True:
    try:
      seen = world.look()
      action, memory, reason = decide(seen, memory, policy, clock())
      if action is Action.DELETE and world.look().state not in GONE:
        action, reason = Action.WAIT, "the state has changed; checking again"
    except LookError as e:
      action, reason = Action.WAIT, f"cannot observe the cloud: {e}"
      failed_looks += 1
    else:
      failed_looks = 0
    line = f"{action.value}: {reason}"
    if line != last_line:
      say(line)
      last_line = line
    if action is Action.DONE:
      if delete_when_done and seen.state is not None:
        return 0 if world.act(Action.DELETE) else 1
      return 0
    if action is Action.GIVE_UP:
      return EXIT_BAD_INPUT if seen.stopped == EXIT_BAD_INPUT else 1
    if action is not Action.WAIT:
      failed_commands = 0 if world.act(action) else failed_commands + 1
    if (
        failed_looks >= MAX_FAILED_LOOKS
        or failed_commands >= MAX_FAILED_COMMANDS
    ):
      failures = max(failed_looks, failed_commands)
      say(f"give up: {failures} consecutive failures")
      return 1
    sleep(poll_secs)


def parser() -> argparse.ArgumentParser:
  """Returns the parser for the options of babysit.sh and those it adds."""
  result = argparse.ArgumentParser(
      prog="babysit.sh", description=__doc__, allow_abbrev=False
  )
  result.add_argument("--marks", required=True)
  result.add_argument("--commit", required=True)
  result.add_argument("--max-recreations", type=int, default=100)
  result.add_argument("--max-reruns", type=int, default=5)
  result.add_argument("--poll-secs", type=float, default=60.0)
  result.add_argument("--silent-secs", type=float, default=900.0)
  result.add_argument("--setup-secs", type=float, default=1800.0)
  result.add_argument("--delete-when-done", action="store_true")
  result.add_argument("--dry-run", action="store_true")
  result.add_argument("arguments", nargs="*")
  result.error = lambda message: bad_input(f"{message}; see --help")
  return result


def bad_input(message: str) -> None:
  """Prints one line and exits with 65."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(EXIT_BAD_INPUT)


def main(argv: list[str], **hooks) -> int:
  """Runs the command; `hooks` are passed to `babysit`."""
  args = parser().parse_args(argv)
  if not args.arguments:
    bad_input("nothing to run; expected -- --config=FILE [...]")
  if args.poll_secs < 1:
    bad_input(f"--poll-secs: got {args.poll_secs}, expected 1 or more")
  policy = Policy(
      max_recreations=args.max_recreations, max_reruns=args.max_reruns,
      silent_secs=args.silent_secs, setup_secs=args.setup_secs,
  )
  world = World(args.marks, tuple(args.arguments), args.commit)
  if not args.dry_run:
    return babysit(
        world, policy, args.poll_secs, args.delete_when_done, **hooks
    )
  return dry_run(world)


def dry_run(world: World) -> int:
  """Prints the commands that a babysitter may run, without running them."""
  for action in (Action.CREATE, Action.DELETE, Action.RERUN):
    print(f"{action.value}:", shlex.join(world.command(action)))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
