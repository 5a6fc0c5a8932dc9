"""Web interface: generates images and edits real ones.

  bcm_jax studio                      # the digits network of this package
  bcm_jax studio runs/mine --port=7861

Needs the extra `studio`: pip install 'bcm_jax[studio]'. Listens on 127.0.0.1
only, unless --host is given.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

from bcm_jax import errors
from bcm_jax.editing import pretrained
from bcm_jax.editing import tasks
from bcm_jax.studio import actions
from bcm_jax.utils import cli

_TITLE = "bcm_jax studio"
# Largest number of classes for which class prediction is fast enough.
_MAX_CLASSES_TO_PREDICT = 100


def _gradio() -> Any:
  """Imports gradio, which takes seconds."""
  return cli.optional("gradio", "the studio", "studio")


def _as_gradio_error(function: Callable) -> Callable:
  """Wraps a callback to show UserErrors as messages in the browser."""
  gr = _gradio()

  @functools.wraps(function)
  def run(*args):
    try:
      return function(*args)
    except errors.UserError as e:
      raise gr.Error(str(e), print_exception=False) from e

  return run


def build(studio: actions.Studio) -> Any:
  """Builds the page: a gradio.Blocks, not launched."""
  gr = _gradio()
  inverts = studio.model.experiment.method.supports_inversion
  config = studio.model.experiment.config
  with gr.Blocks(title=_TITLE, analytics_enabled=False) as page:
    height, width, _ = studio.model.image_shape
    gr.Markdown(
        f"# {_TITLE}\n`{config.method.name}` on {config.data.name}, "
        f"{height}x{width} pixels. Uploads are cropped and resized to fit."
    )
    with gr.Tab("Generate"):
      _generate_tab(gr, studio)
    if inverts:
      with gr.Tab("Invert"):
        _invert_tab(gr, studio)
      with gr.Tab("Interpolate"):
        _interpolate_tab(gr, studio)
    with gr.Tab("Inpaint"):
      _inpaint_tab(gr, studio, "inpaint" if inverts else "inpaint_cm")
    if inverts:
      with gr.Tab("Restore"):
        _restore_tab(gr, studio)
  return page


def _upload(gr: Any, studio, label: str, index: int) -> Any:
  """An image input that passes the uploaded file on without decoding it.

  Otherwise gradio decodes uploads before our code runs, and an invalid file
  ends in a stack trace. (A subclass would be cleaner, but gradio writes a .pyi
  file next to any source file that defines one.)
  """
  image = gr.Image(
      studio.example(index), label=label, type="filepath", format="png",
      sources=["upload", "clipboard"], height=actions.CANVAS + 64,
  )
  image.preprocess = lambda payload: None if payload is None else payload.path
  return image


def _bytes_of(file: Any, flatten_on_white: bool = False) -> bytes | None:
  """Returns the bytes of the editor's input: None, a gradio file, or bytes."""
  del flatten_on_white
  if file is None or isinstance(file, bytes | bytearray | memoryview):
    return None if file is None else bytes(file)
  with open(file.path, "rb") as f:
    return f.read()


def _class(
    gr: Any, studio, index: int | None = None, every: bool = False
) -> Any:
  """A dropdown of classes, preset to that of a test image.

  Args:
    gr: the gradio module.
    studio: the model.
    index: test image whose class is preset; None presets the first choice.
    every: offer all classes in turn instead of class prediction.

  Returns:
    The dropdown, invisible for unconditional networks.
  """
  choices = list(studio.classes)
  if choices and every:
    choices.insert(0, ("all", actions.ALL))
  elif 0 < len(choices) <= _MAX_CLASSES_TO_PREDICT:
    choices.insert(0, ("predict", actions.PREDICT))
  value = choices[0][1] if choices else None
  if index is not None:
    with contextlib.suppress(errors.UserError, OSError):
      value = studio.example_label(index)
  return gr.Dropdown(
      choices, value=value, label="class", visible=bool(studio.classes),
  )


def _image_output(gr: Any, label: str) -> Any:
  return gr.Image(
      label=label, format="png", interactive=False,
      height=actions.CANVAS + 64,
  )


def _seed_input(gr: Any) -> Any:
  return gr.Number(0, label="seed")


def _generate_tab(gr: Any, studio) -> None:
  with gr.Row():
    with gr.Column():
      inputs = [
          _class(gr, studio, every=True), _seed_input(gr),
          gr.Slider(1, 25, 16, step=1, label="images"),
          gr.Dropdown(
              list(studio.samplers), value=studio.samplers[0], label="sampler"
          ),
          gr.Slider(
              1, 32, 15 if studio.samplers[0] == "heun" else 2, step=1,
              label="network evaluations (NFE); onestep always takes 1",
          ),
      ]
      button = gr.Button("Generate", variant="primary")
    with gr.Column():
      outputs = [_image_output(gr, "images"), gr.Markdown()]
  button.click(
      _as_gradio_error(studio.generate), inputs, outputs, api_name="generate"
  )


def _invert_tab(gr: Any, studio) -> None:
  invert = studio.model.experiment.config.invert
  with gr.Row():
    with gr.Column():
      inputs = [
          _upload(gr, studio, "image", 0), _class(gr, studio, 0),
          gr.Slider(
              0.01, 1.0, invert.noise, step=0.01, label="noise level (sigma)"
          ),
          gr.Slider(
              1, 8, 1, step=1,
              label="network evaluations (NFE) of the inversion",
          ),
          _seed_input(gr),
      ]
      button = gr.Button("Invert and reconstruct", variant="primary")
    with gr.Column(scale=2):
      with gr.Row():
        outputs = [
            _image_output(gr, name)
            for name in ("network input", "latent", "reconstruction")
        ]
      outputs.append(gr.Markdown())
  button.click(
      _as_gradio_error(studio.reconstruct), inputs, outputs,
      api_name="reconstruct",
  )


def _interpolate_tab(gr: Any, studio) -> None:
  with gr.Row():
    with gr.Column():
      first = _upload(gr, studio, "first image", 0)
      first_label = _class(gr, studio, 0)
    with gr.Column():
      outputs = [_image_output(gr, "interpolation"), gr.Markdown()]
      weight = gr.Slider(
          0, 1, 0.5, step=0.05, label="weight of the second image"
      )
      button = gr.Button("Interpolate", variant="primary")
      seed = _seed_input(gr)
    with gr.Column():
      second = _upload(gr, studio, "second image", 1)
      second_label = _class(gr, studio, 1)
  inputs = [first, second, first_label, second_label, weight, seed]
  action = _as_gradio_error(studio.interpolate)
  button.click(action, inputs, outputs, api_name="interpolate")
  weight.release(action, inputs, outputs, api_name=False)


def _inpaint_tab(gr: Any, studio, task: str) -> None:
  height, width, _ = studio.model.image_shape
  with gr.Row():
    with gr.Column():
      editor = gr.ImageEditor(
          studio.example(2), label="paint over the region to fill",
          type="numpy", format="png", image_mode="RGBA",
          sources=["upload", "clipboard"], transforms=(), layers=False,
          canvas_size=(width * studio.scale, height * studio.scale),
          fixed_canvas=True, height=actions.CANVAS + 128,
          brush=gr.Brush(
              default_size=studio.scale, colors=["#E69F00"],
              color_mode="fixed",
          ),
      )
      # As in _upload: passes files on without decoding them.
      editor.convert_and_format_image = _bytes_of
      choices = [t for t in ("inpaint", "inpaint_cm")
                 if task == "inpaint" or not tasks.TASKS[t].both_ways]
      inputs = [
          editor, _class(gr, studio, 2), _seed_input(gr),
          gr.Dropdown(choices, value=task, label="task"),
      ]
      button = gr.Button("Fill", variant="primary")
    with gr.Column():
      outputs = [_image_output(gr, "inpainted"), gr.Markdown()]
  button.click(
      _as_gradio_error(studio.inpaint), inputs, outputs, api_name="inpaint"
  )


def _restore_tab(gr: Any, studio) -> None:
  task = tasks.TASKS["restore"]
  with gr.Row():
    with gr.Column():
      inputs = [
          _upload(gr, studio, "image", 3), _class(gr, studio, 3),
          gr.Slider(1, 95, 20, step=1, label="JPEG quality"),
          gr.Slider(
              0.01, 1.0, task.noise, step=0.01, label="noise level (sigma)"
          ),
          gr.Slider(
              2, 8, task.nfe, step=1, label="network evaluations (NFE)"
          ),
          _seed_input(gr),
      ]
      button = gr.Button("Compress and restore", variant="primary")
    with gr.Column(scale=2):
      with gr.Row():
        outputs = [
            _image_output(gr, name) for name in ("compressed", "restored")
        ]
      outputs.append(gr.Markdown())
  button.click(
      _as_gradio_error(studio.restore), inputs, outputs, api_name="restore"
  )


def launch(
    model: pretrained.Model, host: str = "127.0.0.1", port: int = 7860,
    upload_mb: int = 5, block: bool = True,
) -> Any:
  """Serves the studio.

  Args:
    model: model returned by `bcm_jax.load`.
    host: address to listen on.
    port: port to listen on.
    upload_mb: largest upload in megabytes.
    block: whether to wait until the server is stopped.

  Returns:
    The running page.

  Raises:
    UserError: the port is in use or invalid.
  """
  page = build(actions.Studio(model))
  page.queue(default_concurrency_limit=2, max_size=64)
  try:
    page.launch(
        server_name=host, server_port=port, max_file_size=f"{upload_mb}mb",
        share=False, prevent_thread_lock=not block, quiet=not block,
        allowed_paths=[], footer_links=[],
    )
  except (OSError, OverflowError) as e:
    raise errors.UserError(
        f"--port: cannot listen on port {port} of {host} ({e}); choose another "
        "port"
    ) from e
  return page


def main(argv: list[str] | None = None) -> None:
  """Runs the command; exits with 65 and one line on invalid input."""
  parser = cli.Parser("studio", __doc__)
  parser.add_argument(
      "checkpoint", nargs="?",
      help="work directory or packed folder; the digits network by default",
  )
  parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                      help="address to listen on (%(default)s)")
  parser.add_argument("--port", type=int, default=7860, metavar="N",
                      help="port to listen on (%(default)s)")
  parser.add_argument("--upload-mb", type=int, default=5, metavar="N",
                      help="largest upload in MB (%(default)s)")
  with cli.reporting():
    args = parser.parse_args(argv)
    _gradio()
    model = pretrained.load(args.checkpoint, batch_size=actions.MAX_IMAGES)
    launch(model, args.host, args.port, args.upload_mb)
