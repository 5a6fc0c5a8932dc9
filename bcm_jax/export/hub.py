"""Shares models on the Hugging Face Hub: python -m bcm_jax.release.hub VERB.

  pack WORKDIR FOLDER      writes a run's network as a folder to share
  unpack FOLDER WORKDIR    makes it a work directory, for every mode
  push SOURCE OWNER/NAME   uploads a folder or a work directory
  pull OWNER/NAME[@REVISION] FOLDER    downloads a folder

A folder holds model.safetensors, config.json, README.md (the model card) and,
if the weights were evaluated, result.json; no other file is shared
(docs/hub.md). Exit status: 0 done, 65 bad input or no connection.
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
  """Sends a folder, or a work directory packed on the way, to the hub.

  Args:
    source: a folder that pack made, or the work directory of a run.
    repository: OWNER/NAME; made if it is not there.
    private: make it private; one that is public already is refused.
    options: keywords of `pack`, for a work directory.

  Returns:
    Where it is now, for a terminal.

  Raises:
    UserError: as `pack` and `load`; huggingface_hub is not installed; the hub
      refuses or cannot be reached.
  """
  _check_repository(repository)
  library = _library()
  with _packed(source, options) as (folder, said), _explained(
      library, repository
  ):
    hub = _open_hub(library)
    url = hub.create_repo(repository, private=private or None, exist_ok=True)
    if private and not hub.model_info(repository).private:
      raise errors.UserError(
          f"{repository} is there already and public; nothing was sent. Make "
          "it private on the hub, or leave --private out"
      )
    hub.upload_folder(
        repo_id=repository, folder_path=folder,
        allow_patterns=list(model_folder.FILES),
        # Results of older weights must not remain.
        delete_patterns=[model_folder.RESULT],
        commit_message=f"Weights and config, by bcm_jax {__version__}",
    )
  return f"{said}sent: {url}"


@contextlib.contextmanager
def _packed(source: str, options: dict[str, Any]) -> Iterator[tuple[str, str]]:
  """A whole folder to send, and what packing it said."""
  asked = {k: v for k, v in options.items() if v not in (None, {})}
  if runs.is_released(source):
    if asked:
      raise errors.UserError(
          f"{source} is packed already, and {', '.join(asked)} would say how to"
          " pack a work directory; leave it out, or give the work directory"
      )
    model_folder.load(source)
    yield source, ""
    return
  with tempfile.TemporaryDirectory() as made:
    folder = os.path.join(made, "model")
    said = model_folder.pack(source, folder, **asked)
    yield folder, said.rpartition("\n")[0] + "\n"


def pull(place: str, out: str) -> str:
  """Downloads a network from the hub to a folder, atomically.

  Args:
    place: OWNER/NAME, or OWNER/NAME@REVISION (a branch, tag or commit).
    out: folder to make; must not hold anything yet.

  Returns:
    What was brought, for a terminal.

  Raises:
    UserError: as `load`; huggingface_hub is not installed; the hub refuses or
      cannot be reached.
  """
  repository, _, revision = place.partition("@")
  _check_repository(repository)
  library = _library()
  with files.new_folder(out) as made:
    # The library leaves its own files next to the downloaded ones.
    with tempfile.TemporaryDirectory(dir=made) as brought:
      with _explained(library, place):
        _open_hub(library).snapshot_download(
            repository, revision=revision or None, local_dir=brought,
            cache_dir=os.path.join(brought, "cache"),
            allow_patterns=list(model_folder.FILES),
        )
      for name in model_folder.FILES:
        if os.path.isfile(os.path.join(brought, name)):
          os.replace(os.path.join(brought, name), os.path.join(made, name))
    try:
      _, _, metadata = model_folder.load(made)
    except errors.UserError as e:
      raise errors.UserError(str(e).replace(made, place)) from e
  return (
      f"step {metadata['step']}, {metadata['average']}, on {metadata['data']}\n"
      f"written: {out}"
  )


def _check_repository(name: str) -> None:
  if not _REPOSITORY.fullmatch(name):
    raise errors.UserError(
        f"{name!r} is no repository; expected OWNER/NAME of letters, digits "
        "and - _ ."
    )


def _library() -> Any:
  """huggingface_hub, which nothing else needs."""
  return cli.optional("huggingface_hub.errors", "the hub", "hub")


def _open_hub(library: Any) -> Any:
  """The hub of HF_ENDPOINT, with the token that the library finds."""
  return library.HfApi(
      endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None,
      library_name="bcm_jax", library_version=__version__,
  )


@contextlib.contextmanager
def _explained(library: Any, place: str) -> Iterator[None]:
  """Turns what the hub and the way to it refuse into one line."""
  kinds = library.errors
  log_in = "log in: hf auth login, or set HF_TOKEN"
  try:
    yield
  except errors.UserError:
    raise
  except kinds.RepositoryNotFoundError as e:
    raise errors.UserError(
        f"{place}: the hub shows no such repository to you; check the name, and"
        f" if it is private or yours to write to, {log_in}"
    ) from e
  except kinds.RevisionNotFoundError as e:
    raise errors.UserError(
        f"{place}: the repository has no such revision; give a branch, tag or "
        "commit of it"
    ) from e
  except _failures(kinds) as e:
    status = getattr(getattr(e, "response", None), "status_code", None)
    if status in (401, 403):
      raise errors.UserError(
          f"{place}: the hub refuses ({status}): {_one_line(e)}; {log_in}, "
          "with a token that may do this"
      ) from e
    raise errors.UserError(
        f"{place}: the hub failed or cannot be reached ({_one_line(e)}); check "
        "the connection and try again"
    ) from e
  except ValueError as e:
    raise errors.UserError(
        f"{place}: the hub does not take this: {_one_line(e)}; change it and "
        "try again"
    ) from e


def _failures(kinds: Any) -> tuple[type[BaseException], ...]:
  """Returns the exceptions of the library for hub and network failures.

  Errors of the transport, the bases of its own, are no OSError in every
  version; those of uploads are RuntimeErrors.
  """
  xet = getattr(kinds, "XetDownloadError", OSError)
  return OSError, RuntimeError, xet, *kinds.HfHubHTTPError.__bases__


def _one_line(error: BaseException, limit: int = 200) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= limit else text[:limit] + "..."


def _parser(verb: str | None) -> cli.Parser:
  """The flags of a verb; None: of all, for --help."""
  parser = cli.Parser("bcm_jax.release.hub", __doc__, config="values")
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
  """Entry point; exits with 65 and one line on bad input."""
  with cli.reporting():
    argv = sys.argv[1:] if argv is None else argv
    rest = cli.split_overrides(argv)[2]
    words = [word for word in rest if not word.startswith("-")]
    verb = next((w for w in words if w in _VERBS), words[0] if words else None)
    if verb is None and not {"-h", "--help"} & set(rest):
      raise errors.UserError(
          f"the command is missing; give one of {', '.join(_VERBS)}"
      )
    if verb not in (None, *_VERBS):
      raise errors.unknown_name("command", verb, _VERBS)
    flags = vars(_parser(verb).parse_args(argv))
    del flags["verb"], flags["config"]
    source, target = flags.pop("source"), flags.pop("target")
    if verb == "pull" and flags.pop("overrides"):
      raise errors.UserError(
          "pull downloads the config as it is; give --config.* to unpack"
      )
    given = {k: v for k, v in flags.items() if v is not None}
    print(_VERBS[verb][0](source, target, **given))


if __name__ == "__main__":
  main()
