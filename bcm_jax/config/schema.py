"""Config schema: one frozen dataclass per section.

The fields are the keys that a config may set; types are checked and missing
keys take the defaults. The keys of sections model, method and optimizer are the
arguments of the classes that they name.
"""

import dataclasses
from typing import Literal

Sampler = Literal[
    "onestep", "ancestral", "zigzag", "mixture", "cm_multistep", "gamma",
    "ddim", "heun",
]


@dataclasses.dataclass(frozen=True)
class Data:
  """Dataset and preprocessing.

  Attributes:
    name: dataset (docs/datasets.md); 'none' has no images, for sampling from
      converted weights.
    path: file or folder of 'folder', 'npz', 'zip' and 'prepared'.
    data_dir: folder of TFDS's copy; None is TFDS's default.
    size: image side in pixels that `crop` resizes to; None keeps the images as
      they are.
    crop: 'adm', 'edm' or 'none', see data.resizing.
    channels: channels of a folder's images, 3 or 1.
    skip_corrupt: skip unreadable images instead of stopping.
    labels: labels of 'folder' and 'zip': 'auto' (dataset.json, metadata.jsonl,
      metadata.csv or class folders), 'none', 'folders', the name of one of
      these files, 'name' (cat_1.png), or a regular expression whose (group) is
      the class.
    flip: random horizontal flips.
    augment: probability p of EDM's augmentation pipe, applied on the devices;
      its labels condition the network (model.augment_dim=9). 0 disables it.
    threads: decoding threads; 0 is one per usable core.
    pairs: file of (noise, image) pairs written by mode pairs, used for training
      in place of the dataset; not used in evaluation.
    image_shape, num_classes: (height, width, channels), and the number of
      classes if any. Set for 'none'; otherwise filled in from data.path, so
      that a run can be sampled without its dataset.
    allow_fewer_classes: accept data with fewer classes than the network has,
      whose other classes are then not trained.
  """

  name: str = "digits"
  path: str | None = None
  data_dir: str | None = None
  size: int | None = None
  crop: Literal["adm", "edm", "none"] = "adm"
  channels: int = 3
  skip_corrupt: bool = False
  labels: str = "auto"
  flip: bool = False
  augment: float = 0.0
  threads: int = 0
  pairs: str | None = None
  image_shape: tuple[int, ...] = ()
  num_classes: int | None = None
  allow_fewer_classes: bool = False


@dataclasses.dataclass(frozen=True)
class Training:
  """Training loop.

  Attributes:
    num_steps: total number of steps.
    batch_size: global batch size.
    ema_rates: decay rates of the moving averages of the parameters.
    ema_warmup: use min(rate, (1 + n) / (10 + n)) instead of the rate.
    ema_halflife_kimg: half-lives of further averages in thousands of images, as
      in EDM.
    ema_rampup_ratio: the half-lives are at most this fraction of the images
      seen (EDM: 0.05); None disables the limit.
    ema_stds: relative widths sigma_rel of power function averages (EDM2: 0.05,
      0.1); with two of them sample.average='posthoc_0.15' reconstructs any
      other width.
    max_consecutive_nonfinite: consecutive non-finite steps after which the run
      rolls back to its last good checkpoint and continues with other data.
    max_rollbacks: rollbacks without a new checkpoint after which the run stops.
    watchdog_timeout_secs: seconds without a step, including compilation, after
      which a process exits and prints the stacks of its threads; 0 disables it.
    init_from: run whose moving average initializes the network, a work
      directory DIR or DIR@STEP; None initializes randomly.
    init_average: name of that moving average; None is the first one.
  """

  num_steps: int = 400_000
  batch_size: int = 1024
  ema_rates: tuple[float, ...] = (0.9999,)
  ema_warmup: bool = False
  ema_halflife_kimg: tuple[float, ...] = ()
  ema_rampup_ratio: float | None = None
  ema_stds: tuple[float, ...] = ()
  max_consecutive_nonfinite: int = 20
  max_rollbacks: int = 3
  watchdog_timeout_secs: float = 3600.0
  init_from: str | None = None
  init_average: str | None = None


@dataclasses.dataclass(frozen=True)
class Parallel:
  """Sharding over devices; changes results by rounding only.

  Attributes:
    backend: 'jit' over one mesh, or the 'pmap' adapter (without fsdp).
    fsdp: devices that share one copy of the state, 0 for all. If it does not
      divide the number of devices, the next smaller divisor is used.
    sharding: rules, of which the first that matches a tensor applies:
      'replicate', 'fsdp', 'PATTERN=fsdp', or 'PATTERN=- - - fsdp' with one word
      per dimension.
    microbatch_size_per_device: largest number of examples per device and pass;
      larger batches use gradient accumulation. 0 is unlimited.
    substeps: training steps per call, so that small networks do not wait for
      the host.
    heartbeat_secs: seconds without a heartbeat after which a process is
      considered dead.
    cpu_devices: number of devices that JAX simulates on a CPU; 0 is one per
      usable core, if that divides the batch.
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
  """Checkpointing.

  Attributes:
    every_steps: steps between checkpoints; the last step is always saved.
    keep: number of newest checkpoints to keep; None keeps all.
    keep_every: also keep checkpoints at multiples of this step.
    max_failures: consecutive failed saves after which the run stops.
    retry_secs: seconds between attempts to save the last step, which must
      succeed.
  """

  every_steps: int = 10_000
  keep: int | None = 3
  keep_every: int | None = None
  max_failures: int = 3
  retry_secs: float = 10.0


@dataclasses.dataclass(frozen=True)
class Log:
  """Metric logging and profiling.

  Attributes:
    every_steps: steps between lines of metrics.
    progress_secs: seconds between progress lines if there is no terminal.
    profile: write a profile of a few steps for TensorBoard.
  """

  every_steps: int = 100
  progress_secs: float = 30.0
  profile: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
  """Sampling. Times are noise levels sigma.

  Attributes:
    sampler: see sampling.sampling_plan.
    nfe: network evaluations. Without `times` and zigzags it selects default
      times; otherwise it must agree with them, or be None.
    times: intermediate times, descending (ancestral, mixture, cm_multistep,
      gamma).
    zigzag_noise: noise level e added before each zigzag.
    zigzag_level: level t of the amplifying jump of each zigzag.
    gamma: parameter of sampler 'gamma', 0 (ancestral) to 1 (cm_multistep).
    num_levels: N of samplers 'ddim' (N evaluations) and 'heun' (2 N - 1), if
      nfe is None.
    s_churn, s_tmin, s_tmax, s_noise: stochasticity of 'ddim' and 'heun' (EDM,
      algorithm 2); s_tmax=None has no upper bound.
    guidance: scale w of D_0 + w (D_1 - D_0), for denoisers; 1 disables it.
    guidance_interval: (low, high): guidance at levels low < t <= high; empty is
      all levels.
    guidance_network: D_0: work directory of a weaker network (autoguidance), as
      DIR or DIR@STEP; None is the network itself without the class.
    rejection: fraction of additional samples, of which those with the highest
      classifier confidence per class are kept; 0 disables rejection sampling.
    rejection_classifier: folder of the classifier, see
      bcm_jax.tools.train_classifier.
    num_samples: total number of images.
    png: also write each image as a PNG file.
    batch_size: images per batch.
    label: class of all images; None gives all classes equal shares.
    seed: seed of the noise.
    average: moving average to sample from; None is the first one, 'params' the
      raw parameters.
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
  png: bool = False
  batch_size: int = 250
  label: int | None = None
  seed: int = 0
  average: str | None = None


@dataclasses.dataclass(frozen=True)
class Invert:
  """Inversion of the test split. Times are noise levels sigma.

  Attributes:
    nfe: network evaluations of the inversion; reconstruction takes one more.
    times: intermediate times, ascending; empty selects default times.
    noise: e, standard deviation of the noise added before inverting.
    num_images: number of images, evenly spaced in the split; None is all.
    batch_size: images per batch.
    seed: seed of the added noise.
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
    task: see editing.tasks.TASKS.
    input: an image file or a folder; None takes test images and applies the
      degradation that the task reverts.
    end_images: other ends of 'interpolate', like `input`.
    mask: mask of 'inpaint': an image, or a folder with one per image, white in
      the region to fill; None is a centered square of half the height and
      width.
    reference: ground truth images, like `input`; PSNR, SSIM and LPIPS
      (eval.lpips_path) are computed against them.
    positive_images, negative_images: folders of images with and without an
      attribute, for 'attribute'; None are training images of new_label and of
      label.
    resize: resize and convert images of other sizes or channels.
    label: classes of the images of `input`, one for all or one per image.
    predict_labels: predict the classes with the network, which takes 20 network
      evaluations per class and image.
    new_label: target class of 'relabel'; class of the end images of
      'interpolate', None is `label`.
    noise, sigma, nfe, times: parameters of the task; None and () take its
      defaults.
    factor: downsampling factor of 'super_resolve'.
    strength: strength of 'attribute'; 1 shifts the latent by the full
      difference between negative and positive images.
    quality: JPEG quality of the test images of 'restore'.
    num_images: number of test images.
    pairs: number of pairs of test images, for 'interpolate'.
    num_interpolants: images per row of 'interpolate', both ends included.
    seed: seed of the choice of test images and of the added noise.
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
  """Evaluation at the end of training and in mode eval; docs/evaluation.md.

  Attributes:
    at_end: evaluate at the end of training; otherwise only images are written.
    samples: images of another program to evaluate instead of the network's: a
      folder of image files, or an .npz with arr_0 and perhaps labels in arr_1.
    samplers: samplers to evaluate: 'ancestral' with the times of section
      sample, 'ancestral:4' with four network evaluations at default times, or
      'mixture@3/0.12>0.4' with these times.
    averages: moving averages to evaluate; empty is sample.average only.
    steps: the 'last' checkpoint, 'all' that are kept, 'follow' a run in
      progress, or the number of one.
    seeds: seeds of the noise; results have every seed, mean and standard
      deviation.
    num_samples: number of samples, in equal shares of all classes.
    allow_fewer_samples: accept fewer samples than the protocol's 50,000; the
      result is marked.
    features: 'pixels', 'inception', 'classifier', or 'module:function' of
      uint8 images [n, H, W, C] -> [n, D].
    features_path: weights of 'inception', folder of a 'classifier'.
    resize: resizing for Inception, 'tf1' as in EDM and ADM, 'torch' as in
      pytorch-fid.
    reference: .npz of statistics (ours, ADM's, EDM's); None computes them from
      the training split, once per run.
    num_real_for_prdc: number of training images for precision, recall, density
      and coverage; None takes those of the reference file, or all.
    k: neighbors of precision and recall.
    lpips_path: weights of LPIPS, for reconstructions; None skips LPIPS.
    inversion_nfe: network evaluations of the inversions to measure, at the
      times of section invert if their number agrees, else at default times.
    inversion_noise: initial noise levels of the inversion curve; empty is
      invert.noise only.
    likelihood_images: number of test images for bits/dim, for denoisers (edm,
      ctm); 0 disables it.
    ctm_likelihood_compat: reproduce the two errors of CTM's released code.
    inversion_baseline: denoiser whose DDIM and Heun inversions are measured for
      comparison, a work directory DIR or DIR@STEP.
    inversion_baseline_nfe: network evaluations of each baseline inversion.
  """

  at_end: bool = True
  samples: str | None = None
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
  """Search for a sampler's times by Frechet distance: mode search.

  Attributes:
    sampler: 'cm_multistep' by ternary search, one time after another;
      'ancestral', 'zigzag' or 'mixture' by greedy grid search.
    nfe: network evaluations of the sampler.
    steps: number of points of the Karras grid for ternary search.
    mid_times: candidates for intermediate times.
    noises, levels: candidates for e and t of a zigzag.
    num_samples: samples per candidate; evaluate the best one with mode eval.
    seed: seed of the noise, the same for all candidates.
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
