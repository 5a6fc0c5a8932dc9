"""The JobSet, for three shapes: parsed, checked and held against a schema."""

import copy
import json
import pathlib
import re

import accelerators
import jsonschema
import pytest
import render_jobset
import yaml

from tests.launch import harness

SCHEMA = json.loads(
    (pathlib.Path(__file__).parent / "jobset_schema.json").read_text()
)
# Accelerator, slices: hosts, chips a host.
SHAPES = {
    ("v5e-8", 1): (1, 8),
    ("v4-32", 1): (4, 4),
    ("v6e-64", 2): (16, 4),
}


def arguments(accelerator="v5e-16", slices=1, *more) -> list[str]:
  return [
      "--name=a-run", f"--accelerator={accelerator}", f"--slices={slices}",
      "--image=an-image", "--bucket=a-bucket",
      "--workdir=/mnt/bcm/runs/a-run", *more,
      "--", "--config=configs/cifar10.py", "--config.x=$(HOME) 'a b'",
  ]


def rendered(*args) -> dict:
  text = render_jobset.render(render_jobset.parser().parse_args([*args]))
  return yaml.safe_load(text)


def job_of(jobset) -> dict:
  return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(jobset) -> dict:
  return job_of(jobset)["template"]["spec"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
  hosts, chips = SHAPES[shape]
  jobset = rendered(*arguments(*shape))
  jsonschema.validate(jobset, SCHEMA)
  (replicated,) = jobset["spec"]["replicatedJobs"]
  assert replicated["replicas"] == shape[1]
  job, pod = job_of(jobset), pod_of(jobset)
  assert job["parallelism"] == job["completions"] == hosts
  tpu = accelerators.find(shape[0])
  assert (tpu.hosts, tpu.chips_per_host) == (hosts, chips)
  limits = pod["containers"][0]["resources"]["limits"]
  assert limits == {"google.com/tpu": chips}
  assert pod["nodeSelector"] == {
      "cloud.google.com/gke-tpu-accelerator": tpu.gke,
      "cloud.google.com/gke-tpu-topology": tpu.topology,
  }
  assert pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("shape", SHAPES)
def test_text_is_the_golden(shape):
  accelerator, slices = shape
  args = render_jobset.parser().parse_args(arguments(accelerator, slices))
  name = f"jobset_{accelerator}_{slices}.yaml"
  harness.check_golden(name, render_jobset.render(args))


def test_command_passes_signals_and_arguments():
  (container,) = pod_of(rendered(*arguments()))["containers"]
  assert container["command"] == ["launch/run.sh"]
  # Kubernetes turns $$( into $(, and $(HOME) it would replace.
  assert container["args"] == [
      "--config=configs/cifar10.py", "--config.x=$$(HOME) 'a b'"
  ]
  assert container["env"] == [
      {"name": "WORKDIR", "value": "/mnt/bcm/runs/a-run"}
  ]


def expanded(text: str) -> str:
  """What Kubernetes makes of a value, if no variable is set."""
  out, i = "", 0
  while i < len(text):
    if text[i : i + 2] == "$$":
      i += 1
    elif text[i : i + 2] == "$(" and ")" in text[i:]:
      i = text.index(")", i) + 1
      out += "REPLACED"
      continue
    out += text[i]
    i += 1
  return out


@pytest.mark.parametrize("value", [
    "it's \"quoted\"", "a: b, c: [d] # no comment", "line\nline\r\n\ttab",
    "$HOME ${HOME} $(HOME) $$(HOME) $$$(HOME) $", "yes", "no", "null", "1e3",
    "~", "- x", "{{ x }} %s \\n", "\u2028\x85\x7f\x00é\N{SNOWMAN}",
    "\U0001F600", "*alias &anchor !tag | >", "", " ", "@at `tick`",
])
def test_any_text_is_quoted(value):
  jobset = rendered(
      *arguments("v5e-16", 1, f"--env=XLA_FLAGS={value}", f"--image={value}",
                 f"--namespace={value}", f"--queue=q{value}",
                 f"--service-account=s{value}"),
      value,
  )
  pod = pod_of(jobset)
  (container,) = pod["containers"]
  assert expanded(container["args"][-1]) == value
  assert expanded(container["env"][-1]["value"]) == value
  assert container["image"] == value
  assert jobset["metadata"]["namespace"] == value
  (queue,) = jobset["metadata"]["labels"].values()
  assert queue == f"q{value}"
  assert pod["serviceAccountName"] == f"s{value}"


@pytest.mark.parametrize("name", ["true", "null", "no", "y", "on"])
def test_names_that_yaml_reads_as_values(name):
  args = [a for a in arguments() if not a.startswith("--name")]
  assert rendered(f"--name={name}", *args)["metadata"]["name"] == name


# Messages of Kubernetes' job controller, which JobSet compares with patterns.
MESSAGES = {
    "Container main for pod ns/a-run-slice-0-1-x failed with exit code 65 "
    "matching FailJob rule at index 0": "FailJobSet",
    "Container main for pod ns/a-run-slice-0-1-x failed with exit code 75 "
    "matching FailJob rule at index 1": "RestartJobSetAndIgnoreMaxRestarts",
    "Pod ns/a-run-slice-0-1-x has condition DisruptionTarget matching FailJob "
    "rule at index 2": "RestartJobSetAndIgnoreMaxRestarts",
    "Container main for pod ns/a-65-slice-0-1-x failed with exit code 64 "
    "matching FailJob rule at index 9": None,
    "Container main for pod ns/a-65-slice-0-1-x failed with exit code 134 "
    "matching FailJob rule at index 9": None,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_exit_codes_lead_to_the_actions_of_the_contract(message):
  policy = rendered(*arguments())["spec"]["failurePolicy"]
  actions = [
      rule["action"] for rule in policy["rules"]
      if any(
          re.fullmatch(p, message) for p in rule["onJobFailureMessagePatterns"]
      )
  ]
  assert actions[:1] == ([MESSAGES[message]] if MESSAGES[message] else [])
  for rule in policy["rules"]:
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  codes = [
      rule["onExitCodes"]["values"]
      for rule in job_of(rendered(*arguments()))["podFailurePolicy"]["rules"]
      if "onExitCodes" in rule
  ]
  assert codes == [[65], [75]]


def test_optional_parts():
  plain = rendered(*arguments())
  assert "labels" not in plain["metadata"]
  assert "tolerations" not in pod_of(plain)
  full = rendered(*arguments(
      "v5e-16", 1, "--queue=a-queue", "--spot", "--service-account=an-account",
      "--env=XLA_FLAGS=--a=b", "--grace=300", "--max-restarts=9",
      "--namespace=ours",
  ))
  jsonschema.validate(full, SCHEMA)
  assert full["metadata"]["labels"] == {
      "kueue.x-k8s.io/queue-name": "a-queue"
  }
  pod = pod_of(full)
  assert pod["serviceAccountName"] == "an-account"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
  assert pod["terminationGracePeriodSeconds"] == 300
  assert full["spec"]["failurePolicy"]["maxRestarts"] == 9
  assert {"name": "XLA_FLAGS", "value": "--a=b"} in (
      pod["containers"][0]["env"]
  )


def test_bucket_is_mounted_where_the_work_directory_is():
  jobset = rendered(*arguments())
  template = job_of(jobset)["template"]
  assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  (volume,) = (v for v in template["spec"]["volumes"] if "csi" in v)
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "a-bucket"
  mounts = template["spec"]["containers"][0]["volumeMounts"]
  assert {"name": volume["name"], "mountPath": "/mnt/bcm"} in mounts


def test_without_a_bucket_there_is_no_volume():
  jobset = rendered(*arguments("v5e-16", 1, "--bucket="))
  jsonschema.validate(jobset, SCHEMA)
  assert [v["name"] for v in pod_of(jobset)["volumes"]] == ["shared-memory"]


@pytest.mark.slow
def test_every_slice_of_gke_renders():
  for tpu in accelerators.SLICES:
    if tpu.gke:
      jsonschema.validate(rendered(*arguments(tpu.name)), SCHEMA)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("spec", {"replicatedJob": []}),
        ("spec/failurePolicy", {"maxRestart": 1}),
        ("spec/failurePolicy", {"maxRestarts": "5"}),
        ("spec/failurePolicy/rules/0", {"action": "Fail"}),
        ("spec/replicatedJobs/0", {"replicas": 0}),
        ("spec/replicatedJobs/0/template/spec", {"parallelism": "4"}),
        ("spec/replicatedJobs/0/template/spec", {"backoffLimits": 0}),
        ("spec/replicatedJobs/0/template/spec/template/spec",
         {"restartPolicy": "Always"}),
        ("spec/replicatedJobs/0/template/spec/template/spec",
         {"terminationGracePeriod": 9}),
        ("spec/replicatedJobs/0/template/spec/template/spec/containers/0/"
         "resources/limits", {"google.com/tpus": 4}),
    ],
)
def test_the_schema_catches_typos(path, change):
  jobset = copy.deepcopy(rendered(*arguments()))
  node = jobset
  for part in path.split("/"):
    node = node[int(part) if part.isdigit() else part]
  node.update(change)
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(jobset, SCHEMA)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--slices=0"], "--slices: got 0"),
        (["--name=" + "a" * 41], "at most 40"),
        (["--workdir=/elsewhere"], "lost with the pods"),
        (["--accelerator=v2-8"], "not offered by GKE"),
        (["--slice=2"], "unrecognized arguments: --slice=2"),
    ],
)
def test_wrong_input_is_one_line_and_65(capsys, more, message):
  args = arguments("v5e-16", 1, *more)
  with pytest.raises(SystemExit) as caught:
    render_jobset.main(args)
  assert caught.value.code == 65
  error = capsys.readouterr().err
  assert message in error
  assert len(error.splitlines()) == 1
