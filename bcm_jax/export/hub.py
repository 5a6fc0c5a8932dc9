"""Shares models on the Hugging Face Hub: bcm_jax hub VERB.

  pack WORKDIR FOLDER      writes the network of a run as a model folder
  unpack FOLDER WORKDIR    writes a model folder as a work directory
  push SOURCE OWNER/NAME   uploads a model folder or a work directory
  pull OWNER/NAME[@REVISION] FOLDER    downloads a model folder

A model folder contains model.safetensors, config.json, README.md (the model
card) and, after mode eval, result.json; no other file is uploaded or
downloaded (docs/hub.md). Exit status: 0 success, 65 invalid input or no
connection.
"""

from collections.abc import Iterator
import contextlib
import os
import re
import sys
import tempfile
from typing import Any

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.export import model_folder
from bcm_jax.utils import cli
from bcm_jax.utils import files

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def push(
    source: str, repository: str, private: bool = False, **options: Any
) -> str:
  """Uploads a model folder, or a work directory after packing it.

  Args:
    source: model folder, or work directory of a run.
    repository: OWNER/NAME; created if it does not exist.
    private: create a private repository; an error for an existing public one.
    **options: keyword arguments of model_folder.pack, for a work directory.

  Returns:
    A summary for the terminal, with the URL.

  Raises:
    UserError: as model_folder.pack and load; huggingface_hub is not installed;
      the hub returns an error or is not reachable.
  """
  _check_repository(repository)
  library = _library()
  with (
      _packed(source, options) as (folder, summary),
      _hub_errors(library, repository),
  ):
    hub = _open_hub(library)
    url = hub.create_repo(repository, private=private or None, exist_ok=True)
    if private and not hub.model_info(repository).private:
      raise errors.UserError(
          f"--private: got the public repository {repository}, expected a "
          "private or a new one; nothing was uploaded; make it private on the "
          "hub, or omit --private"
      )
    hub.upload_folder(
        repo_id=repository, folder_path=folder,
        allow_patterns=list(model_folder.FILES),
        # Deletes the result of earlier weights.
        delete_patterns=[model_folder.RESULT],
        commit_message=f"Weights and config, by bcm_jax {__version__}",
    )
  return f"{summary}uploaded: {url}"


@contextlib.contextmanager
def _packed(source: str, options: dict[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields (valid model folder, summary of packing it)."""
  options = {k: v for k, v in options.items() if v not in (None, {})}
  if runs.is_released(source):
    if options:
      raise errors.UserError(
          f"{', '.join(options)}: got a value for the model folder {source}, "
          "expected it only for a work directory; omit it, or push the work "
          "directory"
      )
    model_folder.check_links(source)
    model_folder.load(source)
    yield source, ""
    return
  with tempfile.TemporaryDirectory() as temporary:
    folder = os.path.join(temporary, "model")
    summary = model_folder.pack(source, folder, **options)
    # Without the last line, the path of the temporary folder.
    yield folder, summary.rpartition("\n")[0] + "\n"


def pull(place: str, out: str) -> str:
  """Downloads a model folder atomically.

  Args:
    place: OWNER/NAME, or OWNER/NAME@REVISION (a branch, tag or commit).
    out: folder to create; must be empty or absent.

  Returns:
    A summary for the terminal.

  Raises:
    UserError: as model_folder.load; huggingface_hub is not installed; the hub
      returns an error or is not reachable.
  """
  repository, _, revision = place.partition("@")
  _check_repository(repository)
  library = _library()
  with files.new_folder(out) as folder:
    # huggingface_hub also writes bookkeeping files into its local_dir.
    with tempfile.TemporaryDirectory(dir=folder) as download:
      with _hub_errors(library, place):
        _open_hub(library).snapshot_download(
            repository, revision=revision or None, local_dir=download,
            cache_dir=os.path.join(download, "cache"),
            allow_patterns=list(model_folder.FILES),
        )
      for name in model_folder.FILES:
        if os.path.isfile(os.path.join(download, name)):
          os.replace(os.path.join(download, name), os.path.join(folder, name))
    try:
      _, _, metadata = model_folder.load(folder)
    except errors.UserError as e:
      raise errors.UserError(str(e).replace(folder, place)) from e
  return (
      f"step {metadata['step']}, {metadata['average']}, on {metadata['data']}\n"
      f"written: {out}"
  )


def _check_repository(name: str) -> None:
  if not _REPOSITORY.fullmatch(name):
    raise errors.UserError(
        f"repository: got {name!r}, expected OWNER/NAME of letters, digits "
        "and - _ ."
    )


def _library() -> Any:
  """Imports huggingface_hub, an optional dependency."""
  return cli.optional("huggingface_hub.errors", "the hub", "hub")


def _open_hub(library: Any) -> Any:
  """Returns a client of HF_ENDPOINT with the library's default token."""
  return library.HfApi(
      endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None,
      library_name="bcm_jax", library_version=__version__,
  )


@contextlib.contextmanager
def _hub_errors(library: Any, place: str) -> Iterator[None]:
  """Converts errors of the hub and of the connection to UserError."""
  kinds = library.errors
  log_in = "log in: hf auth login, or set HF_TOKEN"
  try:
    yield
  except errors.UserError:
    raise
  except kinds.RepositoryNotFoundError as e:
    raise errors.UserError(
        f"{place}: got no such repository on the hub, expected one that you "
        f"can access; check the name, or {log_in}"
    ) from e
  except kinds.RevisionNotFoundError as e:
    raise errors.UserError(
        f"{place}: got no such revision, expected a branch, tag or commit of "
        "the repository"
    ) from e
  except _failures(kinds) as e:
    status = getattr(getattr(e, "response", None), "status_code", None)
    if status in (401, 403):
      raise errors.UserError(
          f"{place}: got status {status} from the hub ({_one_line(e)}), "
          f"expected permission; {log_in}, with a token of sufficient rights"
      ) from e
    raise errors.UserError(
        f"{place}: got a failure of the hub or of the connection "
        f"({_one_line(e)}); check the connection and try again"
    ) from e
  except ValueError as e:
    raise errors.UserError(
        f"{place}: got an invalid request: {_one_line(e)}; change it and try "
        "again"
    ) from e


def _failures(kinds: Any) -> tuple[type[BaseException], ...]:
  """Returns the exception types of hub and connection failures.

  Transport errors, the base classes of HfHubHTTPError, are not OSError in all
  versions of huggingface_hub; upload errors are RuntimeError.
  """
  xet = getattr(kinds, "XetDownloadError", OSError)
  return OSError, RuntimeError, xet, *kinds.HfHubHTTPError.__bases__


def _one_line(error: BaseException, limit: int = 200) -> str:
  """Returns the message of an error on one line of limited length."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= limit else text[:limit] + "..."


def _parser(verb: str | None) -> cli.Parser:
  """Returns the parser of a verb; None is that of all verbs, for --help."""
  parser = cli.Parser("hub", __doc__, config="values")
  source, target = _VERBS[verb][1:] if verb else ("FROM", "TO")
  add = parser.add_argument
  add("verb", choices=_VERBS, metavar="VERB", help=", ".join(_VERBS))
  add("source", metavar=source, help="folder, work directory or repository")
  add("target", metavar=target, help="folder, work directory or repository")
  if verb in (None, "pack", "push"):
    add("--average", metavar="NAME", help="pack, push: the moving average")
    add("--step", type=int, metavar="N",
        help="pack, push: step of the checkpoint")
    add("--dtype", metavar="NAME",
        help=f"pack, push: {', '.join(model_folder.DTYPES)}")
    add("--license", dest="license_id", metavar="ID",
        help="pack, push: license, such as apache-2.0")
  if verb in (None, "push"):
    add("--private", action="store_true",
        help="push: make the repository private")
  return parser


_VERBS = {
    "pack": (model_folder.pack, "WORKDIR", "FOLDER"),
    "unpack": (model_folder.unpack, "FOLDER", "WORKDIR"),
    "push": (push, "SOURCE", "OWNER/NAME"),
    "pull": (pull, "OWNER/NAME[@REVISION]", "FOLDER"),
}


def main(argv: list[str] | None = None) -> None:
  """Runs the command; exits with 65 and a one-line error on invalid input."""
  with cli.reporting():
    argv = sys.argv[1:] if argv is None else argv
    args = cli.split_overrides(argv)[2]
    words = [arg for arg in args if not arg.startswith("-")]
    verb = next((w for w in words if w in _VERBS), words[0] if words else None)
    if verb is None and not {"-h", "--help"} & set(args):
      raise errors.UserError(
          f"command: got none, expected one of {', '.join(_VERBS)}"
      )
    if verb not in (None, *_VERBS):
      raise errors.unknown_name("command", verb, _VERBS)
    flags = vars(_parser(verb).parse_args(argv))
    del flags["verb"], flags["config"]
    source, target = flags.pop("source"), flags.pop("target")
    if verb == "pull" and flags.pop("overrides"):
      raise errors.UserError(
          "--config.*: got overrides for pull, expected none; pass them to "
          "unpack"
      )
    options = {k: v for k, v in flags.items() if v is not None}
    print(_VERBS[verb][0](source, target, **options))


if __name__ == "__main__":
  main()
