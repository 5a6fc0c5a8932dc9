"""The model card of a released network: README.md with a YAML front matter.

Its numbers are from the result file; without one they are 'not measured'.
Fields of the front matter: https://huggingface.co/docs/hub/model-cards
"""

from collections.abc import Mapping
import json
from typing import Any

from bcm_jax.config import registry

# Entries of a result that are not rows of a table.
_NO_ROWS = ("plan", "std", "seeds")
_UNKNOWN = "not measured"

_LOADING = """## How to load it

```sh
pip install 'bcm_jax[hub]'
python -m bcm_jax.release.hub pull OWNER/NAME model
python -m bcm_jax.release.hub unpack model runs/model
python -m bcm_jax.main --workdir=runs/model --mode=sample
```

```python
import bcm_jax

model = bcm_jax.load("model")
```
"""


def text(
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    parameters: int,
    result: Mapping[str, Any] | None = None,
    license_id: str | None = None,
) -> str:
  """Returns the text of the card.

  Args:
    config: of the run, as in its config.json.
    metadata: of the weights, see `model_folder.write`.
    parameters: number of parameters of the network.
    result: of mode eval for these weights, or None.
    license_id: identifier of a license on the hub, such as 'apache-2.0'; None
      omits it.
  """
  parts = [
      _front_matter(config, license_id),
      f"# {config['method']['name']} on {metadata['data']}\n",
      _what(config, metadata) + "\n",
      _facts(config, metadata, parameters, result or {}),
      "## Numbers\n",
      _UNKNOWN + "\n" if result is None else _numbers(result),
      _LOADING,
  ]
  return "\n".join(parts)


def _front_matter(config, license_id: str | None) -> str:
  """Returns YAML; strings are quoted as in JSON, which is valid YAML."""
  fields = {
      "library_name": "bcm_jax",
      "license": license_id,
      "pipeline_tag": "unconditional-image-generation",
      "tags": ["bcm_jax", "jax", "flax", config["method"]["name"]],
  }
  lines = [
      f"{key}: {json.dumps(value)}"
      for key, value in fields.items() if value is not None
  ]
  return "\n".join(["---", *lines, "---", ""])


def _what(config, metadata) -> str:
  name = config["method"]["name"]
  method = registry.METHODS.get(name)
  kind = method.title if method else f"model of method {name}"
  article = "An" if kind[0] in "aeiou" else "A"
  height, width, channels = metadata["image_shape"]
  colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
  classes = config["model"].get("num_classes")
  given = f"of {classes} classes" if classes else "without classes"
  return (
      f"{article} {kind} of {height}x{width} {colours} images {given}, trained "
      f"with bcm_jax by method `{name}`."
  )


def _facts(config, metadata, parameters: int, result) -> str:
  training = result.get("training") or {}
  images, seconds = training.get("images"), training.get("seconds")
  method = config["method"]
  rows = {
      "data": metadata["data"],
      "network": f"`{config['model']['name']}`, {parameters:,} parameters, "
                 f"stored as {metadata['dtype']}",
      "noise levels": f"{method['sigma_min']:g} to {method['sigma_max']:g}",
      "training step": f"{metadata['step']:,}",
      "weights": f"`{metadata['average']}`",
      "images seen in training": f"{images:,}" if images else _UNKNOWN,
      "training time": f"{seconds:,.0f} s" if seconds else _UNKNOWN,
      "config": f"`{metadata['config_digest']}` (config.json)",
      "made with": f"bcm_jax {metadata['bcm_jax']}",
  }
  lines = [f"| {name} | {value} |" for name, value in rows.items()]
  return "\n".join(["| | |", "|---|---|", *lines, ""])


def _numbers(result: Mapping[str, Any]) -> str:
  """Formats the result of mode eval and its protocol."""
  parts = [
      "Of `result.json`, as mode eval wrote it; +- is the spread over seeds.\n"
  ]
  likelihood = result.get("likelihood")
  for title, columns in (
      ("Samples", result.get("samplers")),
      ("Inversion and reconstruction", result.get("inversion")),
      ("Likelihood", {"test images": likelihood} if likelihood else None),
  ):
    if columns:
      parts += [f"{title}:\n", _table(columns)]
  known = result.get("protocol", {})
  shown = {
      "samples": known.get("few_samples") or known.get("samples"),
      "seeds": ", ".join(map(str, known.get("seeds", []))),
      "features": known.get("features"),
      "reference": known.get("reference"),
      "hardware": known.get("hardware"),
      "commit": known.get("commit"),
  }
  facts = "; ".join(f"{k}: {v}" for k, v in shown.items() if v)
  return "\n".join([*parts, f"Protocol: {facts}.\n" if facts else ""])


def _table(columns: Mapping[str, Mapping[str, Any]]) -> str:
  """Formats one row per number and one column per sampler; +- over seeds."""
  names = dict.fromkeys(
      name for column in columns.values() for name, value in column.items()
      if name not in _NO_ROWS and type(value) in (int, float)
  )
  lines = [
      "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"
  ]
  for name in names:
    cells = [_cell(column, name) for column in columns.values()]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join([*lines, ""])


def _cell(column: Mapping[str, Any], name: str) -> str:
  value, std = column.get(name), column.get("std", {}).get(name)
  if value is None:
    return _UNKNOWN
  return f"{value:.4g}" + (f" +- {std:.2g}" if std is not None else "")
