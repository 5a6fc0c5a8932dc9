"""Which commands the cloud scripts give, as transcripts.

UPDATE_GOLDENS=1 rewrites the files in goldens/.
"""

import json
import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

from tests.launch import harness

KNOWN = json.loads(
    (pathlib.Path(__file__).parent / "flags.json").read_text()
)["flags"]
RUN = ("--", "--config=configs/cifar10.py", "--config.x=a b")

# Name of the golden, script, arguments, further settings.
CASES = {
    "vm_create": ("tpu_vm.sh", ["create"], {"CAPACITY": "spot"}),
    "vm_create_flags": (
        "tpu_vm.sh", ["create"],
        {"CREATE_FLAGS": "--network=a-network --internal-ips"},
    ),
    "vm_sync": ("tpu_vm.sh", ["sync"], {}),
    "vm_run": ("tpu_vm.sh", ["run", *RUN], {}),
    "vm_run_slices": ("tpu_vm.sh", ["run", *RUN], {"SLICES": "2"}),
    "vm_logs": ("tpu_vm.sh", ["logs", "--worker=3", "--follow"], {}),
    "vm_status": ("tpu_vm.sh", ["status"], {}),
    "vm_stop": ("tpu_vm.sh", ["stop"], {}),
    "vm_delete": ("tpu_vm.sh", ["delete", "--yes"], {}),
    "queued_create": ("queued_resource.sh", ["create", *RUN], {}),
    "queued_create_slices": (
        "queued_resource.sh", ["create", "--commit=HEAD", *RUN],
        {"SLICES": "2", "CAPACITY": "guaranteed", "GCSFUSE_DEB": "gs://b/deb"},
    ),
    "queued_status": ("queued_resource.sh", ["status"], {}),
    "queued_rerun": ("queued_resource.sh", ["rerun"], {}),
    "queued_delete": ("queued_resource.sh", ["delete", "--yes"], {}),
    "gke_apply": ("gke.sh", ["apply", *RUN], {}),
    "gke_xpk": ("gke.sh", ["xpk", *RUN], {"XPK_STORAGE": "a-storage"}),
    "gke_status": ("gke.sh", ["status"], {}),
    "gke_logs": ("gke.sh", ["logs", "--follow"], {"NAMESPACE": "ours"}),
    "gke_delete": ("gke.sh", ["delete", "--yes"], {}),
}


def transcript(checkout, calls) -> str:
  """The calls as one could type them."""
  return checkout.plain("".join(shlex.join(c) + "\n" for c in calls))


@pytest.mark.parametrize("name", CASES)
def test_commands_are_the_goldens(checkout, name):
  script, args, env = CASES[name]
  result = checkout.run(script, *args, **harness.SETTINGS | env)
  assert result.returncode == 0, result.stderr
  assert result.acts
  harness.check_golden(f"{name}.txt", transcript(checkout, result.acts))


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_what_a_run_executes_and_executes_nothing(
    checkout, name
):
  script, args, env = CASES[name]
  settings = harness.SETTINGS | env
  done = checkout.run(script, *args, **settings)
  dry = checkout.run(script, args[0], "--dry-run", *args[1:], **settings)
  assert dry.returncode == 0, dry.stderr
  assert not dry.acts
  printed = [
      shlex.split(line) for line in checkout.plain(dry.stdout).splitlines()
      if not line.startswith("#")
  ]
  expected = transcript(checkout, done.acts).splitlines()
  assert printed == [shlex.split(line) for line in expected]


@pytest.mark.parametrize("name", CASES)
def test_flags_are_those_of_the_real_programs(checkout, name):
  script, args, env = CASES[name]
  result = checkout.run(script, *args, **harness.SETTINGS | env)
  checked = [c for c in result.calls if c[0] in ("gcloud", "kubectl", "xpk")]
  assert checked
  for call in checked:
    assert not unknown_flags(call), call


def unknown_flags(call: list[str]) -> list[str]:
  """Flags of a command that the real program does not have."""
  line = " ".join(call)
  (command,) = (c for c in KNOWN if line.startswith(c + " "))
  known = KNOWN[command].split()
  given = [w.partition("=")[0] for w in call if w.startswith("--")]
  return [flag for flag in given if flag not in known]


def test_a_wrong_flag_is_caught():
  call = ["gcloud", "storage", "cp", "a", "b", "--recursively"]
  assert unknown_flags(call) == ["--recursively"]


def test_startup_script_carries_settings_and_arguments(checkout):
  dry = checkout.run(
      "queued_resource.sh", "create", "--dry-run", *RUN, **harness.SETTINGS
  )
  lines = [
      line.removeprefix("#   ") for line in dry.stdout.splitlines()
      if line.startswith("#   ")
  ]
  assert "set -- --config=configs/cifar10.py '--config.x=a b'" in lines
  assert f"export CODE=gs://a-bucket/code/a-run-{harness.COMMIT}.tar.gz" in (
      lines
  )
  assert [
      shlex.split(line)[1] for line in lines if "LIBTPU_INIT_ARGS" in line
  ] == ["LIBTPU_INIT_ARGS=--one=1 --two=it's"]


def test_remote_arguments_survive_two_shells(checkout):
  result = checkout.run("tpu_vm.sh", "run", *RUN, **harness.SETTINGS)
  (call,) = result.acts
  (remote,) = (w for w in call if w.startswith("--command="))
  words = shlex.split(remote.removeprefix("--command="))
  assert words[-2:] == ["--config=configs/cifar10.py", "--config.x=a b"]
  assert "LIBTPU_INIT_ARGS=--one=1 --two=it's" in words


@pytest.mark.parametrize(
    ("script", "verb"),
    [
        ("tpu_vm.sh", "delete"),
        ("queued_resource.sh", "delete"),
        ("gke.sh", "delete"),
    ],
)
def test_deleting_asks(checkout, script, verb):
  result = checkout.run(script, verb, **harness.SETTINGS)
  assert result.returncode == 65
  assert "pass --yes" in result.stderr
  assert not result.calls


def test_babysitting_asks(checkout):
  result = checkout.run("babysit.sh", *RUN, **harness.SETTINGS)
  assert result.returncode == 65
  assert "pass --yes" in result.stderr
  assert not result.calls


@pytest.mark.parametrize(
    ("script", "args", "env", "message"),
    [
        ("tpu_vm.sh", ["create"], {"ZONE": "", "PROJECT": ""},
         "not set: PROJECT ZONE;"),
        ("tpu_vm.sh", ["create"], {"CAPACITY": "cheap"}, "CAPACITY: got cheap"),
        ("tpu_vm.sh", ["create"], {"CAPACITY": "guaranteed"}, "guaranteed"),
        ("tpu_vm.sh", ["create"], {"SLICES": "2"}, "queued_resource.sh"),
        ("tpu_vm.sh", ["create"], {"SLICES": "two"}, "SLICES: got two"),
        ("tpu_vm.sh", ["start"], {}, "unknown word 'start'; expected one of"),
        ("tpu_vm.sh", [], {}, "expected one of: create sync"),
        ("tpu_vm.sh", ["run", "stop"], {}, "unknown word 'stop'"),
        ("tpu_vm.sh", ["run"], {}, "nothing to run"),
        ("tpu_vm.sh", ["run", *RUN], {"WORKDIR": ""}, "not set: WORKDIR"),
        ("queued_resource.sh", ["create"], {}, "nothing to run"),
        ("queued_resource.sh", ["create", *RUN], {"WORKDIR": "/home/x"},
         "WORKDIR: got /home/x"),
        ("gke.sh", ["apply", *RUN], {"ACCELERATOR_TYPE": "v5e-17"},
         "unknown accelerator 'v5e-17'; expected one of v5e-1"),
        ("gke.sh", ["apply", *RUN], {"ACCELERATOR_TYPE": "v3-8"},
         "not offered by GKE"),
        ("gke.sh", ["apply", *RUN], {"NAME": "A_run"}, "--name: got A_run"),
        ("gke.sh", ["apply", *RUN], {"WORKDIR": "/x"}, "lost with the pods"),
        ("gke.sh", ["apply", *RUN], {"IMAGE": ""}, "not set: IMAGE"),
        ("babysit.sh", ["--yes", *RUN], {"WORKDIR": "/x"}, "WORKDIR: got /x"),
        ("babysit.sh", ["--yes"], {}, "nothing to run"),
        ("babysit.sh", ["--yes", "--poll-secs=0", *RUN], {}, "1 or more"),
        ("babysit.sh", ["--yes", "--poll=9", *RUN], {}, "--poll=9"),
    ],
)
def test_wrong_input_is_one_line_and_65(checkout, script, args, env, message):
  result = checkout.run(script, *args, **harness.SETTINGS | env)
  assert result.returncode == 65, result.stderr
  assert result.stderr.startswith("error: ")
  assert message in result.stderr
  assert len(result.stderr.splitlines()) == 1
  assert not result.acts


def test_uncommitted_changes_are_refused_unless_a_commit_is_named(checkout):
  commit = {"to": "rev-parse", "out": f"{harness.COMMIT}\n"}
  checkout.answer(commit, {"to": "status --porcelain", "out": " M a.py\n"})
  refused = checkout.run("tpu_vm.sh", "sync", **harness.SETTINGS)
  assert refused.returncode == 65
  assert "not committed" in refused.stderr
  assert not refused.acts
  named = checkout.run(
      "tpu_vm.sh", "sync", "--commit=HEAD", **harness.SETTINGS
  )
  assert named.returncode == 0, named.stderr


# A value of several lines, with all that a shell would read.
LINES = "--a=1\nreboot\n--b='$HOME' \"`id`\" # \\\n--c=$(id)"
FLAGS = {"XLA_FLAGS": LINES, "LIBTPU_INIT_ARGS": LINES}


def settings_of(checkout, script, verb) -> list[str]:
  """NAME=value of the run's settings, as they arrive on its host."""
  result = checkout.run(
      script, verb, "--dry-run", *RUN, **harness.SETTINGS | FLAGS
  )
  assert result.returncode == 0, result.stderr
  printed = result.stdout
  if script == "queued_resource.sh":  # The startup script.
    lines = [
        line.removeprefix("#   ") for line in printed.splitlines()
        if line.startswith("#   ")
    ]
    command = "\n".join([*lines[:-1], "env -0"]).replace("set --", "true --")
    out = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"]},
    )
    return out.stdout.split("\0")
  if verb == "render":
    pod = yaml.safe_load(printed)["spec"]["replicatedJobs"][0]["template"]
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    return [
        f"{e['name']}={e['value'].replace('$$', '$')}" for e in container["env"]
    ]
  words = shlex.split(printed)
  commands = [w for w in words if w.startswith("--command=sudo")]
  if commands:
    words = shlex.split(commands[0].removeprefix("--command="))
  return [w.removeprefix("--setenv=") for w in words]


@pytest.mark.parametrize(("script", "verb"), [
    ("tpu_vm.sh", "run"), ("queued_resource.sh", "create"),
    ("gke.sh", "render"), ("gke.sh", "xpk"),
])
def test_settings_of_several_lines_arrive_as_they_are(checkout, script, verb):
  arrived = settings_of(checkout, script, verb)
  for name, value in FLAGS.items():
    assert f"{name}={value}" in arrived


def test_flags_of_create_may_have_several_lines(checkout):
  flags = "--network=a\n  --internal-ips\n--tags=b"
  for script, words in (
      ("tpu_vm.sh", ["create"]), ("queued_resource.sh", ["create", *RUN])
  ):
    result = checkout.run(
        script, *words, **harness.SETTINGS | {"CREATE_FLAGS": flags}
    )
    assert result.returncode == 0, result.stderr
    assert set(flags.split()) <= set(result.acts[-1])


@pytest.mark.parametrize("name", [
    "PROJECT", "ZONE", "NAME", "ACCELERATOR_TYPE", "BUCKET", "MOUNT", "WORKDIR",
    "EXTRA", "MAX_RESTARTS", "IMAGE", "NAMESPACE", "TFDS_DATA_DIR",
])
@pytest.mark.parametrize("value", ["a\nreboot", "a\r", "a\x1b[2J"])
def test_other_settings_have_one_line(checkout, name, value):
  result = checkout.run("tpu_vm.sh", "sync", **harness.SETTINGS | {name: value})
  assert result.returncode == 65
  assert result.stderr.startswith(f"error: {name}: got ")
  assert len(result.stderr.splitlines()) == 1
  assert not result.calls


@pytest.mark.parametrize(("script", "verb"), [
    ("tpu_vm.sh", "run"), ("queued_resource.sh", "create"),
    ("gke.sh", "apply"), ("gke.sh", "xpk"), ("babysit.sh", "--yes"),
])
@pytest.mark.parametrize("flag", [
    ["--workdir", "/mnt/bcm/mine"], ["--workdir=/mnt/bcm/mine"]
])
def test_the_work_directory_of_the_arguments_wins(checkout, script, verb, flag):
  for settings in (harness.SETTINGS, harness.SETTINGS | {"WORKDIR": ""}):
    result = checkout.run(
        script, verb, "--dry-run", *RUN, *flag, **settings
    )
    assert result.returncode == 0, result.stderr
    assert "a-run/" not in result.stdout
    assert "runs/a-run" not in result.stdout
    assert "mine" in result.stdout


def test_a_failing_cloud_fails_the_script(checkout):
  checkout.answer({"to": "tpu-vm create", "err": "no quota\n", "status": 1})
  result = checkout.run("tpu_vm.sh", "create", **harness.SETTINGS)
  assert result.returncode == 1
  assert "no quota" in result.stderr


def test_settings_come_from_the_file_and_the_environment_wins(checkout):
  (checkout.root / "launch" / "env").write_text(
      "PROJECT=of-the-file\nZONE=of-the-file\nNAME='of the file'\n"
  )
  result = checkout.run("tpu_vm.sh", "delete", "--yes", ZONE="of-the-shell")
  (call,) = result.acts
  assert "of the file" in call
  assert {"--project=of-the-file", "--zone=of-the-shell"} <= set(call)


def test_example_settings_name_every_setting_and_no_one(checkout):
  example = (checkout.root / "launch" / "env.example").read_text()
  assigned = dict(
      line.split("=", 1) for line in example.splitlines()
      if line and not line.startswith("#")
  )
  common = (checkout.root / "launch" / "common.sh").read_text()
  known = common.partition("  SETTINGS=(")[2].partition(")")[0].split()
  assert set(assigned) == set(known)
  generic = {
      "MAX_RESTARTS": "5", "GRACE_SECS": "120", "MOUNT": "/mnt/bcm",
      "SLICES": "1", "EXTRA": "tpu", "NAMESPACE": "default",
  }
  assert {k: v for k, v in assigned.items() if v} == generic
