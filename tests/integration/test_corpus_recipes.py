"""The recipes of all corpora as users run them: data stages on tiny corpora."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from espnet_llm_plugin.data.corpora import mini_fleurs, mini_librispeech, mini_loquacious, mini_mls
from espnet_llm_plugin.data.corpora.mini_fleurs import make_mini_fleurs
from espnet_llm_plugin.data.corpora.mini_librispeech import make_mini_librispeech
from espnet_llm_plugin.data.corpora.mini_loquacious import make_mini_loquacious
from espnet_llm_plugin.data.corpora.mini_mls import make_mini_mls
from espnet_llm_plugin.data.indic_text import LANGUAGES as INDIC
from tests.data.conftest import table

pytestmark = pytest.mark.integration
pytest.importorskip("espeakng_loader", reason="espeakng-loader (extra `demo`) is not installed")

MWER = "finetune_mwer_small"
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


def test_data_of_loquacious(recipes, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow (extra `recipes`) is not installed")
    sizes = mini_loquacious.Sizes(train=40, dev=2, test=3, lm=20)
    make_mini_loquacious(tmp_path / "corpus", sizes)
    recipe = recipes / "loquacious" / "asr1"
    arguments = ["--loquacious", tmp_path / "corpus", "--nbpe", "60", "--llm", "somewhere"]
    arguments += ["--lm_text", tmp_path / "corpus" / mini_loquacious.LM_TEXT]
    result = run(recipe, *arguments, *DATA_STAGES)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "train_small: 40 utterances, 0.04 hours; none skipped" in result.stdout
    dump = recipe / "dump/raw"
    sizes = {name: len(table(dump / name / "text")) for name in ("train_small", "dev", "test")}
    assert sizes == {"train_small": 40, "dev": 2, "test": 3}
    assert table(dump / "train_small/spk2gender")
    assert all(path.endswith(".flac") for path in table(dump / "test/wav.scp").values())
    assert len((recipe / "data/token_list/bpe_unigram60/tokens.txt").read_text().split()) == 60
    assert len(table(recipe / "data/lm_train/text")) == 20


def test_data_of_fleurs(recipes, tmp_path):
    """All ten languages: every character of the transcripts has a piece, and comes back."""
    pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")
    import sentencepiece

    make_mini_fleurs(tmp_path / "corpus", mini_fleurs.Sizes(train=24, dev=1, test=2))
    recipe = recipes / "indic" / "asr1"
    arguments = ["--fleurs", tmp_path / "corpus", "--nbpe", "400", "--text_opts", "--digits native"]
    result = run(recipe, *arguments, *DATA_STAGES)
    assert result.returncode == 0, result.stdout + result.stderr
    dump = recipe / "dump/raw"
    assert {name: len(table(dump / name / "utt2lang")) for name in ("train", "dev", "test")} == {
        "train": 4 * 24 + 4 * 12 + 2 * 8,
        "dev": 10,
        "test": 20,
    }
    assert list(table(dump / "train/category2utt")) == sorted(INDIC)
    pieces = recipe / "data/token_list/bpe_unigram400"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "bpe.model"))
    assert len((pieces / "tokens.txt").read_text("utf-8").split("\n")) == 401
    for text in table(dump / "train/text").values():
        ids = processor.encode(text)
        assert processor.unk_id() not in ids and processor.decode(ids) == text


def test_data_of_synthetic_librispeech(recipes):
    """`--mini true` up to the token lists of the recogniser and of the small LLM."""
    recipe = recipes / "librispeech" / "asr1"
    result = run(recipe, "--mini", "true", *DATA_STAGES)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(table(recipe / "dump/mini/raw/train_960/text")) == 600
    for tokens in ("token_list/bpe_unigram200", "token_list_llm/bpe_unigram300"):
        assert (recipe / "data/mini" / tokens / "tokens.txt").is_file()


def test_all_steps_on_synthetic_librispeech(recipes):
    """Weak LM, swap as trained and tuned, MWER, and their page: `--mini true`, a few updates each.

    Without the CTC model and the fine-tuning of the LLM, which egs2/custom and egs2/mini have.
    """
    recipe = recipes / "librispeech" / "asr1"
    grid = recipe / "one_point.yaml"
    grid.write_text("alphas: [0.5]\nbetas: [0.3]\nlabel_bonuses: [1.0]\nbeam_size: 2\n")
    few = "--max_epoch 1 --num_iters_per_epoch 4"
    options = ["--ctc_config", "none", "--lm_config", "none", "--nj", "1"]
    options += ["--asr_args", few, "--lm_args", few, "--test_sets", "dev_clean"]
    options += ["--tune_config", "one_point.yaml", "--as_trained_config", "one_point.yaml"]
    result = run(recipe, "--mini", "true", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    weak, mwer = (recipe / "exp/mini" / f"asr_{name}" for name in ("train_ft_weak", MWER))
    rates = []
    for decoding in ("decode", "decode_swap_small_as_trained", "decode_swap_small"):
        scores = json.loads((weak / decoding / "dev_clean/scores.json").read_text())
        rates.append(scores["wer"]["rate"])
        page = (weak / decoding / "diagnosis.md").read_text()
        assert ("## LM swap" in page) == (decoding == "decode_swap_small")
    scores = json.loads((mwer / "decode/dev_clean/scores.json").read_text())
    rates.append(scores["wer"]["rate"])
    names = ("weak LM", "strong LM, untuned", "strong LM, tuned", "strong LM, trained further")
    page = (mwer / "decode/diagnosis.md").read_text()
    assert all(f"|{name}|{rate:.2f}|" in page for name, rate in zip(names, rates))
    # with the scales that were tuned for the swap, and the checkpoint that MWER chooses
    config = yaml.safe_load((mwer / "config.yaml").read_text())
    scales = {"lm_scale": 0.5, "beta": 0.3, "label_bonus": 1.0}
    assert scales.items() <= config["decoder_conf"].items()
    assert (mwer / "valid.mwer_expected_errors.ave.pth").is_file()


def test_data_of_synthetic_mls(recipes):
    """`--mini true` with two of the languages, which have words for a few pieces only."""
    recipe = recipes / "mls" / "asr1"
    options = ["--langs", "en pl", "--nbpe", "100", "--llm", "not/loaded"]
    result = run(recipe, "--mini", "true", *options, *DATA_STAGES)
    assert result.returncode == 0, result.stdout + result.stderr
    languages = Counter(table(recipe / "dump/mini/raw/train/utt2lang").values())
    assert languages == {"en": 160, "pl": 80}
    assert (recipe / "data/mini/token_list/bpe_unigram100/tokens.txt").is_file()


def test_data_of_synthetic_fleurs(recipes):
    """`--mini true` with two of the languages, up to the tokens of the small LLM."""
    pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")
    recipe = recipes / "indic" / "asr1"
    result = run(recipe, "--mini", "true", "--langs", "ur ta", *DATA_STAGES)
    assert result.returncode == 0, result.stdout + result.stderr
    languages = Counter(table(recipe / "dump/mini/raw/train/utt2lang").values())
    assert languages == {"ta": 60, "ur": 60}
    for tokens in ("token_list/bpe_unigram100", "token_list_llm/bpe_unigram110"):
        assert (recipe / "data/mini" / tokens / "tokens.txt").is_file()


@pytest.mark.parametrize(
    ("corpus", "arguments", "message"),
    [
        (
            "indic",
            ["--langs", "hi ur"],
            "`pip install datasets; lhotse download fleurs -l hi_in -l ur_pk",
        ),
        ("indic", ["--fleurs", "nowhere"], "nowhere is not a directory; expected one with hi_in"),
        ("indic", ["--fleurs", ".", "--langs", "hi en"], "unknown language code 'en'; expected"),
        ("indic", ["--fleurs", ".", "--langs", "hi"], ". has no FLEURS of 'hi' (hi_in)"),
        ("indic", ["--fleurs", ".", "--text_opts", "--digits x"], "invalid choice: 'x'"),
        ("mls", [], "--mls is missing"),
        ("mls", ["--mls", "nowhere"], "nowhere is not a directory; expected one with mls_german"),
        ("mls", ["--mls", ".", "--langs", "en ru"], "the languages are 'en ru'; expected"),
        ("mls", ["--mini", "yes"], "--mini is 'yes'; expected true or false"),
        ("mls", ["--mls"], "option --mls needs a value"),
        ("mls", ["--mls", ".", "--langs", "en", "--wrong", "x"], "unknown option --wrong"),
        ("librispeech", ["--librispeech", "nowhere"], "nowhere is not a directory; expected"),
        ("librispeech", ["--librispeech", "."], "lacks train-clean-100, train-clean-360"),
        ("librispeech", ["--train_set", "train_5"], "has no set 'train_5'; expected some of"),
        ("loquacious", ["--loquacious", "nowhere"], "nowhere is not a directory; expected a copy"),
        ("loquacious", ["--loquacious", "."], "no Parquet files of configuration 'small'"),
    ],
)
def test_mistakes_end_in_one_message(recipes, corpus, arguments, message):
    result = run(recipes / corpus / "asr1", *arguments)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("corpus", ["indic", "librispeech", "loquacious", "mls"])
def test_help(recipes, corpus):
    result = run(recipes / corpus / "asr1", "--help")
    assert result.returncode == 0
    data = {"indic": "fleurs"}.get(corpus, corpus)
    for word in ("--mini true", f"--{data} DIR", "--finetune_config", "stage 11", "--ngpu"):
        assert word in result.stdout
    assert len((recipes / corpus / "asr1" / "run.sh").read_text().splitlines()) < 60


@pytest.fixture
def steps(recipes, tmp_path):
    """Run a recipe with an asr_llm.sh that only notes its options; returns those of each call."""
    shutil.copytree(recipes, tmp_path / "egs2", symlinks=True)
    shutil.copytree(recipes.parent / "conf", tmp_path / "conf")
    stand_in = tmp_path / "egs2/TEMPLATE/asr1/asr_llm.sh"
    stand_in.write_text("#!/usr/bin/env bash\nprintf '%s\\t' \"$@\" >> calls\necho >> calls\n")

    def run_steps(corpus, *arguments):
        recipe = tmp_path / "egs2" / corpus / "asr1"
        (recipe / "calls").unlink(missing_ok=True)
        result = run(recipe, *arguments, "--stop_stage", "12")
        assert result.returncode == 0, result.stderr
        calls = []
        for line in (recipe / "calls").read_text().split("\t\n")[:-1]:
            words = line.split("\t")
            calls.append(dict(zip(words[::2], words[1::2])))  # of an option given twice, the last
        return calls

    return run_steps


def test_steps_of_transducer_llama(steps):
    arguments = ["--librispeech", "DIR", "--llm", "org/LLM", "--lm_text", "TEXT", "--ngpu", "2"]
    calls = steps("librispeech", *arguments, "--finetune_config", "conf/x/mwer.yaml")
    data, ctc, weak, lm, as_trained, swap, finetune = calls
    assert all(call["--ngpu"] == "2" and call["--nbpe"] == "5000" for call in calls)
    assert "--librispeech DIR" in data["--local_data_opts"]
    assert "--lm_text TEXT" in data["--local_data_opts"]
    assert all(call["--skip_data_prep"] == "true" for call in calls[1:])
    assert ctc["--asr_config"] == "conf/ctc/train_ctc_conformer.yaml"
    assert weak["--asr_config"] == "conf/transducer/train_ft_stateless.yaml"
    assert weak["--ctc_init"] == f"exp/asr_{ctc['--asr_tag']}"
    assert lm["--use_lm"] == "true" and lm["--llm"] == "org/LLM"
    assert lm["--lm_train_text"] == "data/lm_train/text"
    assert swap["--swap_llm"] == f"exp/lm_{lm['--lm_tag']}/llm" == "exp/lm_LLM/llm"
    assert swap["--asr_tag"] == weak["--asr_tag"] and swap["--skip_train"] == "true"
    assert (weak["--inference_tag"], swap["--inference_tag"]) == ("decode", "decode_swap_LLM")
    assert swap["--tune_config"] == "conf/librispeech/tune.yaml"
    assert as_trained == {
        **swap,
        "--tune_config": "conf/librispeech/tune_as_trained.yaml",
        "--inference_tag": "decode_swap_LLM_as_trained",  # as asr_llm.sh looks for it
    }
    assert finetune["--inference_asr_model"] == "valid.loss.ave.pth"
    assert finetune["--asr_config"] == "conf/x/mwer.yaml"
    assert finetune["--pretrained_model"].startswith(f"exp/asr_{weak['--asr_tag']}/")
    assert finetune["--pretrained_model"].endswith(":::decoder.predictor")
    assert finetune["--asr_args"].split() == ["--decoder_conf", "predictor_conf.llm=exp/lm_LLM/llm"]


def test_steps_can_be_left_out(steps):
    arguments = ["--librispeech", "DIR", "--ctc_config", "none", "--asr_config", "conf/my.yaml"]
    data, weak = steps("librispeech", *arguments)
    assert weak["--asr_config"] == "conf/my.yaml" and "--ctc_init" not in weak
    assert "--lm_text" not in data["--local_data_opts"]  # nothing is downloaded for no LLM
    more = ["--llm", "L", "--lm_config", "none", "--as_trained_config", "none"]
    _, _, lm, swap = steps("librispeech", *arguments, *more)
    assert lm["--lm_config"] == "" and swap["--swap_llm"] == "exp/lm_L/llm"


@pytest.mark.parametrize("corpus", ["librispeech", "loquacious", "mls"])
def test_mini_ends_with_mwer(steps, root, corpus):
    """The paper's three steps; every configuration is there."""
    *_, as_trained, swap, finetune = calls = steps(corpus, "--mini", "true")
    configs = [value for call in calls for value in call.values() if value.startswith("conf/")]
    assert all((root / value).is_file() for value in configs)
    assert finetune["--asr_config"] == f"conf/{corpus}/mini/finetune_mwer.yaml"
    assert finetune["--asr_tag"] == "finetune_mwer_small"
    assert finetune["--inference_asr_model"] == "valid.mwer_expected_errors.ave.pth"
    assert as_trained["--tune_config"] == "conf/mini/tune_as_trained.yaml"
    *_, last = steps(corpus, "--mini", "true", "--finetune_config", "none")
    assert last == swap


def test_mini_without_a_configuration_of_mwer(steps):
    *_, swap = steps("indic", "--mini", "true")
    assert swap["--inference_tag"] == "decode_swap_small"


@pytest.mark.parametrize("first", ["dev", "dev_clean"])
def test_page_after_mwer_compares_with_the_steps_before(steps, tmp_path, first):
    """Weak LM, swap as trained and tuned, on the first set that is scored."""
    weak = tmp_path / "egs2/librispeech/asr1/exp/asr_train_ft_stateless"
    arguments = ["--librispeech", "DIR", "--llm", "L", "--finetune_config", "conf/x/mwer.yaml"]
    arguments += ["--eval_valid_set", str(first == "dev").lower()]
    arguments += ["--diagnose_args", "--resamples 100"]

    def options():
        return steps("librispeech", *arguments)[-1]["--diagnose_args"].split()

    assert options() == ["--resamples", "100"]  # nothing is scored yet
    tags = ("decode", "decode_swap_L_as_trained", "decode_swap_L")
    for tag in tags:
        (weak / tag / first).mkdir(parents=True)
        (weak / tag / first / "scores.json").touch()
    places = [f"exp/asr_train_ft_stateless/{tag}/{first}" for tag in tags]
    compared = ["--weak", places[0], "--untuned", places[1], "--swapped", places[2]]
    assert options() == [*compared, "--resamples", "100"]
    (weak / "decode/nll").mkdir()
    (weak / "decode/nll/nll.json").touch()
    report = weak.parent / "lm_L/adapted/vocabulary_report.json"
    report.parent.mkdir(parents=True)
    report.touch()
    more = ["--weak_nll", "exp/asr_train_ft_stateless/decode/nll/nll.json"]
    more += ["--vocabulary_report", "exp/lm_L/adapted/vocabulary_report.json"]
    assert options() == [*compared, *more, "--resamples", "100"]


@pytest.mark.parametrize("balance", ["0.3", "none"])
def test_mls_balances_languages(steps, balance):
    _, *trainings = steps(
        "mls", "--mls", "DIR", "--balance", balance, "--asr_args", "--max_epoch 1"
    )
    for call in trainings:
        assert call["--bpe_train_text"] == "data/balanced_text"
        assert call["--asr_args"].startswith("--max_epoch 1")
        balanced = "--batch_type catpow --upsampling_factor 0.3" in call["--asr_args"]
        assert balanced == (balance == "0.3")


def test_indic_has_the_steps_of_mls(steps):
    """CTC, factorized transducer, LLM and swaps, on balanced languages and pieces with joiners."""
    more = ["--kathbath", "K", "--shrutilipi", "S", "--text_opts", "--joiners keep"]
    data, ctc, weak, lm, _, swap = steps("indic", "--fleurs", "DIR", "--llm", "org/LLM", *more)
    options = data["--local_data_opts"]
    assert "--fleurs DIR --kathbath K --shrutilipi S --joiners keep --langs hi bn ta" in options
    for call in (data, ctc, weak, lm, swap):
        assert call["--bpe_normalization"] == "nfkc" and call["--nbpe"] == "5000"
        assert call["--bpe_train_text"] == "data/balanced_text"
    assert "--upsampling_factor 0.5" in ctc["--asr_args"]
    assert weak["--ctc_init"] == f"exp/asr_{ctc['--asr_tag']}"
    assert swap["--swap_llm"] == "exp/lm_LLM/llm"


def test_indic_speech_llm_with_a_given_configuration(steps):
    """BLOOM, which knows all ten languages, unless another configuration is named."""
    arguments = ["indic", "--fleurs", "DIR", "--llm", "org/LLM"]
    *_, tokens, alone = steps(*arguments, "--system", "speech_llm")
    assert alone["--asr_config"] == "conf/speech_llm/train_bloom560m_240ms.yaml"
    assert (tokens["--token_type"], tokens["--llm"]) == ("hugging_face", "org/LLM")
    assert alone["--inference_config"] == "conf/indic/decode_speech_llm.yaml"
    other = "conf/speech_llm/train_qwen2_0.5b_lora.yaml"
    *_, alone = steps(*arguments, "--speech_llm_config", other)
    assert alone["--asr_config"] == other and alone["--asr_tag"] == "train_qwen2_0.5b_lora_LLM"


SPEECH_LLM = ["--system", "speech_llm", "--llm", "org/LLM", "--ngpu", "2"]


def test_speech_llm_over_the_pieces(steps):
    """LibriSpeech, as arXiv 2603.15045: adapted LLM, decoded alone and jointly with the CTC."""
    arguments = ["--librispeech", "DIR", "--lm_text", "TEXT"]
    data, ctc, lm, alone, joint = steps("librispeech", *arguments, *SPEECH_LLM)
    assert all(call["--ngpu"] == "2" and call["--nbpe"] == "10000" for call in (data, ctc, joint))
    assert ctc["--asr_config"] == "conf/speech_llm/train_ctc_60ms.yaml"
    assert ctc["--inference_config"] == ""  # the speech LLM's is not for it
    assert lm["--llm"] == "org/LLM" and lm["--lm_train_text"] == "data/lm_train/text"
    for call in (alone, joint):
        assert call["--asr_config"] == "conf/speech_llm/train_qwen2_0.5b_spm10k.yaml"
        assert call["--asr_tag"] == "train_qwen2_0.5b_spm10k_LLM"
        assert call["--ctc_init"] == f"exp/asr_{ctc['--asr_tag']}"
        assert call["--asr_args"].split() == ["--decoder_conf", "llm=exp/lm_LLM/llm"]
        assert "--token_type" not in call
    assert alone["--inference_config"] == "conf/librispeech/decode_speech_llm.yaml"
    assert "--tune_config" not in alone
    assert joint["--inference_config"] == "conf/librispeech/decode_speech_llm_joint.yaml"
    assert joint["--tune_config"] == "conf/librispeech/tune_speech_llm.yaml"
    assert (alone["--inference_tag"], joint["--inference_tag"]) == ("decode_alone", "decode_joint")
    assert joint["--alone_tag"] == "decode_alone"


def test_speech_llm_over_its_own_tokens(steps):
    """MLS, as arXiv 2307.11795: the LLM's tokens, greedy; languages balanced."""
    data, ctc, tokens, alone = steps("mls", "--mls", "DIR", *SPEECH_LLM)
    assert data["--nbpe"] == "1500"
    assert ctc["--asr_config"] == "conf/speech_llm/train_ctc_80ms.yaml"
    for call in (tokens, alone):
        assert (call["--token_type"], call["--llm"]) == ("hugging_face", "org/LLM")
    assert tokens["--stage"] == tokens["--stop_stage"] == "5"
    assert alone["--asr_config"] == "conf/speech_llm/train_llama7b_240ms.yaml"
    assert alone["--asr_args"].endswith("--decoder_conf llm=org/LLM")
    assert "--upsampling_factor 0.5" in alone["--asr_args"]
    assert alone["--inference_config"] == "conf/mls/decode_speech_llm.yaml"


CTC_PIECES = {
    "ctc_vocabulary.token_list": "data/pieces/tokens.txt",
    "ctc_vocabulary.bpemodel": "data/pieces/bpe.model",
}


@pytest.fixture
def trained_ctc(tmp_path):
    """The configuration of a recipe's finished CTC model, whose pieces are in data/pieces."""

    def make(corpus, exp="exp/asr_train_ctc_80ms"):
        place = tmp_path / "egs2" / corpus / "asr1" / exp
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(
            "token_list:\n- <blank>\nbpemodel: data/pieces/bpe.model\n"
        )

    return make


def confs(call):
    """``decoder_conf`` and ``model_conf`` of a call, as ESPnet reads file and options."""
    from espnet_llm_plugin.training_config import read_training_config

    config = read_training_config(
        Path(__file__).parents[2] / call["--asr_config"], call["--asr_args"]
    )
    return config["decoder_conf"], config["model_conf"]


def test_ctc_pieces_beside_the_llms_tokens(steps, trained_ctc):
    """A configuration with a vocabulary of the CTC gets the files of the CTC model's pieces."""
    trained_ctc("mls")
    config = ["--asr_config", "conf/speech_llm/train_qwen2_0.5b_lora.yaml"]
    *_, alone = steps("mls", "--mls", "DIR", *SPEECH_LLM, *config, "--balance", "none")
    assert alone["--asr_args"].split() == [
        *(word for pair in CTC_PIECES.items() for word in ("--model_conf", "=".join(pair))),
        *["--decoder_conf", "llm=org/LLM"],
    ]


CORPORA = {
    "indic": ["--fleurs", "hi bn ta te ml kn gu mr pa ur"],
    "mls": ["--mls", "en de nl fr es it pt pl"],
}
PREFIX_TUNING = sorted(
    path.name for path in (Path(__file__).parents[2] / "conf/prefix_tuning").glob("train_*.yaml")
)


@pytest.mark.parametrize("corpus", CORPORA)
def test_prefix_tuning_of_every_corpus(steps, trained_ctc, corpus):
    """Each configuration gets the languages and the pieces of the recipe that it is used in."""
    from espnet_llm_plugin.speech_llm.soft_prompt import SoftPromptOptions

    trained_ctc(corpus)
    option, langs = CORPORA[corpus]
    seen = Counter()
    for name in PREFIX_TUNING:
        config = ["--asr_config", f"conf/prefix_tuning/{name}"]
        if corpus == "indic":
            config[0] = "--speech_llm_config"
        *_, alone = steps(corpus, option, "DIR", *SPEECH_LLM, *config)
        decoder, model = confs(alone)
        assert decoder["llm"] == "org/LLM"
        if decoder.get("soft_prompt") == "per_language":
            seen["languages"] += 1
            assert SoftPromptOptions(**decoder["soft_prompt_conf"]).languages == langs.split()
        for head in model.get("auxiliary", []):
            seen[head["loss"]] += 1
            assert (head["weight"], head["tap"] in name or head["tap"] == "llm_prefix") == (
                0.3,
                True,
            )
            if "llm_tokens" not in name:
                assert head["vocabulary"] == {
                    "token_list": "data/pieces/tokens.txt",
                    "bpemodel": "data/pieces/bpe.model",
                }
    assert seen["languages"] == 4 and seen["rnnt"] >= 9 and seen["ctc"] >= 4


def test_languages_that_are_given(steps):
    """Some of the recipe's by --langs; the user's own options and lists win."""
    config = ["--asr_config", "conf/prefix_tuning/train_qwen2_0.5b_frozen_lang_prompt.yaml"]
    arguments = ["mls", "--mls", "DIR", *SPEECH_LLM]
    *_, alone = steps(*arguments, *config, "--langs", "pl pt")
    assert confs(alone)[0]["soft_prompt_conf"] == {"length": 8, "languages": ["pl", "pt"]}
    args = ["--asr_args", "--decoder_conf soft_prompt_conf.languages=[pl,pt,sv]"]
    *_, alone = steps(*arguments, *config, *args)
    assert confs(alone)[0]["soft_prompt_conf"]["languages"] == ["pl", "pt", "sv"]
    # a soft prompt of the options alone
    config = ["--asr_config", "conf/prefix_tuning/train_qwen2_0.5b_frozen.yaml"]
    args = ["--asr_args", "--decoder_conf soft_prompt=per_language"]
    *_, alone = steps(*arguments, *config, *args, "--langs", "en de")
    assert confs(alone)[0]["soft_prompt_conf"]["languages"] == ["en", "de"]


def test_a_trained_model_goes_on(steps, trained_ctc, tmp_path):
    """Nothing of its own is replaced: no CTC model, no languages and pieces of the recipe."""
    trained_ctc("mls")
    config = tmp_path / "egs2/mls/asr1/exp/more/train.yaml"
    config.parent.mkdir(parents=True)
    text = (
        tmp_path / "conf/prefix_tuning/train_qwen2_0.5b_frozen_lang_prompt_rnnt.yaml"
    ).read_text()
    config.write_text(text + "init_param: [exp/more/model.pth]\n")
    arguments = ["--asr_config", "exp/more/train.yaml", "--langs", "pl", "--balance", "none"]
    data, tokens, alone = steps("mls", "--mls", "DIR", *SPEECH_LLM, *arguments)
    assert alone["--asr_args"].split() == ["--decoder_conf", "llm=org/LLM"]
    assert "--ctc_init" not in alone and alone["--asr_stats_dir"] == "exp/asr_stats_train_LLM"
    # parts of another model come after those of the CTC model, which asr_llm.sh sees to
    config.write_text(text + "init_param: ['other.pth:decoder.adapter:decoder.adapter']\n")
    *_, alone = steps("mls", "--mls", "DIR", *SPEECH_LLM, *arguments)
    assert alone["--ctc_init"] == "exp/asr_train_ctc_80ms" and "--asr_stats_dir" not in alone
    assert "languages=" in alone["--asr_args"]


def test_speech_llm_of_loquacious(steps):
    arguments = ["--loquacious", "DIR", "--subset", "large"]
    data, ctc, lm, alone, joint = steps("loquacious", *arguments, *SPEECH_LLM)
    options = data["--local_data_opts"].split()
    assert (
        options[-8:-6] == ["--subset", "large"] and "--loquacious DIR" in data["--local_data_opts"]
    )
    assert all(call["--train_set"] == "train_large" for call in (data, ctc, lm, alone, joint))
    assert all(call["--nbpe"] == "10000" for call in (data, ctc, lm, alone, joint))
    assert ctc["--asr_config"] == "conf/loquacious/train_ctc.yaml"
    assert alone["--asr_config"] == "conf/loquacious/train_qwen2_0.5b_spm10k.yaml"
    assert alone["--inference_config"] == "conf/loquacious/decode_speech_llm.yaml"
    assert lm["--lm_train_text"] == ""  # the transcripts
    lm = steps("loquacious", *arguments, *SPEECH_LLM, "--lm_text", "TEXT")[2]
    assert lm["--lm_train_text"] == "data/lm_train/text"


@pytest.mark.parametrize(
    ("corpus", "config"),
    [
        ("librispeech", "conf/ctc/train_aed_conformer.yaml"),
        ("loquacious", "conf/loquacious/train_aed.yaml"),
    ],
)
@pytest.mark.parametrize("mini", [True, False])
def test_attention_decoder(steps, root, corpus, config, mini):
    """One model, decoded jointly with CTC and alone, by ESPnet."""
    arguments = ["--mini", "true"] if mini else [f"--{corpus}", "DIR"]
    _, joint, alone = steps(corpus, *arguments, "--system", "aed")
    config = f"conf/{corpus}/mini/train_aed.yaml" if mini else config
    for call in (joint, alone):
        assert call["--asr_config"] == config and (root / config).is_file()
        assert call["--asr_tag"] == Path(config).stem
        assert call["--inference_asr_model"] == "valid.acc.ave.pth"
        assert call["--nbpe"] == ("200" if mini else "10000")
    assert joint["--inference_config"] == "conf/librispeech/decode_aed_joint.yaml"
    assert alone["--inference_config"] == "conf/librispeech/decode_aed.yaml"
    assert alone["--skip_train"] == "true"
    assert (joint["--inference_tag"], alone["--inference_tag"]) == ("decode_joint", "decode_alone")


@pytest.mark.parametrize(
    ("corpus", "units"),
    [
        ("indic", "native"),
        ("mls", "native"),
        ("librispeech", "adapted"),
        ("loquacious", "adapted"),
    ],
)
def test_mini_speech_llm(steps, root, corpus, units):
    """The small LLM learns to copy; every configuration is there."""
    calls = steps(corpus, "--mini", "true", "--system", "speech_llm")
    configs = [value for call in calls for value in call.values() if value.startswith("conf/")]
    assert all((root / value).is_file() for value in configs)
    assert f"conf/{corpus}/mini/train_copy_llama.yaml" in configs
    config = calls[-1]["--asr_config"]
    assert config == f"conf/{corpus}/mini/train_speech_llm.yaml"
    if corpus in CORPORA:  # all parts of prefix tuning
        decoder, model = confs(calls[-1])
        assert decoder["soft_prompt_conf"]["languages"] == CORPORA[corpus][1].split()
        (head,) = model["auxiliary"]
        assert (head["loss"], head["tap"]) == ("rnnt", "llm_prefix") and model["report_wer_utts"]
    assert ("--token_type" in calls[-1]) == (units == "native")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--system", "llm"],
            "--system is 'llm'; expected transducer, speech_llm, aed or combination",
        ),
        (["--system", "speech_llm", "--units", "bpe"], "--units is 'bpe'; expected native or"),
    ],
)
def test_mistakes_of_systems(recipes, arguments, message):
    result = run(recipes / "librispeech/asr1", *arguments)
    assert result.returncode == 2 and message in result.stderr


def test_mls_has_no_attention_decoder(recipes):
    result = run(recipes / "mls/asr1", "--mls", ".", "--system", "aed")
    assert result.returncode == 2 and "has no configuration for MLS" in result.stderr
