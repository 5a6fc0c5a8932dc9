"""A checkout whose scripts find stand-ins for the clouds first on PATH.

The stand-ins write down what they are asked and answer what the test says, so
no test reaches a cloud, a cluster or the system's services.
"""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from tests import text_goldens

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = pathlib.Path(__file__).parent / "goldens"
SOURCED = ("common.sh", "venv.sh")
SCRIPTS = sorted(
    p.name for p in (ROOT / "launch").glob("*.sh") if p.name not in SOURCED
)

# All that the scripts may call. Nothing else is on PATH.
TOOLS = (
    *("bash", "env", "cat", "cksum", "cp", "dirname", "find", "grep", "gzip"),
    *("mkdir", "mktemp", "rm", "sed", "sleep", "sort", "tar"),
    "timeout",
)
STAND_INS = (
    *("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "sudo", "git"),
    *("systemctl", "systemd-run", "journalctl", "apt-get", "gcsfuse"),
)
# They only ask.
READ_ONLY = ("git rev-parse", "git status")
COMMIT = "0123456789ab"

STAND_IN = """#!{python} -SE
import json, os, sys
name = os.path.basename(sys.argv[0])
argv = [name, *sys.argv[1:]]
with open(os.environ["STAND_IN_LOG"], "a") as f:
  f.write(json.dumps(argv) + "\\n")
if name == "git" and "archive" in argv:
  out = [a for a in argv if a.startswith("--output=")][0]
  open(out.partition("=")[2], "w").write("code\\n")
line = " ".join(argv)
path = os.environ["STAND_IN_ANSWERS"]
answers = json.load(open(path))
for answer in answers:
  if answer["to"] in line and answer.get("times", 1):
    if "times" in answer:
      answer["times"] -= 1
      json.dump(answers, open(path, "w"))
    sys.stdout.write(answer.get("out", ""))
    sys.stderr.write(answer.get("err", ""))
    sys.exit(answer.get("status", 0))
"""

# What the cloud scripts need; none of it exists.
SETTINGS = {
    "PROJECT": "a-project",
    "ZONE": "a-zone",
    "NAME": "a-run",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "RUNTIME_VERSION": "a-runtime",
    "BUCKET": "a-bucket",
    "WORKDIR": "/mnt/bcm/runs/a-run",
    "IMAGE": "an-image",
    "CLUSTER": "a-cluster",
    "LIBTPU_INIT_ARGS": "--one=1 --two=it's",
}


class Checkout:
  """A copy of launch/ in a folder with a space in its name.

  Attributes:
    root: the copy of the repository.
    bin: the only folder on PATH.
    folder: of both, and the home of the scripts.
  """

  def __init__(self, folder: pathlib.Path):
    self.root = folder / "check out"
    self.bin = folder / "bin"
    self._log = folder / "log"
    self._answers = folder / "answers"
    self.folder = folder
    shutil.copytree(
        ROOT / "launch", self.root / "launch",
        ignore=shutil.ignore_patterns("__pycache__", "env"),
    )
    for name in ("setup.py", "pyproject.toml", "requirements.txt"):
      shutil.copy(ROOT / name, self.root / name)
    self.bin.mkdir()
    for tool in TOOLS:
      (self.bin / tool).symlink_to(shutil.which(tool))
    (self.bin / "python3").symlink_to(sys.executable)
    for name in STAND_INS:
      self.write(self.bin / name, STAND_IN.format(python=sys.executable))
    self.answer()

  def write(self, path: pathlib.Path, text: str) -> pathlib.Path:
    """Writes a program."""
    path.write_text(text)
    path.chmod(0o755)
    return path

  def answer(self, *answers: dict) -> None:
    """What the stand-ins say: the first whose `to` is in the command line.

    `times` counts down; `out`, `err` and `status` are the answer.
    """
    commit = {"to": "rev-parse", "out": f"{COMMIT}\n"}
    self._answers.write_text(json.dumps([*answers, commit]))

  def env(self, **env) -> dict[str, str]:
    """The environment of a script."""
    return {
        "PATH": str(self.bin),
        "HOME": str(self.folder),
        "TMPDIR": str(self.folder),
        "SYSTEMD_DIR": str(self.bin),
        "STAND_IN_LOG": str(self._log),
        "STAND_IN_ANSWERS": str(self._answers),
    } | {k: str(v) for k, v in env.items()}

  def command(self, script: str, *args: str) -> list[str]:
    """The command line of a script."""
    return [str(self.root / "launch" / script), *args]

  def run(
      self, script: str, *args: str, stdin: str | None = None, **env
  ) -> subprocess.CompletedProcess:
    """Runs a script from another folder; `calls` are those of stand-ins."""
    self._log.write_text("")
    result = subprocess.run(
        self.command(script, *args), cwd=self.folder, env=self.env(**env),
        capture_output=True, text=True, check=False, timeout=60,
        **({"input": stdin} if stdin else {"stdin": subprocess.DEVNULL}),
    )
    result.calls = [
        json.loads(line) for line in self._log.read_text().splitlines()
    ]
    result.acts = [
        call for call in result.calls
        if not any(words in " ".join(call).replace(
            f"git -C {self.root}", "git") for words in READ_ONLY)
    ]
    return result

  def plain(self, text: str) -> str:
    """Text without what differs from machine to machine."""
    text = text.replace(str(self.root), "ROOT")
    text = re.sub(rf"{re.escape(str(self.folder))}/tmp\.\w+", "TMP", text)
    text = text.replace(str(self.bin), "BIN")
    return text.replace(str(self.folder), "FOLDER")


# The shortest sleep of a babysitter under test.
POLL = 30.0


class Clock:
  """Time that passes by sleeping alone, for POLL seconds at least."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now

  def sleep(self, secs):
    assert secs >= POLL
    self.now += secs


def check_golden(name: str, text: str) -> None:
  """Asserts that text is the golden; UPDATE_GOLDENS=1 rewrites it."""
  text_goldens.check(GOLDENS / name, text)


def words(line: str) -> list[str]:
  """A printed command as words, as a shell would read it."""
  return shlex.split(line)
