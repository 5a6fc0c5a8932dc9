"""Web interface: generates images and edits real ones.

  bcm_jax studio                      # the digits network of this package
  bcm_jax studio runs/mine --port=7861

Needs the extra `studio`: pip install 'bcm_jax[studio]'. Listens on 127.0.0.1
only, unless --host is given. Behind a proxy or a tunnel, --allow-host names the
host in the browser's address bar.
"""

from collections.abc import AsyncIterator, Callable, Sequence
import contextlib
import html
import os
import signal
import sys
import tempfile
import threading
from typing import Any

from bcm_jax import errors
from bcm_jax.editing import pretrained
from bcm_jax.editing import tasks
from bcm_jax.studio import actions
from bcm_jax.studio import host_guard
from bcm_jax.utils import cli

_TITLE = "bcm_jax studio"
# Largest number of classes for which class prediction is fast enough.
_MAX_CLASSES_TO_PREDICT = 100
# Seconds after which uploads and results are deleted, and between two checks.
_MAX_FILE_AGE, _CLEANING_INTERVAL = 3600, 600
# Sessions whose state is kept; gradio keeps 10,000 and their memory.
_MAX_SESSIONS = 100
# Shown below the tabs.
_TERMS = """\
* **NFE**: number of evaluations of the network, which determines the time.
* **sampler**: `onestep` maps noise to an image by one evaluation. `ancestral`
  and `cm_multistep` add noise again and repeat; `heun` and `ddim` solve the
  differential equation of a denoiser step by step.
* **sigma**: standard deviation of noise, where [-1, 1] is black to white.
* **latent**: noise that the network maps to an image. Inversion computes the
  latent of a given image.
* **seed**: the same seed and settings give the same images.
* **plan**, below an image: noise levels of the evaluations.
* **MSE, PSNR**: mean squared error, and the same in decibels; a higher PSNR is
  better.
"""


def _gradio() -> Any:
  """Imports gradio, which takes seconds."""
  return cli.optional("gradio", "the studio", "studio")


def _connect(
    gr: Any, event: Callable, function: Callable, inputs: Sequence[Any],
    outputs: Any, name: str | bool, images: int = 0, **settings: Any,
) -> None:
  """Calls a function of `actions.Studio` on an event of a component.

  The function gets values as they were sent, which it checks itself: gradio's
  checks end in stack traces.

  Args:
    gr: the gradio module.
    event: method that adds a listener, such as `button.click`.
    function: returns values for `outputs`; UserErrors become messages.
    inputs: components, whose values are the arguments.
    outputs: components that show the result.
    name: name of the API endpoint, False for none.
    images: number of leading inputs that are uploads; the function gets paths.
    **settings: of the listener.
  """
  state = {"text": "compiling and computing, slower the first time"}

  # gradio sets `progress`.
  def run(*args, progress=gr.Progress()):  # noqa: B008
    progress(0, desc=state["text"])
    paths = (file and file["path"] for file in args[:images])
    try:
      result = function(*paths, *args[images:])
    except errors.UserError as e:
      raise _message(gr, e) from e
    state["text"] = "computing"
    return result

  event(run, inputs, outputs, api_name=name, preprocess=False, **settings)


def _message(gr: Any, error: Exception) -> Exception:
  """Returns the error that shows a message, which gradio renders as HTML."""
  return gr.Error(html.escape(str(error), quote=False), print_exception=False)


def _report_bad_requests(gr: Any, page: Any) -> None:
  """Answers requests of the wrong form with a message, not a stack trace."""
  parse = page.preprocess_data

  async def preprocess_data(*args, **kwargs):
    try:
      return await parse(*args, **kwargs)
    except ValueError as e:  # gradio's and pydantic's errors.
      reason = " ".join(str(e).split())[:160]
      raise _message(gr, ValueError(
          f"request: got values that this page does not send ({reason}), "
          "expected those of its API; reload the page"
      )) from e

  page.preprocess_data = preprocess_data


def build(studio: actions.Studio) -> Any:
  """Builds the page: a gradio.Blocks, not launched."""
  gr = _gradio()
  inverts = studio.model.experiment.method.supports_inversion
  config = studio.model.experiment.config
  with gr.Blocks(
      title=_TITLE, analytics_enabled=False,
      delete_cache=(_CLEANING_INTERVAL, _MAX_FILE_AGE),
  ) as page:
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
    with gr.Accordion("Terms", open=False):
      gr.Markdown(_TERMS)
  _report_bad_requests(gr, page)
  return page


def _upload(gr: Any, studio, label: str, index: int) -> Any:
  return gr.Image(
      studio.example(index), label=label, format="png",
      sources=["upload", "clipboard"], height=actions.CANVAS + 64,
  )


def _bytes_of(file: Any, flatten_on_white: bool = False) -> bytes | None:
  """Returns the bytes of the editor's input: None, a gradio file, or bytes."""
  del flatten_on_white
  if file is None or isinstance(file, bytes | bytearray | memoryview):
    return None if file is None else bytes(file)
  if file.path is None:
    return None
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
  return gr.Number(0, label="seed", precision=0)


def _noise_slider(gr: Any, value: float) -> Any:
  return gr.Slider(
      0.01, 1.0, value, step=0.01, label="noise level (sigma)"
  )


def _generate_tab(gr: Any, studio) -> None:
  with gr.Row():
    with gr.Column():
      inputs = [
          _class(gr, studio, every=True), _seed_input(gr),
          gr.Slider(1, actions.MAX_IMAGES, 16, step=1, label="images"),
      ]
      first = studio.samplers[0]
      sampler = gr.Dropdown(
          list(studio.samplers), value=first, label="sampler"
      )
      nfe = gr.Slider(
          maximum=studio.max_nfe, label="network evaluations (NFE)",
          **studio.nfe_slider(first),
      )
      inputs += [sampler, nfe]
      button = gr.Button("Generate", variant="primary")
    with gr.Column():
      outputs = [_image_output(gr, "images"), gr.Markdown()]
  _connect(
      gr, sampler.input, lambda name: gr.update(**studio.nfe_slider(name)),
      [sampler], nfe, False, show_progress="hidden",
  )
  _connect(gr, button.click, studio.generate, inputs, outputs, "generate")


def _invert_tab(gr: Any, studio) -> None:
  invert = studio.model.experiment.config.invert
  with gr.Row():
    with gr.Column():
      inputs = [
          _upload(gr, studio, "image", 0), _class(gr, studio, 0),
          _noise_slider(gr, invert.noise),
          gr.Slider(
              1, 8, 1, step=1,
              label="network evaluations (NFE) of the inversion; one more "
              "reconstructs",
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
  _connect(
      gr, button.click, studio.reconstruct, inputs, outputs, "reconstruct",
      images=1,
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
  for event, name in ((button.click, "interpolate"), (weight.release, False)):
    _connect(gr, event, studio.interpolate, inputs, outputs, name, images=2)


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
      # Passes files on without decoding them.
      editor.convert_and_format_image = _bytes_of
      choices = [t for t in actions.INPAINTING
                 if task == "inpaint" or not tasks.TASKS[t].both_ways]
      inputs = [
          editor, _class(gr, studio, 2), _seed_input(gr),
          gr.Dropdown(choices, value=task, label="task"),
      ]
      button = gr.Button("Fill", variant="primary")
    with gr.Column():
      outputs = [_image_output(gr, "inpainted"), gr.Markdown()]

  def inpaint(painted, *settings):
    if painted is not None:
      painted = editor.preprocess(editor.data_model.model_validate(painted))
    return studio.inpaint(painted, *settings)

  _connect(gr, button.click, inpaint, inputs, outputs, "inpaint")


def _restore_tab(gr: Any, studio) -> None:
  task = tasks.TASKS["restore"]
  with gr.Row():
    with gr.Column():
      inputs = [
          _upload(gr, studio, "image", 3), _class(gr, studio, 3),
          gr.Slider(1, 95, 20, step=1, label="JPEG quality"),
          _noise_slider(gr, task.noise),
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
  _connect(
      gr, button.click, studio.restore, inputs, outputs, "restore", images=1
  )


def launch(
    model: pretrained.Model, host: str = "127.0.0.1", port: int = 7860,
    upload_mb: int = 5, block: bool = True, allow_hosts: Sequence[str] = (),
) -> Any:
  """Serves the studio.

  Uploads and results are in a folder that only this user can read; they are
  deleted after an hour, and all of them when the server stops.

  Args:
    model: model returned by `bcm_jax.load`.
    host: address to listen on.
    port: port to listen on.
    upload_mb: largest upload in megabytes.
    block: whether to wait until the server is stopped.
    allow_hosts: further host names in requests, see host_guard.HostGuard.

  Returns:
    The running page.

  Raises:
    UserError: the port is in use or invalid, or an invalid host name.
  """
  host = host.strip("[]")
  names = host_guard.HostNames(host, allow_hosts)
  folder = tempfile.TemporaryDirectory(
      prefix="bcm_jax_studio_", ignore_cleanup_errors=True
  )
  # gradio reads it when the page is built, and in every request.
  before = os.environ.get("GRADIO_TEMP_DIR")
  os.environ["GRADIO_TEMP_DIR"] = folder.name

  def clean() -> None:
    folder.cleanup()
    if os.environ.get("GRADIO_TEMP_DIR") == folder.name:
      del os.environ["GRADIO_TEMP_DIR"]
      if before is not None:
        os.environ["GRADIO_TEMP_DIR"] = before

  @contextlib.asynccontextmanager
  async def lifespan(app) -> AsyncIterator[None]:
    # Outside of gradio's middleware, which adds CORS headers to all answers.
    app.middleware_stack = host_guard.HostGuard(app.middleware_stack, names)
    yield
    clean()

  address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
  print("studio: compiling the network", flush=True)
  try:
    studio = actions.Studio(model)
    studio.warm_up()
    page = build(studio)
    page.queue(default_concurrency_limit=2, max_size=64)
    page.launch(
        server_name=address.removeprefix("http://").rpartition(":")[0],
        server_port=port, max_file_size=f"{upload_mb}mb", share=False,
        prevent_thread_lock=True, quiet=True, allowed_paths=[],
        footer_links=[], app_kwargs={"lifespan": lifespan},
        state_session_capacity=_MAX_SESSIONS,
    )
  except (OSError, OverflowError) as e:
    clean()
    raise errors.UserError(
        f"--port: cannot listen on port {port} of {host} ({e}); choose another "
        "port"
    ) from e
  except BaseException:
    clean()
    raise
  print(f"studio ready: {address} (Ctrl-C stops it)", flush=True)
  if block:
    try:
      _wait()
    except KeyboardInterrupt:
      print("studio stopped", flush=True)
    finally:
      page.close(verbose=False)
      clean()
  return page


def _wait() -> None:
  """Waits for a signal."""
  threading.Event().wait()


def main(argv: list[str] | None = None) -> None:
  """Runs the command; exits with 65 and one line on invalid input."""
  parser = cli.Parser("studio", __doc__)
  parser.add_argument(
      "checkpoint", nargs="?",
      help="work directory or model folder (the digits network)",
  )
  parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                      help="address to listen on (%(default)s)")
  parser.add_argument("--port", type=int, default=7860, metavar="N",
                      help="port to listen on (%(default)s)")
  parser.add_argument("--upload-mb", type=int, default=5, metavar="N",
                      help="largest upload in MB (%(default)s)")
  parser.add_argument("--allow-host", action="append", default=[],
                      metavar="NAME", help="also answers to this host "
                      "name, or pattern (none)")
  with cli.reporting():
    args = parser.parse_args(argv)
    _gradio()
    # So that the folder of uploads is deleted.
    for number in (signal.SIGTERM, signal.SIGHUP):
      signal.signal(number, lambda *_: sys.exit(0))
    model = pretrained.load(args.checkpoint, batch_size=actions.MAX_IMAGES)
    launch(
        model, args.host, args.port, args.upload_mb,
        allow_hosts=args.allow_host,
    )
