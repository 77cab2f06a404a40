"""One distribution: the packages of the MOVA pretraining framework.

pip install -r requirements.lock && pip install --no-deps --no-build-isolation -e .   # the exact versions
pip install -e .                                                                      # or newer ones
"""

from setuptools import find_packages, setup

ROOMS = ["core", "model", "data", "train", "launch", "tools", "conf"]
PACKAGES = find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")])

setup(
    name="mova-pretrain",
    version="0.1.0",
    description="Pretraining of MOVA, the joint video-audio diffusion transformer",
    license="Apache-2.0",
    python_requires=">=3.11",  # stated here alone: Makefile reads it, tests hold README and pyproject.toml to it
    packages=PACKAGES,
    entry_points={"console_scripts": ["mova = tools.mova:main"]},
    package_data={
        "conf": ["**/*.yaml"],
        "launch.slurm": ["*.template", "*.sh"],
        "tools.report": ["page.*"],
        "tools.plan": ["page.html"],
    },
    install_requires=[
        "torch>=2.11.0",
        "torchaudio>=2.11.0",
        "numpy>=1.26",
        "safetensors>=0.4",
        "hydra-core>=1.3.2",
        "deepspeed>=0.19",
        "webdataset>=1.0",
        "urllib3>=2.3",
        "boto3>=1.36",
        "fsspec>=2024.6",
        "av>=14",
        "wandb>=0.19",
        "rich>=13",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "pyyaml>=6",
        "psutil>=6",
        "pyarrow>=18",
        "silero-vad>=6.2.3",
        "speechmos>=0.0.1",
        "scenedetect-headless>=0.7",
        "onnxruntime>=1.18",
        "xxhash>=3.5",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.7"],
        "float8": ["torchao>=0.18"],
        # transformers 5.0 and 5.1 load Wan's text encoder with zeros for its embedding
        "encoders": [
            "diffusers>=0.35",
            "transformers>=4.50,!=5.0.*,!=5.1.*",
            "accelerate>=1.1",
            "ftfy>=6",
            "sentencepiece>=0.2",
        ],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.8",
            "mypy>=1.13",
            "types-PyYAML>=6",
            "moto[server]>=5",
            "awscli>=1.42",
        ],
    },
)
