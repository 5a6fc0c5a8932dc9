"""Command lines: short names, --help, errors and exit statuses."""

import errno
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

from bcm_jax import __main__ as commands
from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax import main
from bcm_jax.utils import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Public module -> short name.
MODULES = {
    "bcm_jax.data.prepare": "prepare",
    "bcm_jax.interop.convert": "convert",
    "bcm_jax.plots": "plots",
    "bcm_jax.studio": "studio",
    "bcm_jax.release.hub": "hub",
    "bcm_jax.release.export": "export",
    "bcm_jax.train_classifier": "train_classifier",
    "bcm_jax.tools.migrate": "migrate",
}
# A row of --help: a name, perhaps with its value, two spaces, a text.
ROW = re.compile(r"  (-h, --help|-\S+|\w\S*)( \S+)?  +\S.*")


def status(function, *argv) -> int:
  """Returns the exit status of a command."""
  try:
    function(*argv)
  except SystemExit as e:
    return e.code or 0
  return 0


def rows(text: str, *heads: str) -> list[str]:
  """Returns the lines below the heads, up to the next empty line."""
  found = []
  for head in heads:
    if f"{head}:\n" in text:
      found += text.split(f"{head}:\n")[1].split("\n\n")[0].splitlines()
  return found


def check_help(text: str) -> list[str]:
  """Asserts one line per argument; returns the names of the flags."""
  found = rows(text, "positional arguments", "options", "modes", "flags")
  assert found
  for row in found:
    assert ROW.fullmatch(row) and len(row) <= 80, row
  return re.findall(r"^  (?:-h, )?(--[^\s=]+)", "\n".join(found), re.MULTILINE)


def test_the_version(capsys):
  for call in (
      lambda: commands.run(["--version"]),
      lambda: commands.run(["train", "--version"]),
      lambda: main.main(["main", "--version"]),
  ):
    assert status(call) == 0
    assert capsys.readouterr().out == f"bcm_jax {__version__}\n"


@pytest.mark.parametrize("argv", [["inspect"], ["compile"]])
def test_no_config_and_no_work_directory(argv, capsys):
  assert status(commands.run, argv) == errors.EXIT_BAD_INPUT
  text = capsys.readouterr().err
  assert "--config: got None," in text and "--workdir" not in text


@pytest.mark.parametrize("argv", [
    ["export", "DIR", "out.zip"], ["hub", "pack", "DIR", "out"],
    ["convert", "DIR", "o.safetensors", "--reverse"],
])
def test_a_folder_without_a_run(argv, tmp_path, capsys):
  argv = [str(tmp_path) if word == "DIR" else word for word in argv]
  assert status(commands.run, argv) == errors.EXIT_BAD_INPUT
  text = capsys.readouterr().err
  assert str(tmp_path) in text and "--workdir" not in text


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_list_of_commands(argv, capsys):
  assert status(commands.run, argv) == 0
  found = rows(capsys.readouterr().out, "commands")
  assert [row.split()[0] for row in found] == [
      *main.MODES, *MODULES.values()
  ]
  assert all(ROW.fullmatch(row) and len(row) <= 80 for row in found)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["smaple"], "did you mean 'sample'"),
        (["convrt", "a", "b"], "did you mean 'convert'"),
        (["--workdir=x"], "command: got '--workdir=x'"),
        (["train", "--mode=sample"], "--mode: got --mode=sample after train"),
        (["sample"], "--workdir: got None, expected a folder for mode sample"),
        (["sample", "--workdri=x"], "Did you mean: workdir"),
        (["train", "--workdir=x", "--out=y"],
         "--out: got mode train, expected mode compile"),
        (["table", "--workdir=x", "--config.seed=1"],
         "expected None for mode table"),
        (["table", "--workdir=/nowhere"], "/nowhere"),
        (["table", "/nowhere"], "/nowhere"),
        (["table"], "--workdir: got None, expected a folder for mode table"),
        (["eval", "runs/a"], "arguments: got 'runs/a', expected only flags"),
    ],
)
def test_bad_commands(argv, said, capsys):
  assert status(commands.run, argv) == errors.EXIT_BAD_INPUT
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and said in line


@pytest.mark.parametrize("mode", main.MODES)
def test_a_mode_is_main_with_that_mode(mode, monkeypatch, capsys):
  calls = []
  changed = main.MODES[mode]._replace(function=lambda *a: calls.append(a))
  monkeypatch.setitem(main.MODES, mode, changed)
  monkeypatch.setattr(main, "_connect", lambda *a: None)
  flags = ["--workdir=x"]
  if mode != "table":
    flags += ["--config=configs/digits.py", "--config.seed=7"]
  assert status(commands.run, [mode, *flags]) == 0
  assert status(main.main, ["main", f"--mode={mode}", *flags]) == 0
  short, long = calls
  assert short[1] == long[1] == "x"
  assert short[0] == long[0]
  assert mode == "table" or short[0].seed == 7


def test_mode_table_runs_by_its_short_name(tmp_path):
  (tmp_path / "results").mkdir()
  source = ROOT / "docs" / "results" / "digits.json"
  result = json.loads(source.read_text(encoding="utf-8"))
  (tmp_path / "results" / "mine.json").write_text(json.dumps(result))
  assert status(commands.run, ["table", f"--workdir={tmp_path}"]) == 0
  assert "`mine`" in (tmp_path / "results.md").read_text(encoding="utf-8")
  assert status(commands.run, ["table", str(tmp_path / "results")]) == 0


def test_help_of_main_lists_modes_and_flags(capsys):
  assert status(main.main, ["main", "--mode=sample", "--help"]) == 0
  text = capsys.readouterr().out
  assert check_help(text) == [
      "--config", "--config.section.key", "--workdir", "--mode", "--compare",
      "--topology", "--out", "--coordinator", "--num_processes", "--process_id",
  ]
  assert [row.split()[0] for row in rows(text, "modes")] == list(main.MODES)
  assert "bcm_jax/config/schema.py" in text
  assert status(commands.run, ["sample", "--help"]) == 0
  assert capsys.readouterr().out == text


@pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")
@pytest.mark.parametrize("module, name", MODULES.items())
def test_help_of_every_command(module, name, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["command", "--help"])
  with pytest.raises(SystemExit) as done:
    runpy.run_module(module, run_name="__main__", alter_sys=False)
  assert done.value.code == 0
  text = capsys.readouterr().out
  assert text.startswith(f"usage: bcm_jax {name} ")
  assert "--help" in check_help(text)
  assert status(commands.run, [name, "--help"]) == 0
  assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    "name", ["editing", "methods_digits", "soak", "step_cost", "step_time"]
)
def test_help_of_benchmarks(name, monkeypatch, capsys):
  monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
  monkeypatch.setattr(sys, "argv", ["command", "--help"])
  with pytest.raises(SystemExit) as done:
    runpy.run_path(f"{ROOT}/benchmarks/{name}.py", run_name="__main__")
  assert done.value.code == 0
  assert "--help" in check_help(capsys.readouterr().out)


@pytest.mark.parametrize(
    "module, argv, expected",
    [
        ("bcm_jax", [], 0),
        ("bcm_jax", ["train", "--workdri=x"], errors.EXIT_BAD_INPUT),
        ("bcm_jax.main", ["--help"], 0),
        ("bcm_jax.main", ["--mode=smaple"], errors.EXIT_BAD_INPUT),
    ],
)
def test_help_and_wrong_flags_wait_for_no_library(module, argv, expected):
  code = f"""
import runpy, sys
sys.argv[1:] = {argv}
try:
  runpy.run_module({module!r}, run_name="__main__")
finally:
  assert not {{"jax", "numpy", "tensorflow"}} & set(sys.modules)
"""
  done = subprocess.run(
      [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True,
      text=True,
  )
  assert done.returncode == expected, done.stderr


def test_an_error_is_one_line_whatever_the_names_in_it(capsys):
  with pytest.raises(SystemExit), cli.reporting():
    raise errors.UserError("a\nb\x1b[31m\udcff/日本.png: missing")
  said = capsys.readouterr().err
  assert said == "error: a\\nb\\x1b[31m\\udcff/日本.png: missing\n"


def test_split_overrides():
  file, overrides, rest = cli.split_overrides(
      ["--config=a.py", "--config.x.y=1", "--mode=eval", "--config.z", "2"]
  )
  assert (file, overrides, rest) == (
      "a.py", {"x.y": "1", "z": "2"}, ["--mode=eval"]
  )
  with pytest.raises(errors.UserError, match="needs a value"):
    cli.split_overrides(["--config.z"])


def test_parser_takes_the_config_that_its_command_reads():
  argv = ["--config=a.py", "--config.x.y=1", "--out=b"]
  for config in ("", "values", "file"):
    parser = cli.Parser("a.module", "Does it.", config=config)
    parser.add_argument("--out")
    if config == "file":
      found = vars(parser.parse_args(argv))
      assert found == {"out": "b", "config": "a.py", "overrides": {"x.y": "1"}}
    else:
      with pytest.raises(errors.UserError, match="--config=a.py"):
        parser.parse_args(argv)
    if config == "values":
      found = vars(parser.parse_args(argv[1:]))
      assert found == {"out": "b", "config": None, "overrides": {"x.y": "1"}}


@pytest.mark.parametrize("number, expected", [
    (errno.ENOSPC, errors.EXIT_MACHINE), (errno.EROFS, errors.EXIT_MACHINE),
    (errno.EIO, errors.EXIT_MACHINE), (errno.EDQUOT, errors.EXIT_MACHINE),
    (errno.EFBIG, errors.EXIT_MACHINE), (errno.EACCES, errors.EXIT_BAD_INPUT),
    (errno.ENOTDIR, errors.EXIT_BAD_INPUT),
    (errno.EISDIR, errors.EXIT_BAD_INPUT),
    (errno.ELOOP, errors.EXIT_BAD_INPUT),
    (errno.ENAMETOOLONG, errors.EXIT_BAD_INPUT),
])
def test_a_disk_or_place_that_fails_is_one_line(capsys, number, expected):
  def fail():
    with cli.reporting():
      raise OSError(number, "why", "a/file")

  assert status(fail) == expected
  text = capsys.readouterr().err
  assert text.startswith("error: a/file: why") and text.count("\n") == 1


@pytest.mark.parametrize("error", [
    OSError(errno.ENOENT, "why", "a/file"), OSError("why"), KeyError("x"),
    RecursionError("x"),
])
def test_what_may_be_a_bug_keeps_its_traceback(error):
  with pytest.raises(type(error)), cli.reporting():
    raise error


def test_ctrl_c_is_one_line(capsys, monkeypatch):
  ended = []
  monkeypatch.setattr(cli.os, "_exit", ended.append)
  with cli.reporting():
    raise KeyboardInterrupt
  assert ended == [errors.EXIT_INTERRUPTED]
  assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("argv", [
    ["--mode=sample"], ["--mode=eval"], ["--mode=invert"], ["--mode=edit"],
    ["--mode=inspect"], ["--config=configs/digits.py"],
])
@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(), lambda path: os.mkfifo(path),
    lambda path: path.write_text("[" * 100_000),
    lambda path: path.write_text("[]"), lambda path: path.write_text(""),
])
def test_a_damaged_config_of_a_run_is_one_line(tmp_path, capsys, argv, make):
  make(tmp_path / "config.json")
  command = ["bcm_jax", f"--workdir={tmp_path}", *argv]
  if argv == ["--mode=inspect"]:
    command.append(f"--compare={tmp_path}")
  assert status(main.main, command) == errors.EXIT_BAD_INPUT
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"error: {tmp_path}/config.json: got a damaged file")
