"""One distribution: the packages of the MOVA pretraining framework.

pip install -r requirements.lock && pip install --no-deps --no-build-isolation -e .   # the exact versions
pip install -e .                                                                      # or newer ones
"""

from setuptools import find_packages, setup

ROOMS = ["model", "data", "train", "launch", "tools", "conf"]
PACKAGES = find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")])

setup(
    name="mova-pretrain",
    version="0.1.0",
    description="Pretraining of MOVA, the joint video-audio diffusion transformer",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=PACKAGES,
    package_data={"conf": ["**/*.yaml"], "launch": ["*.template"], "tools.report": ["page.*"]},
    install_requires=[
        "torch>=2.11.0",
        "torchaudio>=2.11.0",
        "numpy>=1.26",
        "safetensors>=0.4",
        "hydra-core>=1.3.2",
        "deepspeed>=0.19",
        "webdataset>=1.0",
        "av>=14",
        "decord>=0.6.0; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "wandb>=0.19",
        "rich>=13",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "pyyaml>=6",
        "pyarrow>=18",
        "silero-vad>=6",
        "speechmos>=0.0.1",
        "scenedetect-headless>=0.6",
        "onnxruntime>=1.18",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.7"],
        "encoders": ["diffusers>=0.35", "transformers>=4.50", "ftfy>=6"],
        "dev": [
            "pytest>=8",
            "ruff>=0.8",
            "mypy>=1.13",
            "types-PyYAML>=6",
            "psutil>=6",
            "moto[server]>=5",
            "awscli>=1.42",
        ],
    },
)
