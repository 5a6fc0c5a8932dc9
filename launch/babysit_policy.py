"""Policy of the babysitter of a queued resource: a pure function.

No clock, file or network here; see babysit.py for those.
"""

import dataclasses
import enum

ON_THE_WAY = {
    *("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"),
    *("DELETING", "SUSPENDING"),
}
GONE = {"SUSPENDED", "FAILED"}


class Action(enum.Enum):
  """Next action of the babysitter."""

  WAIT = "wait"
  CREATE = "create"
  DELETE = "delete"
  RERUN = "rerun"
  DONE = "done"
  GIVE_UP = "give up"


@dataclasses.dataclass(frozen=True)
class Policy:
  """Limits and delays; see babysit.sh.

  Attributes: max_recreations: limit on re-creations of the resource in total.
    max_reruns: limit on restarts of the run without `healthy_secs` of
    heartbeats
      in between.
    silent_secs: seconds without a heartbeat after which an active run is
      considered dead.
    setup_secs: seconds from an active resource to the first heartbeat.
    first_pause: seconds between two interventions; doubles every time.
    longest_pause: upper bound of the pause.
    healthy_secs: seconds of heartbeats that reset the count of reruns.
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
  """One observation of resource and run.

  Attributes:
    state: state of the queued resource; None if it does not exist.
    initiator: initiator of that state: 'USER', 'SERVICE' or ''.
    done: whether the run has finished.
    stopped: exit status of a run that gave up; None otherwise.
    beat: heartbeat, changes while the run is alive; None before the first one.
  """

  state: str | None
  initiator: str = ""
  done: bool = False
  stopped: int | None = None
  beat: str | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
  """State of the babysitter between observations.

  Attributes:
    existed: the resource was observed since the last request to create it.
    deleting: we have deleted it since.
    asked: it existed or was requested before.
    recreations, reruns: counts so far.
    interventions: consecutive interventions without a heartbeat in between.
    not_before: time of the next permitted intervention.
    beat, beat_at: last heartbeat, and time of its first observation.
    alive_since: start of the current period without missed heartbeats.
    active_at: time when the resource became active or the run was restarted.
    going: whether the run was observed without STOPPED since then.
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
  """Returns the memory after an observation."""
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
  """Returns whether an active run is alive, or may still be starting."""
  started = now - memory.active_at <= policy.setup_secs
  beating = (
      memory.alive_since is not None
      and now - memory.beat_at <= policy.silent_secs
  )
  return started or beating


def intervene(memory: Memory, policy: Policy, now: float, **changes) -> Memory:
  """Returns the memory after an intervention, with the pause that follows."""
  pause = policy.first_pause * 2 ** min(memory.interventions, 30)
  return dataclasses.replace(
      memory, not_before=now + min(pause, policy.longest_pause),
      interventions=memory.interventions + 1, **changes,
  )


def decide(
    seen: Seen, memory: Memory, policy: Policy, now: float
) -> tuple[Action, Memory, str]:
  """Decides on the next action.

  Args:
    seen: current observation.
    memory: memory of the last call; Memory() at first.
    policy: limits and delays.
    now: seconds of a monotonic clock.

  Returns:
    The action, the memory after trying it, and the reason.
  """
  vanished = seen.state is None and memory.existed and not memory.deleting
  memory = remember(seen, memory, policy, now)
  if seen.done:
    return Action.DONE, memory, "the run has finished"
  if vanished:
    return Action.GIVE_UP, memory, "the resource was deleted by somebody else"
  if seen.state in ON_THE_WAY:
    return Action.WAIT, memory, f"the resource is {seen.state}"
  if seen.state is None or seen.state in GONE:
    return replace_resource(seen, memory, policy, now)
  if seen.state == "ACTIVE":
    return attend(seen, memory, policy, now)
  return Action.WAIT, memory, f"unknown state {seen.state}; not changed"


def replace_resource(
    seen: Seen, memory: Memory, policy: Policy, now: float
) -> tuple[Action, Memory, str]:
  """Decides on the next action if the resource does not exist or is lost."""
  state = seen.state or "missing"
  if seen.state and seen.initiator != "SERVICE":
    initiator = seen.initiator or "an unknown initiator"
    return (
        Action.GIVE_UP, memory, f"{state} by {initiator}, not by the service"
    )
  if memory.asked and memory.recreations >= policy.max_recreations:
    limit = f"the limit of {memory.recreations} re-creations is reached"
    return Action.GIVE_UP, memory, f"the resource is {state}, and {limit}"
  if now < memory.not_before:
    return Action.WAIT, memory, f"the resource is {state}; pausing"
  if seen.state:
    # The pause after deleting is the pause before creating.
    memory = intervene(memory, policy, now, deleting=True)
    return Action.DELETE, memory, f"{state} by the service"
  recreations = memory.recreations + memory.asked
  memory = intervene(
      memory, policy, now, recreations=recreations, asked=True,
      existed=False, deleting=False,
  )
  reason = f"re-creation {recreations} of at most {policy.max_recreations}"
  return (
      Action.CREATE, memory, reason if recreations else "does not exist yet"
  )


def attend(
    seen: Seen, memory: Memory, policy: Policy, now: float
) -> tuple[Action, Memory, str]:
  """Decides on the next action for an active resource; never deletes it."""
  costs = "the resource still exists and incurs costs"
  is_healthy = healthy(memory, policy, now)
  # STOPPED of an earlier run is removed only when the run starts.
  if seen.stopped is not None and (memory.going or not is_healthy):
    reason = f"the run gave up with status {seen.stopped} (tpu_vm.sh logs)"
    return Action.GIVE_UP, memory, f"{reason}; {costs}"
  if is_healthy:
    return Action.WAIT, memory, "the run is alive or starting"
  if memory.reruns >= policy.max_reruns:
    reason = f"no heartbeat after {memory.reruns} reruns"
    return Action.GIVE_UP, memory, f"{reason} (tpu_vm.sh logs); {costs}"
  if now < memory.not_before:
    return Action.WAIT, memory, "no heartbeat; pausing"
  memory = intervene(
      memory, policy, now, reruns=memory.reruns + 1, active_at=now,
      alive_since=None, going=False,
  )
  return Action.RERUN, memory, f"no heartbeat; rerun {memory.reruns}"
