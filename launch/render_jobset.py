#!/usr/bin/env python3
r"""Prints a JobSet for GKE; called by gke.sh.

    python launch/render_jobset.py --name=NAME --accelerator=v5e-16 \\
        --image=IMAGE --bucket=BUCKET --workdir=/mnt/bcm/runs/NAME \\
        -- --config=configs/cifar10.py
"""

import argparse
import json
import pathlib
import re
import string
import sys

import accelerators

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml.tmpl")
EXIT_BAD_INPUT = 65
# Pods are named NAME-slice-SLICE-HOST-xxxxx, which is limited to 63 characters.
MAX_NAME_LENGTH = 40
MOUNT_OPTIONS = ",".join((
    "implicit-dirs",
    # No caching, because hosts wait for files of other hosts.
    "metadata-cache:ttl-secs:0",
    # Checkpoints are committed by renaming their folder.
    "file-system:rename-dir-limit:200000",
))


def block(indent: int, *lines: str) -> str:
  """Joins lines for a place of the template that is already indented."""
  return ("\n" + " " * indent).join(lines)


def text(value: str) -> str:
  """Returns a YAML string: JSON, without its surrogate pairs."""
  return '"' + "".join(
      c if ord(c) > 0xFFFF else json.dumps(c)[1:-1] for c in value
  ) + '"'


def literal(value: str) -> str:
  """Escapes $: Kubernetes replaces $(NAME), and $$ by $."""
  return value.replace("$", "$$")


def values(args: argparse.Namespace) -> dict[str, str]:
  """Returns the value of every name in the template.

  Raises:
    ValueError: an invalid argument; the message gives the expected value.
  """
  tpu = accelerators.find(args.accelerator)
  if not tpu.gke:
    raise ValueError(
        f"--accelerator: got {args.accelerator}, which is not offered by GKE; "
        "see python launch/accelerators.py"
    )
  if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", args.name) or (
      len(args.name) > MAX_NAME_LENGTH
  ):
    raise ValueError(
        f"--name: got {args.name}, expected at most {MAX_NAME_LENGTH} "
        "lowercase letters, digits and dashes, beginning with a letter"
    )
  for name in ("slices", "max_restarts", "grace"):
    value, minimum = getattr(args, name), int(name == "slices")
    if value < minimum:
      flag = name.replace("_", "-")
      raise ValueError(f"--{flag}: got {value}, expected {minimum} or more")
  if args.bucket and not args.workdir.startswith(args.mount + "/"):
    raise ValueError(
        f"--workdir: got {args.workdir}, expected a folder under "
        f"--mount={args.mount}, the bucket; others are lost with the pods"
    )
  env = {"WORKDIR": args.workdir} | dict(
      pair.partition("=")[::2] for pair in args.env
  )
  return {
      "name": text(args.name),
      "namespace": text(args.namespace),
      "max_restarts": str(args.max_restarts),
      "slices": str(args.slices),
      "hosts": str(tpu.hosts),
      "chips_per_host": str(tpu.chips_per_host),
      "grace": str(args.grace),
      "gke_accelerator": tpu.gke,
      "topology": text(tpu.topology),
      "image": text(args.image),
      "args": ", ".join(text(literal(a)) for a in args.arguments),
      "env": ", ".join(
          f'{{"name": {text(k)}, "value": {text(literal(v))}}}'
          for k, v in env.items()
      ),
      **optional(args),
  }


def optional(args: argparse.Namespace) -> dict[str, str]:
  """Returns the values of names in the template that may be empty."""
  parts = dict.fromkeys((
      "queue", "service_account", "spot_selector", "spot_toleration",
      "fuse_annotation", "fuse_mount", "fuse_volume",
  ), "")
  if args.queue:
    label = f"kueue.x-k8s.io/queue-name: {text(args.queue)}"
    parts["queue"] = block(2, "labels:", f"  {label}")
  if args.service_account:
    account = text(args.service_account)
    parts["service_account"] = f"serviceAccountName: {account}"
  if args.spot:
    parts["spot_selector"] = 'cloud.google.com/gke-spot: "true"'
    parts["spot_toleration"] = block(
        12, "tolerations:", "- key: cloud.google.com/gke-spot",
        '  operator: "Equal"', '  value: "true"', "  effect: NoSchedule",
    )
  if args.bucket:
    parts["fuse_annotation"] = block(
        12, "annotations:", '  gke-gcsfuse/volumes: "true"'
    )
    parts["fuse_mount"] = block(
        14, "- name: bucket", f"  mountPath: {text(args.mount)}"
    )
    parts["fuse_volume"] = block(
        12, "- name: bucket", "  csi:",
        "    driver: gcsfuse.csi.storage.gke.io", "    volumeAttributes:",
        f"      bucketName: {text(args.bucket)}",
        f"      mountOptions: {text(MOUNT_OPTIONS)}",
    )
  else:
    parts["fuse_annotation"] = "annotations: {}"
  return parts


def render(args: argparse.Namespace) -> str:
  """Renders the JobSet as YAML; raises ValueError and KeyError as `values`."""
  filled = string.Template(TEMPLATE.read_text()).substitute(values(args))
  return "".join(
      line + "\n" for line in filled.splitlines() if line.strip()
  )


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the flags."""
  result = argparse.ArgumentParser(
      description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = result.add_argument
  add("--name", required=True, help="name of the JobSet")
  add("--accelerator", required=True, help="e.g. v5e-16; see accelerators.py")
  add("--image", required=True, help="see docker/Dockerfile")
  add("--workdir", required=True, help="on a file system that all pods share")
  add("--slices", type=int, default=1)
  add("--namespace", default="default")
  add("--bucket", default="", help="bucket to mount on --mount")
  add("--mount", default="/mnt/bcm")
  add("--service-account", default="", help="with access to the bucket")
  add("--queue", default="", help="LocalQueue of Kueue")
  add("--spot", action="store_true")
  add("--max-restarts", type=int, default=5, help="restarts after crashes")
  add("--grace", type=int, default=120, help="seconds from SIGTERM to SIGKILL")
  add("--env", action="append", default=[], metavar="NAME=VALUE")
  add("arguments", nargs="+", help="arguments of bcm_jax.main, after --")
  result.error = lambda message: bad_input(f"{message}; see --help")
  return result


def bad_input(message: str) -> None:
  """Prints one line and exits with 65."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(EXIT_BAD_INPUT)


def main(argv: list[str]) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  try:
    print(render(args), end="")
  except (KeyError, ValueError) as e:
    bad_input(e.args[0])


if __name__ == "__main__":
  main(sys.argv[1:])
