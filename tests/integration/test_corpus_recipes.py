"""The recipes of LibriSpeech and MLS as users run them: their data stages on tiny corpora."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from espnet_llm_plugin.data.corpora import mini_librispeech, mini_mls
from espnet_llm_plugin.data.corpora.mini_librispeech import make_mini_librispeech
from espnet_llm_plugin.data.corpora.mini_mls import make_mini_mls
from espnet_llm_plugin.data.corpora.mls import LANGUAGES
from tests.data.conftest import table

pytestmark = pytest.mark.integration
pytest.importorskip("espeakng_loader", reason="espeakng-loader (extra `demo`) is not installed")

DATA_STAGES = ["--stop_stage", "5", "--nj", "1"]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, root):
    """A copy of egs2/ and conf/ without anybody's data and experiments."""
    target = tmp_path_factory.mktemp("recipes")
    ignore = shutil.ignore_patterns("exp", "dump", "data", "downloads")
    shutil.copytree(root / "egs2", target / "egs2", symlinks=True, ignore=ignore)
    shutil.copytree(root / "conf", target / "conf")
    return target / "egs2"


def run(recipe, *arguments):
    python = Path(sys.executable).parent  # `python3` is the one under test
    return subprocess.run(
        ["./run.sh", *map(str, arguments)],
        cwd=recipe,
        env={**os.environ, "PATH": f"{python}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


def test_data_of_librispeech(recipes, tmp_path):
    sizes = mini_librispeech.Sizes(train=30, dev=2, test=2, lm=20)
    make_mini_librispeech(tmp_path / "corpus", sizes)
    recipe = recipes / "librispeech" / "asr1"
    arguments = ["--librispeech", tmp_path / "corpus", "--train_set", "train_460", "--nbpe", "60"]
    arguments += ["--llm", "somewhere", "--lm_text", tmp_path / "corpus" / mini_librispeech.LM_TEXT]
    result = run(recipe, *arguments, *DATA_STAGES)
    assert result.returncode == 0, result.stdout + result.stderr
    dump = recipe / "dump/raw"
    sizes = {
        name: len(table(dump / name / "wav.scp")) for name in os.listdir(dump) if name != "org"
    }
    assert sizes == {"train_460": 60, "dev": 4} | dict.fromkeys(
        ("dev_clean", "dev_other", "test_clean", "test_other"), 2
    )
    assert table(dump / "train_460/spk2gender")
    # 16-bit flac files of the corpus are used in place
    assert all(p.startswith(str(tmp_path)) for p in table(dump / "train_460/wav.scp").values())
    assert len((recipe / "data/token_list/bpe_unigram60/tokens.txt").read_text().split()) == 60
    assert len(table(recipe / "data/lm_train/text")) == 20


def test_data_of_mls(recipes, tmp_path):
    make_mini_mls(tmp_path / "corpus", mini_mls.Sizes(train=30, dev=1, test=1))
    recipe = recipes / "mls" / "asr1"
    arguments = ["--mls", tmp_path / "corpus", "--langs", "en de pl", "--nbpe", "80"]
    result = run(recipe, *arguments, *DATA_STAGES)
    assert result.returncode == 0, result.stdout + result.stderr
    dump = recipe / "dump/raw"
    assert {name: len(table(dump / name / "utt2lang")) for name in ("train", "dev", "test")} == {
        "train": 30 + 15 + 4,
        "dev": 3,
        "test": 3,
    }
    assert list(table(dump / "train/category2utt")) == ["de", "en", "pl"]
    # opus is decoded to flac; the flac files of Polish are used in place
    for key, path in table(dump / "train/wav.scp").items():
        assert path.endswith(".flac") and path.startswith(str(tmp_path)) == key.startswith("pl_")
    balanced = table(recipe / "data/balanced_text")
    characters = dict.fromkeys(("de", "en", "pl"), 0)
    for key, text in balanced.items():
        characters[key[:2]] += len(text)
    assert max(characters.values()) - min(characters.values()) < 70  # less than one sentence
    assert len((recipe / "data/token_list/bpe_unigram80/tokens.txt").read_text().split()) == 80


@pytest.mark.parametrize("corpus, train", [("librispeech", "train_960"), ("mls", "train")])
def test_data_of_the_synthetic_corpora(recipes, corpus, train):
    """`--mini true` as it is, up to the token lists of the recogniser and of the small LLM."""
    recipe = recipes / corpus / "asr1"
    result = run(recipe, "--mini", "true", *DATA_STAGES)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(table(recipe / "dump/mini/raw" / train / "text")) > 400
    if corpus == "mls":
        assert set(table(recipe / "dump/mini/raw/test/utt2lang").values()) == set(LANGUAGES)
    for tokens in ("token_list/bpe_unigram200", "token_list_llm/bpe_unigram300"):
        assert (recipe / "data/mini" / tokens / "tokens.txt").is_file()


@pytest.mark.parametrize(
    ("corpus", "arguments", "message"),
    [
        ("mls", [], "--mls is missing"),
        ("mls", ["--mls", "nowhere"], "nowhere is not a directory; expected one with mls_german"),
        ("mls", ["--mls", ".", "--langs", "en ru"], "the languages are 'en ru'; expected"),
        ("mls", ["--mini", "yes"], "--mini is 'yes'; expected true or false"),
        ("mls", ["--mls"], "option --mls needs a value"),
        ("mls", ["--mls", ".", "--langs", "en", "--wrong", "x"], "unknown option --wrong"),
        ("librispeech", ["--librispeech", "nowhere"], "nowhere is not a directory; expected"),
        ("librispeech", ["--librispeech", "."], "lacks train-clean-100, train-clean-360"),
        ("librispeech", ["--train_set", "train_5"], "has no set 'train_5'; expected some of"),
    ],
)
def test_mistakes_end_in_one_message(recipes, corpus, arguments, message):
    result = run(recipes / corpus / "asr1", *arguments)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("corpus", ["librispeech", "mls"])
def test_help(recipes, corpus):
    result = run(recipes / corpus / "asr1", "--help")
    assert result.returncode == 0
    for word in ("--mini true", f"--{corpus} DIR", "--finetune_config", "stage 11", "--ngpu"):
        assert word in result.stdout
    assert len((recipes / corpus / "asr1" / "run.sh").read_text().splitlines()) < 60
