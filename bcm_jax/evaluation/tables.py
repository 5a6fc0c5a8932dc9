"""Renders tables of results: mode table.

Results are those of runs (WORKDIR/eval), or files of mode eval in a folder,
whose names are those of the runs. Results of different protocols are never in
one table. Methods without a result are marked 'not run'.
"""

from collections.abc import Iterable, Mapping, Sequence
import os
import pathlib
from typing import Any

from bcm_jax import errors
from bcm_jax.evaluation import published
from bcm_jax.utils import files

Result = Mapping[str, Any]

NOT_RUN = "not run"
_TITLES = {
    "digits": "Handwritten digits, 8x8",
    "cifar10": "CIFAR-10",
    "cifar10_jpeg": "CIFAR-10 (JPEG), 32x32",
    "imagenet64": "ImageNet, 64x64",
}
_NOTES = {
    "cifar10_jpeg": (
        "The images are JPEG files of quality about 75: real photographs, but "
        "lossy. A distance to them compares methods with one another, not "
        "with published CIFAR-10 numbers."
    ),
}
# Metric -> (column head, format); other metrics keep their name.
_COLUMNS = {
    "FID": ("FID", "{:.2f}"), "sFID": ("sFID", "{:.2f}"),
    "KID": ("KID", "{:.4f}"), "IS": ("IS", "{:.2f}"),
    "precision": ("P", "{:.3f}"), "recall": ("R", "{:.3f}"),
    "density": ("density", "{:.3f}"), "coverage": ("coverage", "{:.3f}"),
    "class_accuracy": ("class accuracy", "{:.1%}"),
    "worst_class_accuracy": ("worst class", "{:.0%}"),
    "mse": ("MSE", "{:.4f}"), "psnr": ("PSNR", "{:.1f}"),
    "ssim": ("SSIM", "{:.3f}"), "lpips": ("LPIPS", "{:.3f}"),
}
_INVERSION = ("mse", "psnr", "ssim", "lpips")


def read(place: str) -> dict[str, Result]:
  """Reads results by name; ignores other JSON files.

  Args:
    place: a result file, a folder of them, a work directory, or a folder with
      work directories.

  Raises:
    UserError: no results, or a file that is not valid JSON.
  """
  path, found = pathlib.Path(place), {}
  runs = sorted(path.glob("eval")) or sorted(path.glob("*/eval"))
  if not path.joinpath("eval").is_dir():
    found = _results([path] if path.is_file() else path.glob("*.json"))
  for folder in runs:
    results = _results(folder.glob("*.json"))
    run = folder.resolve().parent.name
    found |= {
        run if len(results) == 1 else f"{run}/{name}": result
        for name, result in results.items()
    }
  if not found:
    raise errors.UserError(
        f"{place}: has no results, expected a work directory after mode eval, "
        "or its result files (.json)"
    )
  return found


def _results(paths: Iterable[pathlib.Path]) -> dict[str, Result]:
  """Returns the results among JSON files, by the name of the file."""
  results = {}
  for path in sorted(paths):
    try:
      content = files.read_json(path)
    except ValueError as e:
      raise errors.UserError(
          f"{path}: not valid JSON ({e}); write it again with mode eval"
      ) from e
    if isinstance(content, dict) and "samplers" in content:
      # A key of results of the first version.
      if "compared_one_by_one" in content.get("protocol", {}):
        raise errors.outdated(path)
      results[path.stem] = content
  return results


def _cell(metric: str, value: float | None, std: float | None = None) -> str:
  if value is None:
    return ""
  form = _COLUMNS.get(metric, ("", "{:.3g}"))[1]
  spread = "" if std is None else f" ± {form.format(std)}"
  return form.format(value) + spread


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Formats a Markdown table."""
  head = list(head)
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  lines += ["| " + " | ".join(row) + " |" for row in rows]
  return "\n".join(lines)


def _metrics(groups: Iterable[Mapping[str, Any]], order) -> list[str]:
  """Metrics of any group: Frechet distances first, then in this order."""
  metrics = {m for g in groups for m in g}
  distances = sorted(m for m in metrics if m.startswith("FD ("))
  return distances + [m for m in order if m in metrics]


def samples_table(data: str, results: Mapping[str, Result]) -> str:
  """Returns a table of all samplers of all runs on a dataset."""
  rows = [
      (name, sampler, r)
      for name, result in results.items()
      for sampler, r in result["samplers"].items()
  ]
  aims = published.AIMS.get(data, {})
  order = [m for m in _COLUMNS if m not in _INVERSION]
  metrics = _metrics([r for *_, r in rows], order)
  lines = [
      [f"`{name}`", sampler.rpartition("_nfe")[0], str(r["nfe"]),
       *(_cell(m, r.get(m), r["std"].get(m)) for m in metrics)]
      for name, sampler, r in rows
  ]
  lines += [
      ["target", "", str(nfe), *(_cell(m, aim.get(m)) for m in metrics)]
      for nfe, aim in aims.items()
  ]
  heads = [_COLUMNS.get(m, (m, ""))[0] for m in metrics]
  return markdown(["run", "sampler", "NFE", *heads], lines)


def inversion_table(data: str, results: Mapping[str, Result]) -> str:
  """Returns a table of reconstruction errors, '' if none were measured."""
  rows = [
      (name, r) for name, result in results.items()
      for r in result["inversion"].values()
  ]
  if not rows:
    return ""
  metrics = _metrics([r for _, r in rows], _INVERSION)
  lines = [
      [f"`{name}`", r.get("solver", "by the network"), str(r["nfe"]),
       f"{r['noise']:g}", *(_cell(m, r.get(m)) for m in metrics)]
      for name, r in rows
  ]
  lines += [
      ["target", "", str(nfe), "", *(_cell(m, aim.get(m)) for m in metrics)]
      for nfe, aim in published.AIMS.get(data, {}).items()
  ]
  heads = [_COLUMNS[m][0] for m in metrics]
  return markdown(["run", "inversion", "NFE", "noise e", *heads], lines)


def published_table(data: str, results: Mapping[str, Result]) -> str:
  """Returns a table of published FIDs and ours of the same method and NFE.

  Empty ('') if there are no published FIDs for the dataset.
  """
  rows = [row for row in published.ROWS if row.data == data and row.verified]
  if not rows:
    return ""
  lines = [
      [row.method, str(row.nfe), f"{row.numbers['FID']:.2f}", row.source,
       _ours(row, results)]
      for row in rows
  ]
  return markdown(["method", "NFE", "published FID", "source", "ours"], lines)


def _ours(row: published.Published, results: Mapping[str, Result]) -> str:
  """Our FIDs of a row's method and NFE, by the full protocol only."""
  cells = [
      f"{_cell('FID', r['FID'], r['std'].get('FID'))} (`{name}`)"
      for name, result in results.items()
      if result["protocol"]["method"] == row.ours
      and "few_samples" not in result["protocol"]
      for r in result["samplers"].values()
      if r["nfe"] == row.nfe and r.get("FID") is not None
  ]
  return "; ".join(cells) or NOT_RUN


def _count(images: int | None) -> str:
  """Formats a number of images; None if the reference does not record it."""
  return "an unknown number of" if images is None else f"{images:,}"


def _protocol_line(name: str, result: Result) -> str:
  """One list item with the evaluation protocol of a run."""
  p = result["protocol"]
  seeds = ", ".join(map(str, p["seeds"]))
  origin = [f"step {result['step']}", f"average {result['average']}"]
  facts = [
      *(origin if result["step"] is not None else [result["average"]]),
      f"{p['samples']:,} samples per seed (seeds {seeds})",
      f"features {p['features']} ({p['features_digest']})",
      f"reference {_count(p['reference_images'])} images "
      f"({p['reference_digest']})",
      f"{p['num_real_for_prdc']:,} real images for precision and recall (k = "
      f"{p['neighbors_k']})",
      f"config {p['config_digest']}", f"commit {p['commit']}", p["hardware"],
  ]
  if "classifier_test_accuracy" in result:
    facts.append(f"classifier: {result['classifier_test_accuracy']:.2%} "
                 "accuracy on real test images")
  first = next(iter(result["samplers"].values()), {})
  if "median_sample_to_train" in first:
    facts.append(
        "median distance to the nearest training image, pixels in 0..255: "
        f"{first['median_sample_to_train']:.0f} from a sample, "
        f"{first['median_test_to_train']:.0f} from a real test image"
    )
  few = p.get("few_samples")
  mark = f" **Few samples: {few}.**" if few else ""
  return f"* `{name}`: {'; '.join(facts)}.{mark}"


_HEAD = """# Results

Rendered by `bcm_jax table --workdir=docs` from the JSON files in
[results](results), which record the complete protocol;
[evaluation.md](evaluation.md) defines the metrics. Methods without a result
file are marked 'not run'; results of different protocols are in different
tables. Every run is one training run (n = 1); numbers
without ± are of one sampling seed (n = 1), others mean ± standard deviation
over sampling seeds.
"""


def render(results: Mapping[str, Result]) -> str:
  """Renders the page as Markdown."""
  sets = {r["protocol"]["data"] for r in results.values()}
  sets |= {row.data for row in published.ROWS}
  order = [*_TITLES, *sorted(sets - _TITLES.keys())]
  parts = [_HEAD]
  for data in (d for d in order if d in sets):
    runs = {
        name: r for name, r in results.items() if r["protocol"]["data"] == data
    }
    parts.append(f"## {_TITLES.get(data, data)}\n")
    if data in _NOTES:
      parts.append(_NOTES[data] + "\n")
    groups: dict[tuple[Any, ...], dict[str, Result]] = {}
    for name, result in runs.items():
      groups.setdefault(_comparable(result), {})[name] = result
    for protocol, group in groups.items():
      if len(groups) > 1:
        parts.append(f"### {_title(protocol)}\n")
      tables = samples_table(data, group), inversion_table(data, group)
      parts += [table + "\n" for table in tables if table]
    published_rows = published_table(data, runs)
    if published_rows:
      parts.append(published_rows + "\n")
    if runs:
      items = [_protocol_line(*item) for item in runs.items()]
      parts.append("\n".join(items) + "\n")
  return "\n".join(parts)


_COMPARED = (
    "features", "features_digest", "reference_digest", "samples",
    "num_real_for_prdc", "neighbors_k",
)


def _comparable(result: Result) -> tuple[Any, ...]:
  """Returns the facts that are equal for results in one table."""
  return tuple(result["protocol"][key] for key in _COMPARED)


def _title(protocol: tuple[Any, ...]) -> str:
  """Returns the heading of the tables of a protocol."""
  features, digest, reference, samples, real, k = protocol
  return (
      f"Features {features} ({digest}), reference {reference}, {samples:,} "
      f"samples, {real:,} real images (k = {k})"
  )


def run(folder: str | None, places: Sequence[str] = ()) -> str:
  """Mode table: renders results as a page.

  Args:
    folder: folder of the page, results.md; None prints it.
    places: see `read`; if empty, folder/results or else `folder`.

  Returns:
    The page.
  """
  results: dict[str, Result] = {}
  if not places:
    inside = os.path.join(folder, "results")
    places = [inside if os.path.isdir(inside) else folder]
  for place in places:
    for name, result in read(place).items():
      results[f"{place}/{name}" if name in results else name] = result
  page = render(results)
  if folder is None:
    print(page)
    return page
  path = os.path.join(folder, "results.md")
  files.write_bytes(path, page.encode())
  print(f"written: {path}")
  return page
