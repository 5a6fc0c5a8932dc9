"""What the babysitter of a queued resource does next: a pure function.

Babysitting is babysit.py; here is no clock, no file and no network.
"""

import dataclasses
import enum

ON_THE_WAY = {
    *("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"),
    *("DELETING", "SUSPENDING"),
}
GONE = {"SUSPENDED", "FAILED"}


class Action(enum.Enum):
  """What to do next."""

  WAIT = "wait"
  CREATE = "create"
  DELETE = "delete"
  RERUN = "rerun"
  DONE = "done"
  GIVE_UP = "give up"


@dataclasses.dataclass(frozen=True)
class Policy:
  """How patient to be; see babysit.sh.

  Attributes:
    max_recreations: of the resource, over the babysitter's life.
    max_reruns: of the run, without a healthy hour between.
    silent_secs: without a new heartbeat and an active run counts as dead.
    setup_secs: that an active resource may take to the first heartbeat.
    first_pause: seconds from one intervention to the next; doubles.
    longest_pause: where doubling ends.
    healthy_secs: of heartbeats after which reruns are counted anew.
  """

  max_recreations: int = 100
  max_reruns: int = 5
  silent_secs: float = 900.0
  setup_secs: float = 1800.0
  first_pause: float = 60.0
  longest_pause: float = 1800.0
  healthy_secs: float = 3600.0


@dataclasses.dataclass(frozen=True)
class Seen:
  """One look at the world.

  Attributes:
    state: of the queued resource; None where there is none.
    initiator: of that state: 'USER', 'SERVICE' or ''.
    done: whether the run has finished.
    stopped: the status with which the run gave up; None if it did not.
    beat: changes while the run is alive; None before its first sign of life.
  """

  state: str | None
  initiator: str = ""
  done: bool = False
  stopped: int | None = None
  beat: str | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
  """What the past has to say.

  Attributes:
    existed: the resource was seen since it was last asked for.
    deleting: we have deleted it since.
    asked: it existed, or was asked for, before.
    recreations, reruns: so far.
    interventions: in a row, with no sign of life between.
    not_before: when the next intervention is allowed.
    beat, beat_at: the last heartbeat, and when it was first seen.
    alive_since: since when heartbeats have not been missed.
    active_at: when the resource became active or the run was started again.
    going: whether the run had not given up at some time since then.
  """

  existed: bool = False
  deleting: bool = False
  asked: bool = False
  recreations: int = 0
  reruns: int = 0
  interventions: int = 0
  not_before: float = 0.0
  beat: str | None = None
  beat_at: float | None = None
  alive_since: float | None = None
  active_at: float | None = None
  going: bool = False


def remember(
    seen: Seen, memory: Memory, policy: Policy, now: float
) -> Memory:
  """Returns the memory after one more look."""
  changes = {}
  if seen.state is not None:
    changes |= {"existed": True, "asked": True}
  if seen.state != "ACTIVE":
    changes |= {"active_at": None, "alive_since": None, "going": False}
  else:
    changes |= {"deleting": False}
    if memory.active_at is None:
      changes |= {"active_at": now}
    if seen.stopped is None:
      changes |= {"going": True}
  if seen.beat is not None and seen.beat != memory.beat:
    since = memory.alive_since
    if since is None or now - memory.beat_at > policy.silent_secs:
      since = now
    changes |= {
        "beat": seen.beat, "beat_at": now, "alive_since": since,
        "interventions": 0,
    }
    if now - since >= policy.healthy_secs:
      changes |= {"reruns": 0}
  return dataclasses.replace(memory, **changes)


def healthy(memory: Memory, policy: Policy, now: float) -> bool:
  """Whether an active run is alive, or may still be starting."""
  started = now - memory.active_at <= policy.setup_secs
  beating = (
      memory.alive_since is not None
      and now - memory.beat_at <= policy.silent_secs
  )
  return started or beating


def intervene(memory: Memory, policy: Policy, now: float, **changes) -> Memory:
  """Returns the memory after an intervention: the next one has to wait."""
  pause = policy.first_pause * 2 ** min(memory.interventions, 30)
  return dataclasses.replace(
      memory, not_before=now + min(pause, policy.longest_pause),
      interventions=memory.interventions + 1, **changes,
  )


def decide(
    seen: Seen, memory: Memory, policy: Policy, now: float
) -> tuple[Action, Memory, str]:
  """What to do.

  Args:
    seen: the world now.
    memory: from the last call; Memory() at first.
    policy: how patient to be.
    now: seconds on a clock that never goes back.

  Returns:
    The action, the memory provided that the action is tried, and the reason.
  """
  vanished = seen.state is None and memory.existed and not memory.deleting
  memory = remember(seen, memory, policy, now)
  if seen.done:
    return Action.DONE, memory, "the run has finished"
  if vanished:
    return Action.GIVE_UP, memory, "somebody else has deleted the resource"
  if seen.state in ON_THE_WAY:
    return Action.WAIT, memory, f"the resource is {seen.state}"
  if seen.state is None or seen.state in GONE:
    return replace_resource(seen, memory, policy, now)
  if seen.state == "ACTIVE":
    return attend(seen, memory, policy, now)
  return Action.WAIT, memory, f"unknown state {seen.state}: not touched"


def replace_resource(
    seen: Seen, memory: Memory, policy: Policy, now: float
) -> tuple[Action, Memory, str]:
  """What to do where there is no resource, or none that comes back."""
  what = seen.state or "not there"
  if seen.state and seen.initiator != "SERVICE":
    who = seen.initiator or "an unknown initiator"
    return Action.GIVE_UP, memory, f"{what} by {who}, not by the service"
  if memory.asked and memory.recreations >= policy.max_recreations:
    spent = f"{memory.recreations} re-creations are spent"
    return Action.GIVE_UP, memory, f"the resource is {what}, and {spent}"
  if now < memory.not_before:
    return Action.WAIT, memory, f"the resource is {what}; pausing"
  if seen.state:
    # The pause after deleting is the pause before creating.
    memory = intervene(memory, policy, now, deleting=True)
    return Action.DELETE, memory, f"the service has made it {what}"
  recreations = memory.recreations + memory.asked
  memory = intervene(
      memory, policy, now, recreations=recreations, asked=True,
      existed=False, deleting=False,
  )
  most = f"re-creation {recreations} of at most {policy.max_recreations}"
  return Action.CREATE, memory, most if recreations else "there is none yet"


def attend(
    seen: Seen, memory: Memory, policy: Policy, now: float
) -> tuple[Action, Memory, str]:
  """What to do with an active resource; never to delete it."""
  costs = "the resource is still there, and costs"
  fine = healthy(memory, policy, now)
  # A note of the run before is removed when the run starts.
  if seen.stopped is not None and (memory.going or not fine):
    said = f"the run gave up with status {seen.stopped} (tpu_vm.sh logs)"
    return Action.GIVE_UP, memory, f"{said}; {costs}"
  if fine:
    return Action.WAIT, memory, "the run is alive or starting"
  if memory.reruns >= policy.max_reruns:
    spent = f"no sign of life after {memory.reruns} reruns"
    return Action.GIVE_UP, memory, f"{spent} (tpu_vm.sh logs); {costs}"
  if now < memory.not_before:
    return Action.WAIT, memory, "no sign of life; pausing"
  memory = intervene(
      memory, policy, now, reruns=memory.reruns + 1, active_at=now,
      alive_since=None, going=False,
  )
  return Action.RERUN, memory, f"no sign of life; rerun {memory.reruns}"
