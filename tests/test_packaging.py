"""What pip would install: the wheel, an editable install, the requirements."""

import ast
import email
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SKIPPED = ("__pycache__", ".*", "build", "dist", "runs", "*.egg-info")

# Names under which distributions are imported, where they differ.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}


# Files whose library is an extra, and imported when it is needed.
EXTRAS = {"bcm_jax/export/hub.py": "hub", "bcm_jax/studio/app.py": "studio"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
  """A copy of the repository, since building writes into its own folder."""
  copy = tmp_path_factory.mktemp("packaging") / "checkout"
  shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*SKIPPED))
  return copy


def build(checkout: pathlib.Path, kind: str) -> zipfile.ZipFile:
  """Builds a wheel as pip does (PEP 517 and 660), without the network."""
  out = checkout.parent / kind
  out.mkdir()
  code = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
  result = subprocess.run(
      [sys.executable, "-c", code],
      cwd=checkout,
      capture_output=True,
      text=True,
      check=False,
  )
  assert result.returncode == 0, result.stderr
  (path,) = out.glob("*.whl")
  return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def wheel(checkout) -> zipfile.ZipFile:
  return build(checkout, "wheel")


@pytest.fixture(scope="module")
def metadata(wheel):
  (name,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
  return email.message_from_bytes(wheel.read(name))


def requirements(metadata, extra: str = "") -> dict[str, str]:
  """Returns {distribution: whole requirement} of the base or one extra."""
  found = {}
  for line in metadata.get_all("Requires-Dist"):
    named = re.search(r"extra == [\"'](\w+)[\"']", line)
    if (named.group(1) if named else "") == extra:
      name = re.match(r"[\w.-]+", line).group()
      found[re.sub(r"[-_.]+", "-", name).lower()] = line
  return found


def python_files(folder: str) -> set[str]:
  """Returns the paths of a folder's Python files from the root."""
  files = (ROOT / folder).rglob("*.py")
  return {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_holds_every_module_and_config_and_nothing_else(wheel):
  configs = {f"bcm_jax/{name}" for name in python_files("configs")}
  assert "bcm_jax/configs/digits.py" in configs
  found = {n for n in wheel.namelist() if ".dist-info/" not in n}
  shipped = {
      f"bcm_jax/networks/digits/{name}"
      for name in ("model.safetensors", "config.json", "result.json",
                   "README.md")
  }
  assert found == python_files("bcm_jax") | configs | shipped
  sizes = [i.file_size for i in wheel.infolist() if "networks/" in i.filename]
  assert sum(sizes) < 2 * 2**20


def test_wheel_carries_its_licence(wheel):
  (name,) = (n for n in wheel.namelist() if n.endswith("LICENSE"))
  text = wheel.read(name).decode()
  assert "Apache License" in text
  assert "The bcm_jax Authors" in text


def test_installed_wheel_imports_and_has_its_configs(wheel, tmp_path):
  wheel.extractall(tmp_path)
  code = (
      "import bcm_jax, pathlib;"
      "p = pathlib.Path(bcm_jax.__file__).parent;"
      "print(p, (p / 'configs' / 'digits.py').exists())"
  )
  found = subprocess.run(
      [sys.executable, "-c", code],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      check=True,
  )
  assert found.stdout.split() == [str(tmp_path / "bcm_jax"), "True"]


def test_the_console_script_of_the_wheel_runs(wheel, tmp_path):
  wheel.extractall(tmp_path)
  (folder,) = tmp_path.glob("*.dist-info")
  (script,) = importlib.metadata.Distribution.at(folder).entry_points
  assert (script.group, script.name) == ("console_scripts", "bcm_jax")
  # The file that pip writes into bin/.
  code = f"import sys; from {script.module} import {script.attr}; "
  found = subprocess.run(
      [sys.executable, "-c", f"{code} sys.exit({script.attr}())", "--help"],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      check=True,
  )
  assert "train_classifier" in found.stdout


@pytest.mark.slow
def test_editable_install_imports_from_the_checkout(checkout, tmp_path):
  build(checkout, "editable").extractall(tmp_path)
  code = (
      f"import site; site.addsitedir({str(tmp_path)!r});"
      "import bcm_jax; from bcm_jax import errors;"
      "print(bcm_jax.__file__, errors.__file__)"
  )
  # -S and no environment: whatever bcm_jax is installed here stays out.
  found = subprocess.run(
      [sys.executable, "-S", "-P", "-c", code],
      cwd=tmp_path,
      env={},
      capture_output=True,
      text=True,
      check=True,
  )
  package = checkout / "bcm_jax"
  expected = [str(package / "__init__.py"), str(package / "errors.py")]
  assert found.stdout.split() == expected


def test_version_and_python(metadata):
  import bcm_jax

  assert metadata["Version"] == bcm_jax.__version__
  assert metadata["Requires-Python"] == ">=3.11"
  citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
  assert f"\nversion: {bcm_jax.__version__}\n" in citation


def test_extras_and_tensorflow_markers(metadata):
  assert set(metadata.get_all("Provides-Extra")) == {
      *("tpu", "cuda", "cuda13", "hub", "export", "studio", "test", "dev")
  }
  assert set(requirements(metadata, "test")) < set(
      requirements(metadata, "dev")
  )
  # Exactly one of the two TensorFlows is asked for on any machine.
  base = requirements(metadata)
  clauses = {
      name: base[name].split(";")[1].strip().replace("'", '"')
      for name in ("tensorflow-cpu", "tensorflow")
  }
  here, elsewhere = clauses["tensorflow-cpu"], clauses["tensorflow"]
  assert here == 'sys_platform == "linux" and platform_machine == "x86_64"'
  assert elsewhere == here.replace("==", "!=").replace("and", "or")


def test_requirements_file_is_the_base_without_tensorflow(metadata):
  lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
  names = {re.match(r"[\w.-]+", line)[0] for line in lines if line[0] != "#"}
  base = set(requirements(metadata))
  without = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
  assert base - without == {"tensorflow", "tensorflow-cpu", "tensorboard"}


def third_party(source: str) -> set[str]:
  """Returns the distributions, as pip spells them, that source imports."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
      names.add(node.module.split(".")[0])
  names -= set(sys.stdlib_module_names) | {"bcm_jax"}
  return {DISTRIBUTIONS.get(n, n).replace("_", "-").lower() for n in names}


def test_every_import_is_a_declared_requirement(metadata):
  declared = set(requirements(metadata))
  undeclared = {}
  for name in sorted(python_files("bcm_jax") | python_files("configs")):
    found = third_party((ROOT / name).read_text(encoding="utf-8"))
    extra = requirements(metadata, EXTRAS[name]) if name in EXTRAS else {}
    if found - declared - set(extra):
      undeclared[name] = found - declared - set(extra)
  assert not undeclared


def test_undeclared_import_is_caught(metadata):
  source = "def f():\n  import torch\n  from PIL import Image\n  import os"
  found = third_party(source)
  assert found == {"torch", "pillow"}
  assert found - set(requirements(metadata)) == {"torch"}
