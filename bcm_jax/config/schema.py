"""Sections of a config that belong to no room of their own.

Each is a frozen dataclass; its fields are the keys that a config may set, its
types are checked, its defaults fill what a config leaves out. Sections model,
method and optimizer take their keys from the classes that they name.
"""

import dataclasses
from typing import Literal

Sampler = Literal[
    "onestep", "ancestral", "zigzag", "mixture", "cm_multistep", "gamma",
    "ddim", "heun",
]


@dataclasses.dataclass(frozen=True)
class Data:
  """Where images come from.

  Attributes:
    name: data set (docs/datasets.md); 'none' has no images, for sampling from
      converted weights.
    path: of 'folder', 'npz', 'zip' and 'prepared'.
    data_dir: where TFDS keeps its copy; None is TFDS's own default.
    size: pixels a side that images are brought to by `crop`; None takes them
      as they are.
    crop: 'adm', 'edm' or 'none', see data.resizing.
    channels: of a folder's images, 3 or 1.
    skip_corrupt: leave out images that cannot be read, instead of stopping.
    flip: random horizontal flips.
    augment: p of EDM's augmentation pipe, done on the devices and told the
      network by labels (model.augment_dim=9); 0 does nothing.
    threads: that decode images; 0 is one a usable core.
    pairs: file of (noise, image) pairs of mode pairs, which training reads in
      place of the data set; evaluation does not.
    image_shape, num_classes: (height, width, channels), and classes if there
      are any. Of 'none'; filled in by the data where it is read from
      data.path, so that a run can be sampled where its data is not.
  """

  name: str = "digits"
  path: str | None = None
  data_dir: str | None = None
  size: int | None = None
  crop: Literal["adm", "edm", "none"] = "adm"
  channels: int = 3
  skip_corrupt: bool = False
  flip: bool = False
  augment: float = 0.0
  threads: int = 0
  pairs: str | None = None
  image_shape: tuple[int, ...] = ()
  num_classes: int | None = None


@dataclasses.dataclass(frozen=True)
class Training:
  """The loop.

  Attributes:
    num_steps: steps in all.
    batch_size: global batch size.
    ema_rates: rates of the moving averages, kept beside the parameters.
    ema_warmup: min(rate, (1 + n) / (10 + n)) instead of the rate.
    ema_stds: lengths sigma_rel of power-function averages (EDM2: 0.05, 0.1);
      from two of them sample.average='posthoc_0.15' makes any other length.
    max_consecutive_nonfinite: non-finite steps in a row after which the run
      rolls back to its last good checkpoint and goes on with other data.
    max_rollbacks: roll-backs without a new checkpoint after which it stops.
    watchdog_timeout_secs: seconds without a step, compiling included, after
      which a process ends with the stacks of its threads; 0 never ends it.
    init_from: work directory of a run whose average the network starts from;
      None starts fresh.
    init_average: which of its averages; None is its first.
  """

  num_steps: int = 400_000
  batch_size: int = 1024
  ema_rates: tuple[float, ...] = (0.9999,)
  ema_warmup: bool = False
  ema_stds: tuple[float, ...] = ()
  max_consecutive_nonfinite: int = 20
  max_rollbacks: int = 3
  watchdog_timeout_secs: float = 3600.0
  init_from: str | None = None
  init_average: str | None = None


@dataclasses.dataclass(frozen=True)
class Parallel:
  """How the work is spread over devices; it changes results by rounding only.

  Attributes:
    backend: 'jit' over one mesh, or the 'pmap' adapter (no fsdp).
    fsdp: devices that share one copy of the state, 0 for all of them; on fewer
      devices, or a number that it does not divide, the next smaller divisor.
    sharding: rules, the first that fits a tensor counts: 'replicate', 'fsdp',
      'PATTERN=fsdp', or 'PATTERN=- - - fsdp' with a word for each dimension.
    microbatch_size_per_device: most examples that a device takes at a time;
      the rest of its share follows by gradient accumulation. 0 takes them all
      at once.
    substeps: steps that one call runs on the devices, so that small
      networks do not wait for the host.
    heartbeat_secs: silence after which a process counts as dead.
    cpu_devices: devices that JAX makes of the host's cores where it runs on
      a CPU; 0 is one a usable core, as far as the batch divides evenly.
  """

  backend: Literal["jit", "pmap"] = "jit"
  fsdp: int = 1
  sharding: tuple[str, ...] = ("replicate",)
  microbatch_size_per_device: int = 0
  substeps: int = 1
  heartbeat_secs: int = 100
  cpu_devices: int = 0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """When the state is saved, and how much is kept.

  Attributes:
    every_steps: steps between saves; the last step is always saved.
    keep: newest checkpoints to keep; None keeps all.
    keep_every: additionally keep those at multiples of this step.
    max_failures: saves in a row that may fail before the run stops.
    retry_secs: between tries of the last save, which must succeed.
  """

  every_steps: int = 10_000
  keep: int | None = 3
  keep_every: int | None = None
  max_failures: int = 3
  retry_secs: float = 10.0


@dataclasses.dataclass(frozen=True)
class Log:
  """What is written, and when.

  Attributes:
    every_steps: steps between lines of metrics.
    progress_secs: seconds between progress lines where there is no terminal.
    profile: write a profile of a few steps for TensorBoard.
  """

  every_steps: int = 100
  progress_secs: float = 30.0
  profile: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
  """Generation. Times are in sigma units.

  Attributes:
    sampler: see sampling.plan.
    nfe: network evaluations. Where `times` and pairs are empty it picks
      default ones; otherwise it must agree with them, or be None.
    times: intermediate times, descending (ancestral, mixture, cm_multistep,
      gamma).
    zigzag_noise: noise e added before each zigzag.
    zigzag_level: level t to which each zigzag amplifies it.
    gamma: of sampler 'gamma', 0 (ancestral) to 1 (cm_multistep).
    num_levels: N of samplers 'ddim' (N evaluations) and 'heun' (2 N - 1),
      where nfe is None.
    s_churn, s_tmin, s_tmax, s_noise: stochasticity of these two, EDM's; None
      is no upper bound.
    guidance: w of D_0 + w (D_1 - D_0), of networks that denoise; 1 is off.
    guidance_interval: (low, high): levels low < t <= high are guided; empty
      is all.
    guidance_network: D_0: work directory of a worse network, as DIR or
      DIR@STEP; None is the network itself without the class.
    rejection: share of images that are drawn in addition, to keep those of
      which a classifier is surest; 0 keeps all.
    rejection_classifier: folder of it, see bcm_jax.tools.train_classifier.
    num_samples: images in all.
    batch_size: images at a time.
    label: class of all images; None takes all classes in equal shares.
    seed: of noise.
    average: moving average to sample from; None is the first, 'params' the
      parameters themselves.
  """

  sampler: Sampler = "onestep"
  nfe: int | None = None
  times: tuple[float, ...] = ()
  zigzag_noise: tuple[float, ...] = ()
  zigzag_level: tuple[float, ...] = ()
  gamma: float = 0.5
  num_levels: int = 18
  s_churn: float = 0.0
  s_tmin: float = 0.0
  s_tmax: float | None = None
  s_noise: float = 1.0
  guidance: float = 1.0
  guidance_interval: tuple[float, ...] = ()
  guidance_network: str | None = None
  rejection: float = 0.0
  rejection_classifier: str | None = None
  num_samples: int = 1000
  batch_size: int = 250
  label: int | None = None
  seed: int = 0
  average: str | None = None


@dataclasses.dataclass(frozen=True)
class Invert:
  """Inversion of the test split. Times are in sigma units.

  Attributes:
    nfe: network evaluations of the inversion; reconstruction is one more.
    times: intermediate times, ascending; empty takes default ones.
    noise: e, standard deviation of the noise added before inverting.
    num_images: images to invert, spread over the split; None is all of it.
    batch_size: images at a time.
    seed: of the added noise.
  """

  nfe: int | None = None
  times: tuple[float, ...] = ()
  noise: float = 0.07
  num_images: int | None = None
  batch_size: int = 250
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Edit:
  """Editing of real images: mode edit; docs/editing.md has every task.

  Attributes:
    task: what is done, see recipes.TASKS.
    input: an image file or a folder of them; None takes images of the test
      split and does to them what the task undoes.
    end_images: the other ends of 'interpolate', as `input`.
    mask: of 'inpaint': an image, or a folder of one an image, white in the
      holes; None is a square in the middle, of half the height and width.
    reference: the images as they should come out, as `input`; PSNR, SSIM and
      LPIPS (eval.lpips_path) are measured against them.
    positive_images, negative_images: folders of images with and without a
      property, of 'attribute'; None are training images of new_label and of
      label.
    resize: whether images of other sizes or channels are made to fit.
    label: classes of the images of `input`, one or as many as images.
    predict_labels: whether the network finds the classes itself, which takes 20
      evaluations a class and image.
    new_label: class to make, of 'relabel'; of the other ends of
      'interpolate', None is `label`.
    noise, sigma, nfe, times: of the recipe; None and () take its defaults.
    factor: of 'super_resolve'; `input` has that part of the height and width.
    strength: of 'attribute'; 1 goes all the way from absent to present.
    quality: of the JPEG files that 'restore' makes of test images.
    num_images: test images.
    pairs: pairs of them, of 'interpolate'.
    num_interpolants: images a row of 'interpolate', both ends included.
    seed: of the choice of test images and of the added noise.
  """

  task: Literal[
      "interpolate", "inpaint", "inpaint_cm", "colorize", "super_resolve",
      "denoise", "restore", "stroke", "relabel", "attribute", "purify",
  ] = "interpolate"
  input: str | None = None
  end_images: str | None = None
  mask: str | None = None
  reference: str | None = None
  positive_images: str | None = None
  negative_images: str | None = None
  resize: bool = False
  label: tuple[int, ...] = ()
  predict_labels: bool = False
  new_label: int | None = None
  noise: float | None = None
  sigma: float | None = None
  nfe: int | None = None
  times: tuple[float, ...] = ()
  factor: int = 2
  strength: float = 1.0
  quality: int = 20
  num_images: int = 16
  pairs: int = 8
  num_interpolants: int = 9
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Eval:
  """Numbers at the end of a run and in mode eval; docs/evaluation.md.

  Attributes:
    at_end: evaluate at the end of training; without it only pictures are made.
    samplers: samplers to evaluate: 'ancestral' with the times of section
      sample, 'ancestral:4' with four evaluations at default times, or
      'mixture@3/0.12>0.4' with these times.
    averages: moving averages to evaluate; empty is sample.average alone.
    steps: the 'last' checkpoint, 'all' that are kept, 'follow' the run, or
      the number of one.
    seeds: of the noise; results tell every seed, mean and spread.
    num_samples: generated images, equal shares a class.
    allow_fewer_samples: fewer samples than the protocol's 50,000 are no error,
      and the result says so.
    features: 'pixels', 'inception', 'classifier', or 'module:function' of
      uint8 images [n, H, W, C] -> [n, D].
    features_path: weights of 'inception', folder of a 'classifier'.
    resize: Inception's, 'tf1' as EDM and ADM do, 'torch' as pytorch-fid.
    reference: .npz of statistics (ours, ADM's, EDM's); None takes them of the
      training split, once a run.
    num_real_for_prdc: training images that precision, recall, density and
      coverage compare with; None takes those of the reference file, or all.
    k: neighbours of precision and recall.
    lpips_path: weights of LPIPS, of reconstructions; None leaves it out.
    inversion_nfe: evaluations of each inversion whose error is measured; the
      times of section invert serve where their number fits, else defaults.
    inversion_noise: initial noises of the curve; empty is invert.noise alone.
    likelihood_images: test images whose bits a dimension are measured, of
      networks that denoise (edm, ctm); 0 measures none.
    ctm_likelihood_compat: reproduce the two errors of CTM's released code.
    inversion_baseline: work directory of a denoiser whose DDIM and Heun
      inversions are measured beside.
    inversion_baseline_nfe: evaluations of each of these.
  """

  at_end: bool = True
  samplers: tuple[str, ...] = ("onestep", "ancestral")
  averages: tuple[str, ...] = ()
  steps: str = "last"
  seeds: tuple[int, ...] = (0,)
  num_samples: int = 50_000
  allow_fewer_samples: bool = False
  features: str = "pixels"
  features_path: str | None = None
  resize: Literal["tf1", "torch"] = "tf1"
  reference: str | None = None
  num_real_for_prdc: int | None = 10_000
  k: int = 3
  lpips_path: tuple[str, ...] = ()
  inversion_nfe: tuple[int, ...] = (1, 2)
  inversion_noise: tuple[float, ...] = ()
  likelihood_images: int = 0
  ctm_likelihood_compat: bool = False
  inversion_baseline: str | None = None
  inversion_baseline_nfe: tuple[int, ...] = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Search:
  """Search for a sampler's times by the Frechet distance: mode search.

  Attributes:
    sampler: 'cm_multistep', by ternary search over the grid, one time after
      another; 'ancestral', 'zigzag' or 'mixture', by a greedy grid.
    nfe: evaluations of the sampler.
    steps: points of the Karras grid that ternary search walks on.
    mid_times: candidates for ancestral's times.
    noises, levels: candidates for zigzag's e and t.
    num_samples: of each evaluation; the best is evaluated again as mode eval
      does.
    seed: of the noise, the same for all candidates.
  """

  sampler: Literal[
      "cm_multistep", "ancestral", "zigzag", "mixture"
  ] = "ancestral"
  nfe: int = 2
  steps: int = 40
  mid_times: tuple[float, ...] = (0.8, 1.2, 1.6, 2.0, 2.4, 3.0, 4.0)
  noises: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3)
  levels: tuple[float, ...] = (0.2, 0.4, 0.8, 1.2, 1.6, 2.0)
  num_samples: int = 10_000
  seed: int = 0
