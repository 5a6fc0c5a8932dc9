#!/usr/bin/env python3
"""Writes the lock files requirements-tpu.txt and requirements-cuda.txt.

    python launch/lock.py tpu
    python launch/lock.py cuda

Resolves bcm_jax with that extra in a clean virtual environment, on Linux
x86_64, the platform of the pods; installs nothing.
"""

import json
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXTRAS = ("tpu", "cuda")


def pins(report: dict) -> list[str]:
  """Returns NAME==VERSION of all packages of a pip report except bcm_jax."""
  requirements = []
  for item in report["install"]:
    metadata = item["metadata"]
    name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
    if name != "bcm-jax":
      requirements.append(f"{name}=={metadata['version']}")
  return sorted(requirements)


def lock(extra: str, report: dict) -> str:
  """Returns the text of a lock file."""
  python = report["environment"]["python_version"]
  pip = report["pip_version"]
  return "\n".join((
      f"# All packages of bcm_jax[{extra}], direct and transitive; written by",
      f"#   python launch/lock.py {extra}",
      f"# with pip {pip} for Python {python} on Linux x86_64.",
      "# Install bcm_jax itself with --no-deps after them; setup_vm.sh does.",
      *pins(report),
  )) + "\n"


def resolve(extra: str) -> dict:
  """Returns pip's report of the packages it would install.

  Raises:
    subprocess.CalledProcessError: pip failed; its message is on stderr.
  """
  with tempfile.TemporaryDirectory() as folder:
    venv.create(f"{folder}/venv", with_pip=True)
    pip = [f"{folder}/venv/bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run(
        [*pip, "--dry-run", "--ignore-installed",
         "--report", f"{folder}/report.json", f"{ROOT}[{extra}]"],
        check=True,
    )
    return json.loads(pathlib.Path(f"{folder}/report.json").read_text())


def main(argv: list[str]) -> None:
  """Runs the command."""
  if argv[1:] in (["--help"], ["-h"]):
    print(__doc__)
    return
  if len(argv) != 2 or argv[1] not in EXTRAS:
    sys.exit(f"error: expected one of {', '.join(EXTRAS)}")
  if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    sys.exit("error: platform: expected Linux x86_64, as on the pods")
  path = ROOT / "launch" / f"requirements-{argv[1]}.txt"
  path.write_text(lock(argv[1], resolve(argv[1])))
  print(f"written: {path}")


if __name__ == "__main__":
  main(sys.argv)
