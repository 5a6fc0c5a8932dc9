"""What runs on a TPU VM: setup_vm.sh, startup.sh, job.sh."""

import io
import shlex
import tarfile

import pytest

from tests.launch import harness

# Stands in for python3 and, once `-m venv` has run, for .venv/bin/python.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*) [[ -z ${OLD:-} ]]; exit ;;
  *ensurepip* | *'import pip'*) exit 0 ;;
  --version) echo "Python 3.11.0"; exit ;;
  *jax.local_devices*)
    echo "4 devices on this host: a kind"
    [[ -z ${NO_TPU:-} ]]
    exit
    ;;
esac
printf '%s\\n' "python $*" >>"$PYTHON_LOG"
[[ "$*" == *"${FAIL_ON:-nothing at all}"* ]] && exit 1
if [[ "$*" == "-m venv"* ]]; then
  mkdir -p "${@: -1}/bin"
  cp "$0" "${@: -1}/bin/python"
fi
exit 0
"""


@pytest.fixture
def vm(checkout):
  """A machine with a Python that installs nothing."""
  for name in ("python3", "python3.12"):
    (checkout.bin / name).unlink(missing_ok=True)
  checkout.write(checkout.bin / "python3", FAKE_PYTHON)
  checkout.python_log = checkout.folder / "python_log"
  checkout.mounts = checkout.folder / "mounts"
  checkout.mounts.write_text("")
  return checkout


def setup(vm, *args, **env):
  """Runs setup_vm.sh; `log` has Python's calls and the stand-ins'."""
  vm.python_log.write_text("")
  result = vm.run(
      "setup_vm.sh", *args, PYTHON_LOG=vm.python_log, MOUNTS_FILE=vm.mounts,
      MOUNT=vm.folder / "mount", **env,
  )
  # Root needs no sudo, and with it there is a stand-in for mkdir.
  others = [
      vm.plain(shlex.join(c)).removeprefix("sudo ") for c in result.acts
  ]
  others = [x for x in others if not x.startswith("mkdir")]
  result.log = vm.python_log.read_text().splitlines() + others
  return result


def mount(vm):
  """The bucket is mounted from now on."""
  vm.mounts.write_text(f"a-bucket {vm.folder}/mount fuse.gcsfuse rw 0 0\n")


INSTALL = [
    "python -m venv --clear .venv",
    "python -m pip install --quiet -r launch/requirements-tpu.txt",
    "python -m pip install --quiet --no-deps -e .",
]
GCSFUSE = (
    "gcsfuse --implicit-dirs -o allow_other --metadata-cache-ttl-secs=0 "
    "--rename-dir-limit=200000 a-bucket FOLDER/mount"
)
SERVICE = (
    "systemd-run --unit=bcm-mount.service --collect --property=Type=forking "
)


def test_setup_installs_the_lock_file_once(vm):
  first = setup(vm)
  assert first.returncode == 0, first.stderr
  assert first.log == INSTALL
  assert "4 devices on this host" in first.stdout
  assert setup(vm).log == []
  with open(vm.root / "launch" / "requirements-tpu.txt", "a") as f:
    f.write("another==1.0\n")
  assert setup(vm).log == INSTALL[1:]


def test_setup_need_not_count_devices(vm):
  assert setup(vm, "--no-devices", NO_TPU="1").returncode == 0
  assert setup(vm, NO_TPU="1").returncode == 1


def test_setup_for_gpus_takes_their_lock_file(vm):
  result = setup(vm, "--extra=cuda")
  assert result.log[1] == INSTALL[1].replace("tpu", "cuda")


def test_a_failed_install_is_tried_again(vm):
  failed = setup(vm, FAIL_ON="--no-deps")
  assert failed.returncode == 1
  assert "error: pip could not install bcm_jax" in failed.stderr
  assert setup(vm).log == INSTALL[1:]


def test_the_bucket_is_mounted_as_a_service_once(vm):
  result = setup(vm, BUCKET="a-bucket")
  assert result.returncode == 0, result.stderr
  assert result.log == [*INSTALL, SERVICE + GCSFUSE]
  mount(vm)
  assert setup(vm, BUCKET="a-bucket").log == []


def dry(vm, **env):
  """The commands of a dry run, without sudo."""
  result = setup(vm, "--dry-run", **env)
  assert result.returncode == 0, result.stderr
  assert not result.log
  lines = vm.plain(result.stdout).splitlines()
  return [x.removeprefix("sudo ") for x in lines]


def test_setup_dry(vm):
  commands = dry(vm, BUCKET="a-bucket")
  assert commands[0] == "python3 -m venv --clear .venv"
  assert commands[1:3] == [
      x.replace("python", ".venv/bin/python", 1) for x in INSTALL[1:]
  ]
  assert commands[3:] == [
      "mkdir -p FOLDER/mount", SERVICE + GCSFUSE,
  ]


def test_without_systemd_the_bucket_is_mounted_directly(vm):
  commands = dry(vm, BUCKET="a-bucket", SYSTEMD_DIR="/nowhere")
  assert commands[-1] == GCSFUSE


def test_gcsfuse_comes_from_apt_or_from_the_bucket(vm):
  (vm.bin / "gcsfuse").unlink()
  assert "apt-get install --yes gcsfuse" in dry(vm, BUCKET="a-bucket")
  commands = dry(vm, BUCKET="a-bucket", GCSFUSE_DEB="gs://a-bucket/g.deb")
  assert commands[3:5] == [
      "gcloud storage cp gs://a-bucket/g.deb /tmp/gcsfuse.deb",
      "apt-get install --yes /tmp/gcsfuse.deb",
  ]


def test_old_python_is_an_error_or_is_replaced(vm):
  result = setup(vm, OLD="1")
  assert result.returncode == 1
  assert "error: no Python >= 3.11 found" in result.stderr
  assert not result.log
  commands = setup(vm, "--install-python", "--dry-run", OLD="1").stdout
  assert "apt-get install --yes python3.11 python3.11-venv" in commands


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["--extra=gpu"], {}, "EXTRA: got gpu"),
        (["--chek"], {}, "unknown word '--chek'"),
        ([], {"BUCKET": "gs://a-bucket"}, "expected the bare name"),
        ([], {"PYTHON": "/nowhere"}, "PYTHON: got /nowhere"),
    ],
)
def test_setup_refuses_nonsense(vm, args, env, message):
  result = setup(vm, *args, **env)
  assert result.returncode == 65
  assert message in result.stderr


def test_check_reports_and_changes_nothing(vm):
  result = setup(vm, "--check", BUCKET="a-bucket")
  assert result.returncode == 1
  assert [x.split()[0] for x in result.stdout.splitlines()] == ["MISSING"] * 3
  assert not result.log
  setup(vm)
  mount(vm)
  result = setup(vm, "--check", BUCKET="a-bucket")
  assert result.returncode == 0, result.stdout
  assert result.stdout.splitlines()[-1] == (
      "4 devices on this host: a kind"
  )
  assert not result.log


def test_check_without_devices_fails(vm):
  setup(vm)
  result = setup(vm, "--check", NO_TPU="1")
  assert result.returncode == 1
  assert "error: JAX found no devices" in result.stderr


# job.sh -----------------------------------------------------------------------

JOB = {
    "WORKDIR": "/mnt/bcm/runs/a-run", "LIBTPU_INIT_ARGS": "--a=1 --b=2",
    "GRACE_SECS": "77",
}


def test_job_is_a_service_that_saves_at_shutdown(checkout):
  result = checkout.run("job.sh", "start", "--config=a b", **JOB)
  assert result.returncode == 0, result.stderr
  text = "".join(shlex.join(c) + "\n" for c in result.acts)
  harness.check_golden("job_start.txt", checkout.plain(text))
  dry = checkout.run("job.sh", "--dry-run", "start", "--config=a b", **JOB)
  assert not dry.acts
  assert [shlex.split(x) for x in dry.stdout.splitlines()] == result.acts


def test_job_keeps_lines_dollars_and_the_work_directory_of_its_arguments(
    checkout
):
  flags = "--a=1\nreboot"
  result = checkout.run(
      "job.sh", "start", "--config.x=$HOME $$", "--workdir", "/mnt/mine",
      **JOB | {"XLA_FLAGS": flags},
  )
  call = result.acts[-1]
  assert f"--setenv=XLA_FLAGS={flags}" in call
  assert "--setenv=WORKDIR=/mnt/mine" in call
  assert "--stopped-file=/mnt/mine/STOPPED" in call
  # systemd replaces $NAME, and $$ by $.
  assert call[-3:] == ["--config.x=$$HOME $$$$", "--workdir", "/mnt/mine"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stop"], "systemctl stop bcm-job.service"),
        (["status"], "systemctl status --no-pager bcm-job.service"),
        (["logs", "7"],
         "journalctl --unit=bcm-job.service --lines=7 --no-pager"),
        (["logs", "follow"],
         "journalctl --unit=bcm-job.service --lines=100 --follow"),
    ],
)
def test_job_verbs(checkout, words, expected):
  result = checkout.run("job.sh", *words)
  assert [shlex.join(c) for c in result.acts] == [expected]


def test_job_needs_a_work_directory_and_a_verb(checkout):
  missing = checkout.run("job.sh", "start", "--config=a")
  assert (missing.returncode, missing.acts) == (65, [])
  assert "not set: WORKDIR" in missing.stderr
  assert checkout.run("job.sh", "begin").returncode == 65


# startup.sh -------------------------------------------------------------------

LOGGED = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/} $# $* WORKDIR=${WORKDIR:-}" >>"$STARTUP_LOG"
"""


@pytest.fixture
def fresh(checkout):
  """A new VM, and the code for it."""
  checkout.code = checkout.folder / "code.tar.gz"
  with tarfile.open(checkout.code, "w:gz") as tar:
    for name in ("setup_vm.sh", "job.sh"):
      info = tarfile.TarInfo(f"launch/{name}")
      info.size, info.mode = len(LOGGED), 0o755
      tar.addfile(info, io.BytesIO(LOGGED.encode()))
  checkout.target = checkout.folder / "opt"
  checkout.startup_log = checkout.folder / "startup_log"
  checkout.workdir = checkout.folder / "run"
  return checkout


def startup(fresh, *args, **env):
  settings = {
      "CODE": fresh.code, "BCM_ROOT": fresh.target,
      "STARTUP_LOG": fresh.startup_log, "WORKDIR": fresh.workdir,
  }
  fresh.startup_log.write_text("")
  result = fresh.run("startup.sh", *args, **settings | env)
  result.log = fresh.startup_log.read_text().splitlines()
  return result


def test_startup_unpacks_sets_up_and_starts(fresh):
  result = startup(fresh, "--config=a b")
  assert result.returncode == 0, result.stderr
  assert result.log == [
      f"setup_vm.sh 2 --install-python --no-devices WORKDIR={fresh.workdir}",
      f"job.sh 2 start --config=a b WORKDIR={fresh.workdir}",
  ]
  assert result.acts == [["systemctl", "stop", "bcm-job.service"]]


def test_startup_replaces_old_code_and_keeps_packages(fresh):
  for name in (".venv/bin/python", "bcm_jax/old.py"):
    (fresh.target / name).parent.mkdir(parents=True)
    (fresh.target / name).write_text("")
  assert startup(fresh, "--config=a").returncode == 0
  assert not (fresh.target / "bcm_jax").exists()
  assert (fresh.target / ".venv" / "bin" / "python").exists()
  assert (fresh.target / "launch" / "job.sh").exists()


def test_startup_fetches_from_the_bucket(fresh):
  fresh.write(
      fresh.bin / "gcloud", f'#!/usr/bin/env bash\ncp "{fresh.code}" "$4"\n'
  )
  result = startup(fresh, "--config=a", CODE="gs://b/code.tar.gz")
  assert result.returncode == 0, result.stderr
  assert len(result.log) == 2


def test_startup_without_arguments_only_sets_up(fresh):
  result = startup(fresh)
  assert result.log == [
      f"setup_vm.sh 1 --install-python WORKDIR={fresh.workdir}"
  ]


def test_startup_of_a_finished_run_starts_nothing(fresh):
  fresh.workdir.mkdir()
  (fresh.workdir / "DONE").write_text("{}")
  result = startup(fresh, "--config=a")
  assert result.returncode == 0
  assert "has finished" in result.stderr
  assert [x.split()[0] for x in result.log] == ["setup_vm.sh"]


def test_startup_without_code_says_so(fresh):
  result = startup(fresh, CODE="")
  assert result.returncode == 65
  assert "error: CODE is not set" in result.stderr


def test_what_queued_resource_sends_is_a_script_that_starts(fresh):
  settings = harness.SETTINGS | {"TMPDIR": str(fresh.folder)}
  # gcloud keeps what it is given.
  fresh.write(
      fresh.bin / "gcloud",
      "#!/usr/bin/env bash\n"
      'for word in "$@"; do\n'
      "  [[ $word == *startup-script=* ]] &&\n"
      f'    cp "${{word#*script=}}" "{fresh.folder}/sent.sh"\n'
      "done\n"
      f'[[ $* == *"storage cp gs"* ]] && cp "{fresh.code}" "$4"\n'
      "exit 0\n",
  )
  sent = fresh.run(
      "queued_resource.sh", "create", "--", "--config=a b", **settings
  )
  assert sent.returncode == 0, sent.stderr
  (fresh.root / "launch" / "startup.sh").write_text(
      (fresh.folder / "sent.sh").read_text()
  )
  result = startup(fresh)
  assert result.returncode == 0, result.stderr
  assert result.log[-1] == (
      "job.sh 2 start --config=a b WORKDIR=/mnt/bcm/runs/a-run"
  )
