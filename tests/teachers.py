"""Teachers that shipped configs name, as if they had been trained."""

import contextlib
from unittest import mock

from bcm_jax.config import resolve

# Where shipped students look for their teacher.
WORKDIR = "runs/edm"
# Students whose teacher is not the default variant of its file.
_VARIANTS = {
    "cifar10_cd.py": "uncond_ve", "cifar10_dmd.py:dmd_uncond": "uncond",
}


@contextlib.contextmanager
def there(student: str):
  """Within it the teacher of a shipped config has a config in WORKDIR."""
  find = resolve.of_run
  file = student.partition("_")[0] + "_edm.py"
  if student in _VARIANTS:
    file += ":" + _VARIANTS[student]

  def of_run(workdir, overrides=None):
    if workdir == WORKDIR:
      return resolve.resolve(resolve.read_file(file), overrides)
    return find(workdir, overrides)

  with mock.patch.object(resolve, "of_run", of_run):
    yield
