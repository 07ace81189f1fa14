"""Installs Tessera and the `tessera` command."""

import setuptools

parity = ["torch==2.13.0", "transformers>=5"]
# Zstandard frames with windows above 2^27 bytes, which pyarrow refuses.
zstd = ["zstandard>=0.23"]
# The client of Google Cloud Storage, for workdirs at gs://BUCKET/FOLDER.
gcs = ["gcsfs>=2025.3"]
# Experiment trackers; each is addressed as its package says.
wandb = ["wandb>=0.20"]
mlflow = ["mlflow-skinny>=3"]
trackio = ["trackio>=0.20"]
# Answers that keep to a grammar.
grammar = ["llguidance>=1.9"]
# What `tessera bench decode` and `bench engine` are beside; llama.cpp is built from source.
peers = ["llama-cpp-python>=0.3.30"]
# The site, and the notebook that the tests run.
docs = ["mkdocs-material>=9.6"]
notebook = ["ipykernel>=6", "nbclient>=0.10"]
# Completion of the command line in the shell.
completion = ["argcomplete>=3.5"]
test = [
    "beartype>=0.20",
    "gcp-storage-emulator>=2026.7",
    "hypothesis>=6",
    "pytest>=8",
    "pytest-xdist>=3.8",
    "ruff>=0.6",
    "safetensors>=0.5",
    *completion,
    *gcs,
]

setuptools.setup(
    name="tessera",
    version="0.1.0",
    description="A language model from raw text to a served assistant, in JAX and Flax.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["research", "research.*", "configs", "configs.*"]),
    install_requires=[
        "etils>=1.15",
        "flax>=0.12",
        "grain>=0.2.15",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "jinja2>=3.1.6",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "protobuf>=5",
        "psutil>=6",
        "pyarrow>=17",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tensorstore>=0.1.80",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    package_data={"research": ["py.typed"], "research.scaling": ["*.txtpb"]},
    # `tpu` and `cuda` bring the compilers, which need no chip: `cuda` is several GB.
    extras_require={
        "test": [*test, *grammar],
        "parity": parity,
        "dev": [
            *test,
            *parity,
            *zstd,
            *wandb,
            *mlflow,
            *trackio,
            *grammar,
            *docs,
            *notebook,
            "jax[tpu]",
        ],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "zstd": zstd,
        "gcs": gcs,
        "wandb": wandb,
        "mlflow": mlflow,
        "trackio": trackio,
        "grammar": grammar,
        "peers": peers,
        "docs": docs,
        "notebook": notebook,
        "completion": completion,
    },
    entry_points={"console_scripts": ["tessera=research.__main__:main"]},
)
