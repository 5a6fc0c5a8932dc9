"""Exports a sampler as StableHLO: python -m bcm_jax.release.export."""

from bcm_jax.export import stablehlo

if __name__ == "__main__":
  stablehlo.main()
