"""Names of the first version: old section or key -> today's (docs/renames.md).
"""

SECTIONS = {"critic": "auxiliary_optimizer"}
KEYS = {
    "training": {
        "hang_secs": "watchdog_timeout_secs",
        "max_skipped_in_row": "max_consecutive_nonfinite",
    },
    "parallel": {
        "max_examples": "microbatch_size_per_device",
        "steps_per_call": "substeps",
    },
    "eval": {
        "allow_few": "allow_fewer_samples",
        "baseline": "inversion_baseline",
        "baseline_nfe": "inversion_baseline_nfe",
        "likelihood_legacy": "ctm_likelihood_compat",
        "num_reference": "num_real_for_prdc",
    },
    "sample": {"guide": "guidance_network"},
    "edit": {
        "second": "end_images",
        "present": "positive_images",
        "absent": "negative_images",
        "points": "num_interpolants",
        "classify": "predict_labels",
        "level": "sigma",
    },
    "method": {
        "bins": "time_distribution",
        "scales": "discretization",
        "doubled_batch": "concat_jumps",
        "huber_normalise": "huber_normalize",
    },
}
