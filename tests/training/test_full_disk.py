"""Metrics on a disk that is full: late, not lost, and no end of a run."""

import json

from bcm_jax.training import metric_writers


def test_a_full_disk_delays_lines_and_loses_none(tmp_path, caplog):
  writer = metric_writers.JsonlWriter(str(tmp_path))
  writer.write_scalars(1, {"loss": 1.0})
  whole, written = writer._file, []

  class Full:
    """Takes half a line, then nothing."""

    closed = False

    def write(self, text):
      if written:
        raise OSError(28, "No space left on device")
      written.append(text)
      return whole.write(text[: len(text) // 2])

    def fileno(self):
      raise OSError(28, "No space left on device")

  writer._file = Full()
  for step in (2, 3):
    writer.write_scalars(step, {"loss": 1.0})
    writer.flush()
  assert len(caplog.records) == 1 and "No space left" in caplog.text
  writer._file = whole
  writer.write_scalars(4, {"loss": 1.0})
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_tensorboard_may_fail_and_the_run_goes_on(caplog):
  class Failing:
    calls = 0

    def write_scalars(self, step, scalars):
      self.calls += 1
      raise OSError(28, "No space left on device")

  failing = Failing()
  board = metric_writers._HostValues(failing)
  for step in range(3):
    board.write_scalars(step, {"loss": 1.0})
  board.flush()
  board.close()
  assert failing.calls == 1 and caplog.text.count("logging is disabled") == 1
