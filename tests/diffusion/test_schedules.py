"""Grids, laws of training times and curricula, against reference numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bcm_jax.diffusion import schedules
from tests import golden

LENGTH = 1281
DRAWS = 20_000
sample_index = jax.jit(schedules.sample_index)
sample_other = jax.jit(schedules.sample_other_index)


def law(index, probabilities):
  """Asserts by chi-square that indices follow a law."""
  p = np.asarray(probabilities, np.float64)
  counts = np.bincount(index, minlength=len(p))
  assert len(counts) == len(p), "an index outside the table"
  assert not counts[p == 0].any(), "an index of probability zero"
  expected = DRAWS * p / p.sum()
  # Rare indices together make one class.
  rare = expected < 5
  counts, expected = (
      np.append(v[~rare], v[rare].sum()) for v in (counts, expected)
  )
  keep = expected > 0
  test = stats.chisquare(counts[keep], expected[keep])
  assert test.pvalue > 1e-3, test


def tables(n, length=LENGTH, **kwargs):
  return schedules.grid_tables(n, length, **kwargs)


def test_grid_is_the_reference_one():
  g = golden.load("sched_karras")
  for n, low, high, rho in g.meta["cases"]:
    ours = schedules.karras_sigmas(n, low, high, rho)
    # The reference descends, and appends a zero.
    golden.close(
        np.append(ours[::-1], 0), g,
        f"karras_n{n}_min{low}_max{high}_rho{rho}", rel=1e-13,
    )


def test_grid_of_the_published_fine_tuning():
  sigmas = schedules.karras_sigmas(321)
  assert sigmas[0] == 0.002 and sigmas[-1] == 80.0
  np.testing.assert_allclose(
      sigmas[[1, 160, 319]], [0.00216030, 2.515219, 78.645064], rtol=2e-6
  )
  assert (np.diff(sigmas) > 0).all()


@pytest.mark.parametrize("n", golden.load("sched_ict_discretisation").meta[
    "num_scales"])
def test_bins_and_tables_are_the_reference_ones(n):
  g = golden.load("sched_ict_discretisation")
  bins = schedules.lognormal_bins(schedules.karras_sigmas(n))
  np.testing.assert_allclose(bins, g[f"out/ict_P_N{n}"], rtol=1e-9)

  ict, bcm = tables(n), tables(n, include_T=False)
  # Entry i of the file is interval i, whose upper edge is t.
  for table, key in ((ict, "ict_P"), (bcm, "bcm_P")):
    mass = np.diff(table.cdf.astype(np.float64))[: n - 1]
    np.testing.assert_allclose(mass, g[f"out/{key}_N{n}"], atol=1.2e-7)
  end = np.diff(bcm.end_cdf.astype(np.float64), prepend=0)[: n - 1]
  for i, expected in zip(
      g[f"in/idx_bcm_N{n}"], g[f"out/bcm_P3_N{n}"], strict=True
  ):
    others = np.where(np.arange(n - 1) == i + 1, 0, end)
    np.testing.assert_allclose(others / others.sum(), expected, atol=3e-7)
    t, t2 = bcm.sigmas[[i + 1, i]]
    assert np.isclose([t, t2], g[f"out/bcm_t_N{n}"][:, 0], rtol=1e-4).all() or (
        np.isclose([t, t2], g[f"out/bcm_t_N{n}"][:, 1], rtol=1e-4).all()
    )


@pytest.mark.parametrize("include_T", [True, False])  # noqa: N803
def test_tables_have_one_shape_whatever_n_is(include_T):  # noqa: N803
  shapes = set()
  for n in (3, 11, 321, LENGTH):
    t = tables(n, include_T=include_T)
    shapes |= {(v.shape, str(v.dtype)) for v in t}
    np.testing.assert_array_equal(t.sigmas[n:], t.sigmas[n - 1])
    assert t.cdf[0] == 0 and t.cdf[n - 1] == t.end_cdf[n - 1] == 1
    assert (np.diff(t.cdf) >= 0).all() and (np.diff(t.end_cdf) >= 0).all()
    # Without T both laws are done one index before the last.
    assert (t.cdf[n - 2] == 1) == (t.end_cdf[n - 2] == 1) == (not include_T)
  assert shapes == {((LENGTH,), "float32")}


def test_end_law_gives_sigma_max_the_weight_of_the_last_interval():
  bins = schedules.lognormal_bins(schedules.karras_sigmas(11))
  expected = np.append(bins, bins[-1])
  end = np.diff(tables(11, 11).end_cdf, prepend=0)
  np.testing.assert_allclose(end, expected / expected.sum(), atol=1e-7)
  uniform = np.diff(tables(11, 11, time_distribution="uniform").cdf)
  np.testing.assert_allclose(uniform, 0.1, atol=1e-7)


def test_largest_trained_levels():
  top = [tables(n, include_T=False).sigmas[n - 2] for n in (11, 321, 1281)]
  np.testing.assert_allclose(top, [45.3, 78.65, 79.66], rtol=2e-3)


@pytest.mark.parametrize("include_T", [True, False])  # noqa: N803
@pytest.mark.parametrize("n", [11, 321])
def test_start_index_follows_its_law(n, include_T):  # noqa: N803
  t = tables(n, include_T=include_T)
  u = jax.random.uniform(jax.random.key(n), (DRAWS,))
  index = np.asarray(sample_index(t.cdf, u))
  assert index.dtype == np.int32
  bins = schedules.lognormal_bins(schedules.karras_sigmas(n))
  if not include_T:
    bins[-1] = 0
  law(index, np.append(0, bins))
  assert index.min() >= 1


@pytest.mark.parametrize("include_T", [True, False])  # noqa: N803
@pytest.mark.parametrize("excluded", [0, 1, 4, 9, 10])
def test_end_index_follows_its_law_without_the_start(excluded, include_T):  # noqa: N803
  t = tables(11, include_T=include_T)
  u = jax.random.uniform(jax.random.key(excluded), (DRAWS,))
  index = np.asarray(
      sample_other(t.end_cdf, jnp.full(DRAWS, excluded), u)
  )
  bins = schedules.lognormal_bins(schedules.karras_sigmas(11))
  p = np.append(bins, bins[-1] if include_T else 0)
  p[excluded] = 0
  law(index, p)


@pytest.mark.parametrize("n", [11, 321])
def test_draws_on_the_edges_of_the_table(n):
  cdf = tables(n).cdf
  # cdf[k] = P(index <= k): a draw of cdf[k] itself belongs to k + 1.
  index = sample_index(cdf, jnp.asarray(cdf[: n - 1]))
  np.testing.assert_array_equal(index, np.arange(1, n))
  assert sample_index(cdf, jnp.float32(0)) == 1


@pytest.mark.parametrize("n", [11, 321])
def test_end_index_is_never_the_start_at_any_edge_of_the_table(n):
  t = tables(n)
  cdf = t.end_cdf[:n]
  edges = np.concatenate([
      [0.0, 1 - 2.0**-23],
      *(np.clip([c, np.nextafter(c, 0), np.nextafter(c, 1)], 0, 1 - 2.0**-23)
        for c in cdf),
  ]).astype(np.float32)
  excluded, u = np.meshgrid(np.arange(n), edges, indexing="ij")
  # The same edges, where the excluded mass has been cut out.
  mass = np.diff(cdf, prepend=np.float32(0))[:, None]
  below = np.concatenate([[0], cdf[:-1]])[:, None]
  for v in (u, below / (1 - mass) + 0 * u, (u - mass) / (1 - mass)):
    v = np.clip(v, 0, 1 - 2.0**-23).astype(np.float32)
    index = sample_other(t.end_cdf, jnp.asarray(excluded), jnp.asarray(v))
    assert not (np.asarray(index) == excluded).any()


def test_curricula_are_the_reference_ones():
  g = golden.load("sched_curriculum")
  names = {
      "ict_progressive": "doubling",
      "bcm_progressive": "doubling",
      "ict_v1": "sqrt",
      "ict_exponential": "linear",
      "cm_fixed_progressive": "sqrt",
  }
  compared = 0
  for total, s0, s1 in g.meta["cases"]:
    case = f"T{total}_s{s0}_e{s1}"
    steps = g[f"in/steps_{case}"].tolist()
    for theirs, name in names.items():
      ours = [schedules.CURRICULA[name](k, total, s0, s1) for k in steps]
      np.testing.assert_array_equal(ours, g[f"out/{theirs}_{case}"], theirs)
      compared += 1
  assert compared == 20


def test_doubling_stages():
  def n(step):
    return schedules.doubling_scales(step, 400_000, 10, 1280)

  stage = 50_000
  for i in range(8):
    assert n(i * stage) == n((i + 1) * stage - 1) == 10 * 2**i + 1
  assert n(10**9) == 1281


def test_fixed_scales():
  assert {
      schedules.fixed_scales(k, 100, 10, 320) for k in range(0, 200, 7)
  } == {321}


def test_target_ema_rate():
  # At the first stage, N' = s0, it is mu0 itself; then it tends to 1.
  assert schedules.target_ema_rate(11, 0.9, 10) == pytest.approx(0.9)
  assert schedules.target_ema_rate(21, 0.9, 10) == pytest.approx(0.9**0.5)
  assert schedules.target_ema_rate(151, 0.95, 2) == pytest.approx(
      0.95 ** (2 / 150)
  )
  assert schedules.target_ema_rate(11, 0.0, 10) == 0


@pytest.mark.parametrize("stage", [0, 2, 7])
@pytest.mark.parametrize("config", [0, 1, 2])
def test_ect_times_are_the_reference_ones(config, stage):
  g = golden.load("ect_loss")
  settings = g.meta["loss_configs"][config]
  k = 8.0 if settings["adj"] == "sigmoid" else 0.0
  gap = schedules.ect_gap_ratio(stage * 10 + 9, 10, settings["q"])
  assert gap == settings["q"] ** -(stage + 1)
  with jax.enable_x64(True):
    t = jnp.asarray(g["in/t"].reshape(-1), jnp.float64)
    r = schedules.ect_earlier_time(t, gap, k=k)
    assert ((r >= 0) & (r < t)).all()
  golden.close(r, g, f"r_cfg{config}_stage{stage}", rel=1e-12)


@pytest.mark.parametrize("include_T", [True, False])
@pytest.mark.parametrize("n", [3, 5, 9, 11, 321])
def test_largest_uniforms_stay_in_the_grid(n, include_T):  # noqa: N803
  tables = schedules.grid_tables(n, 330, include_T=include_T)
  cdf = jnp.asarray(tables.end_cdf)
  for uniform in (1 - 2.0**-23, 1 - 2.0**-24):
    for excluded in range(1, n - (not include_T)):
      index = schedules.sample_other_index(
          cdf, jnp.int32(excluded), jnp.float32(uniform)
      )
      assert int(index) < n - (not include_T)
