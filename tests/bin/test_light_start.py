"""Command lines that a recipe calls for every set and job start in a fraction of a second."""

import subprocess
import sys

import pytest

LIGHT = (
    "check_contamination",
    "ctc_init",
    "diagnose",
    "filter_data_dir",
    "format_wav_scp",
    "leaderboard",
    "llm_perplexity",
    "lstm_predictor",
    "make_synthetic_corpus",
    "make_token_list",
    "merge_data",
    "perturb_audio",
    "perturb_speed",
    "prepare_languages",
    "prepare_lm_text",
    "prepare_loquacious",
    "results_table",
    "sample_text",
    "run_jobs",
    "score",
    "score_language_id",
    "speech_llm_options",
    "split_data",
    "subset_data_dir",
    "validate_data_dir",
)
# Needed by models and plots only; espnet2.tasks stands for ESPnet as a whole.
HEAVY = ("torch", "transformers", "scipy", "matplotlib", "librosa", "espnet2.tasks")

CODE = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module(f"espnet_llm_plugin.bin.{{name}}").get_parser()
from espnet_llm_plugin.__main__ import main
main(["--list"])
main(["--version"])
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_data_and_scoring_import_no_model_code():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["score", "make_token_list"])
def test_heavy_imports_are_not_just_put_off(name, tmp_path):
    """Nor do they import any of it while they work."""
    text = tmp_path / "text"
    text.write_text("a one two\nb two three\n")
    options = {
        "score": ["--ref", text, "--hyp", text, "--output_dir", tmp_path],
        "make_token_list": ["--text", text, "--output_dir", tmp_path, "--token_type", "char"],
    }[name]
    code = (
        "import sys\n"
        f"from espnet_llm_plugin.bin.{name} import main\n"
        f"main({[str(option) for option in options]})\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
