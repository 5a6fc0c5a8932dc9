"""The babysitter of queued resources, in a world with a clock of its own."""

import dataclasses
import random

import babysit
from babysit_policy import Action
from babysit_policy import decide
from babysit_policy import Memory
from babysit_policy import Policy
from babysit_policy import Seen
import pytest

from tests.launch import harness

POLICY = Policy(
    max_recreations=3, max_reruns=2, silent_secs=300, setup_secs=600,
    first_pause=60, longest_pause=240,
)
POLL = harness.POLL
CHANGES = (Action.CREATE, Action.DELETE, Action.RERUN)


class FakeCloud:
  """A queued resource and its run; the script says what happens when.

  Args:
    clock: of the world.
    script: [(seconds, change)]; a change sets attributes.
    silent: whether the run never gives a sign of life.
  """

  def __init__(self, clock, script=(), silent=False):
    self.clock, self.silent = clock, silent
    self.script = sorted(script, key=lambda x: x[0])
    self.state, self.initiator = None, ""
    self.done, self.stopped = False, None
    self.delay = 120.0  # From creation to ACTIVE.
    self.changed_at = clock.now
    self.run_since = None
    self.beat = None
    self.actions = []
    self.blind = False
    self.fails = ()

  def _advance(self):
    now = self.clock.now
    while self.script and self.script[0][0] <= now - 1000:
      for name, value in self.script.pop(0)[1].items():
        setattr(self, name, value)
        if name == "state":
          self.changed_at = now
          self.run_since = None
    if self.state == "WAITING_FOR_RESOURCES":
      if now - self.changed_at >= self.delay:
        self.state, self.changed_at = "ACTIVE", now
        self.run_since = now
    if self.state == "ACTIVE" and not self.silent:
      if self.run_since is not None and now - self.run_since > 200:
        self.beat = str(int(now // 15))

  def look(self):
    self._advance()
    if self.blind:
      raise babysit.LookError("no network")
    return Seen(
        self.state, self.initiator, self.done, self.stopped, self.beat
    )

  def act(self, action):
    self.actions.append((self.clock.now - 1000, action, self.state))
    if action in self.fails:
      return False
    if action is Action.CREATE:
      assert self.state is None
      self.state, self.initiator = "WAITING_FOR_RESOURCES", "USER"
    elif action is Action.DELETE:
      self.state = None
    self.changed_at = self.clock.now
    self.run_since = self.clock.now
    return True


def play(script=(), policy=POLICY, hours=24, **settings):
  """Babysits a world; returns it with the exit status."""
  clock = harness.Clock()
  silent = settings.pop("silent", False)
  delete = settings.pop("delete_when_done", False)
  cloud = FakeCloud(clock, script, silent)
  for name, value in settings.items():
    setattr(cloud, name, value)

  def sleep(secs):
    clock.sleep(secs)
    if clock.now > 1000 + hours * 3600:
      raise TimeoutError

  try:
    cloud.status = babysit.babysit(
        cloud, policy, POLL, delete, clock=clock, sleep=sleep
    )
  except TimeoutError:
    cloud.status = None
  cloud.names = [action for _, action, _ in cloud.actions]
  return cloud


def suspended(at, initiator="SERVICE", state="SUSPENDED"):
  return (at, {"state": state, "initiator": initiator})


def test_preempted_once_then_done():
  cloud = play([
      suspended(3000),
      (9000, {"done": True}),
  ])
  assert cloud.status == 0
  assert cloud.names == [Action.CREATE, Action.DELETE, Action.CREATE]
  assert cloud.state == "ACTIVE"


def test_done_frees_the_resource_if_told_to():
  cloud = play([(9000, {"done": True})], delete_when_done=True)
  assert cloud.status == 0
  assert cloud.names == [Action.CREATE, Action.DELETE]


def test_nothing_is_done_for_a_run_that_is_done():
  cloud = play(done=True)
  assert (cloud.status, cloud.names) == (0, [])


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
@pytest.mark.parametrize("initiator", ["USER", "", "NOBODY"])
def test_what_a_user_stopped_stays(state, initiator):
  cloud = play([suspended(3000, initiator, state)])
  assert cloud.status == 1
  assert cloud.names == [Action.CREATE]


def test_failed_by_the_service_is_created_again():
  cloud = play([suspended(300, state="FAILED"), (9000, {"done": True})])
  assert cloud.status == 0
  assert cloud.names == [Action.CREATE, Action.DELETE, Action.CREATE]


def test_what_somebody_deleted_stays_deleted():
  cloud = play([(3000, {"state": None})])
  assert cloud.status == 1
  assert cloud.names == [Action.CREATE]


def test_slow_deleting_is_waited_for():
  clock = harness.Clock()
  memory = Memory()
  seen = [
      (Seen("SUSPENDED", "SERVICE"), Action.DELETE),
      (Seen("DELETING"), Action.WAIT),
      (Seen("DELETING"), Action.WAIT),
      (Seen(None), Action.CREATE),
      (Seen("CREATING"), Action.WAIT),
  ]
  for look, expected in seen:
    action, memory, _ = decide(look, memory, POLICY, clock.now)
    assert action is expected
    clock.now += 300


def test_no_more_recreations_than_allowed():
  times = [suspended(1000 * i) for i in range(1, 60)]
  cloud = play(times)
  assert cloud.status == 1
  assert cloud.names.count(Action.CREATE) == 1 + POLICY.max_recreations
  assert cloud.names.count(Action.DELETE) == POLICY.max_recreations


def test_an_existing_resource_is_taken_over():
  cloud = play(
      [suspended(3000), (9000, {"done": True})], state="ACTIVE",
      run_since=500.0,
  )
  assert cloud.names == [Action.DELETE, Action.CREATE]


def test_a_silent_run_is_started_again_with_pauses_and_never_deleted():
  cloud = play(silent=True)
  assert cloud.status == 1
  assert cloud.names == [Action.CREATE, Action.RERUN, Action.RERUN]
  assert cloud.state == "ACTIVE"
  first, second = (at for at, action, _ in cloud.actions[1:])
  assert first >= 120 + POLICY.setup_secs
  assert second - first >= POLICY.setup_secs


def test_a_run_that_falls_silent_is_started_again():
  cloud = play([(5000, {"silent": True}), (5900, {"silent": False}),
                (20000, {"done": True})])
  assert cloud.status == 0
  assert cloud.names == [Action.CREATE, Action.RERUN]
  assert 5000 + POLICY.silent_secs <= cloud.actions[1][0] <= 5500


def test_a_beating_run_is_left_alone():
  cloud = play(hours=100)
  assert cloud.status is None
  assert cloud.names == [Action.CREATE]


def test_reruns_are_counted_anew_after_a_healthy_hour():
  times = []
  for i in range(6):
    times += [(20000 * (i + 1), {"silent": True}),
              (20000 * (i + 1) + 900, {"silent": False})]
  cloud = play([*times, (200000, {"done": True})], hours=100)
  assert cloud.status == 0
  assert cloud.names.count(Action.RERUN) == 6


@pytest.mark.parametrize(("note", "status"), [(65, 65), (134, 1)])
def test_a_run_that_gave_up_is_not_started_again(note, status):
  cloud = play([(3000, {"stopped": note, "silent": True})])
  assert (cloud.status, cloud.names) == (status, [Action.CREATE])
  assert cloud.clock.now - 1000 <= 3000 + POLL


def test_an_old_note_of_giving_up_is_given_time_to_go():
  cloud = play(
      [(400, {"stopped": None}), (9000, {"done": True})],
      state="ACTIVE", run_since=1000.0, stopped=65,
  )
  assert cloud.status == 0


def test_without_sight_nothing_is_touched_and_it_ends_at_last():
  cloud = play([(600, {"blind": True})])
  assert cloud.status == 1
  assert cloud.names == [Action.CREATE]


def test_sight_may_fail_for_a_while():
  cloud = play([(600, {"blind": True}), (900, {"blind": False}),
                (9000, {"done": True})])
  assert (cloud.status, cloud.names) == (0, [Action.CREATE])


def test_failing_commands_come_with_growing_pauses_and_end():
  cloud = play([suspended(3000)], fails=(Action.DELETE,))
  assert cloud.status == 1
  times = [at for at, action, _ in cloud.actions if action is Action.DELETE]
  assert len(times) == babysit.MAX_FAILED_COMMANDS
  gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
  assert gaps == sorted(gaps)
  assert gaps[0] >= POLICY.first_pause
  assert gaps[-1] >= POLICY.longest_pause


def test_a_change_just_before_deleting_stops_it():
  cloud = FakeCloud(harness.Clock())
  cloud.state, cloud.initiator = "SUSPENDED", "SERVICE"
  looks = iter([cloud.look(), Seen("ACTIVE", beat="1"), Seen("ACTIVE", done=1)])
  cloud.look = lambda: next(looks)
  status = babysit.babysit(
      cloud, POLICY, POLL, clock=cloud.clock, sleep=cloud.clock.sleep
  )
  assert (status, cloud.actions) == (0, [])


STATES = (
    None, "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE",
    "SUSPENDING", "SUSPENDED", "FAILED", "DELETING", "NEW_STATE",
)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_the_promises_hold(seed):
  rng = random.Random(seed)
  memory, now, last, creations = Memory(), 0.0, -1e9, 0
  existed = False
  for _ in range(3000):
    seen = Seen(
        rng.choice(STATES), rng.choice(["USER", "SERVICE", "SERVICE", ""]),
        stopped=None,
        beat=rng.choice([None, "1", str(int(now // 200))]),
    )
    before = memory
    action, memory, reason = decide(seen, memory, POLICY, now)
    assert reason
    if action in CHANGES:
      assert now - last >= POLICY.first_pause, "too hot"
      last = now
    if action is Action.DELETE:
      assert seen.state in ("SUSPENDED", "FAILED")
      assert seen.initiator == "SERVICE"
    if action is Action.RERUN:
      assert seen.state == "ACTIVE"
      assert seen.beat in (None, before.beat)
    if action is Action.CREATE:
      creations += existed or creations > 0
      assert seen.state is None
    assert creations <= POLICY.max_recreations
    assert memory.recreations == creations
    existed |= seen.state is not None
    if action is Action.GIVE_UP:  # A new babysitter, with the same budget.
      memory = dataclasses.replace(memory, existed=False)
    now += rng.choice([1, 30, 30, 300])
