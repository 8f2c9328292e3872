"""`asr_inference --search espnet` with what ESPnet's search lacks, on a tiny attention model."""

import json

import pytest
import torch

from espnet_llm_plugin.bin import asr_inference, tune_scales
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.attention_ilm import ZeroContextILM
from espnet_llm_plugin.fusion.label_ngram import LabelNgram
from espnet_llm_plugin.fusion.mini_lstm import MiniLSTMILM
from espnet_llm_plugin.fusion.text_scorers import LabelTextScorer
from espnet_llm_plugin.fusion.word_lm import WordLM, score_texts
from espnet_llm_plugin.inference.loading import load_model
from espnet_llm_plugin.inference.nbest_dirs import read_nbest_dir
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, make_lm
from tests.llm.tiny import save_adapted_dir, save_llm_dir

SECONDS = {"utt-a": 0.5, "utt-b": 0.7, "utt-c": 0.9}
LONGEST = 4  # tokens; ESPnet ends hypotheses of so many without asking any scorer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {kind: make_asr(directory / kind, kind) for kind in ("attention", "ctc", "transducer")}
    weights = torch.load(made["attention"].model)
    weights["decoder.output_layer.bias"][-1] += 30.0  # some hypotheses end
    torch.save(weights, made["attention"].model)
    made["mini_lstm"] = directory / "mini_lstm.pth"
    model, _ = load_model(made["attention"].config, made["attention"].model)
    mini_lstm = MiniLSTMILM.new(model)
    torch.nn.init.normal_(mini_lstm.mini_lstm.output.weight, std=3.0)
    mini_lstm.save(made["mini_lstm"])
    made["lm"] = make_lm(directory / "lm", "seq_rnn")
    made["adapted"] = save_adapted_dir(directory / "adapted", TOKENS)
    made["llm"] = save_llm_dir(directory / "llm")
    made["wav"] = make_audio(directory / "wav", SECONDS)
    return made


@pytest.fixture(scope="module")
def decode(files, tmp_path_factory):
    def run(*options, kind="attention", read=None):
        directory = tmp_path_factory.mktemp("out")
        asr_inference.main(
            [
                *files[kind].asr_options(),
                *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
                *("--output_dir", str(directory), "--num_workers", "0", "--search", "espnet"),
                *("--ctc_weight", "0.3", "--maxlenratio", str(-LONGEST)),
                *("--beam_size", "5", "--nbest", "60", *map(str, options)),
            ]
        )
        return read_nbest_dir(read or directory)

    return run


@pytest.fixture(scope="module")
def plain(decode):
    return decode()


def compare(plain, found, score):
    """What was added to each hypothesis that both lists have is ``score`` of it (ended or cut)."""
    added, cut = [], []
    for utt, entries in found.items():
        before = {tuple(entry.token_ids): entry.score for entry in plain[utt]}
        for entry in entries:
            ids = tuple(entry.token_ids)
            if ids in before and len(TOKENS) - 1 not in ids:  # ended once more than it has
                expected = score(entry, len(ids) < LONGEST)
                assert entry.score - before[ids] == pytest.approx(expected, abs=5e-4)
                added.append(abs(expected))
                cut.append(len(ids) == LONGEST)
    assert max(added) > 0.1 and cut.count(False) >= 2 and cut.count(True) >= 2


def of_words(lm, entry, ended):
    """LLM score of the whole text; where it was cut, of the words that were complete."""
    if ended:
        return score_texts(lm, [entry.text])[0]
    letters = "".join(" " if token == "<space>" else token for token in entry.tokens)
    text = " ".join(letters[: letters.rfind(" ") + 1].split())
    return score_texts(lm, [text], ended=False)[0]


def of_labels(scorers, entry, ended):
    ((_, score),) = next(scorers[ended].score_batches([tuple(entry.token_ids)]))
    return score


def label_scorers(forward):
    """By whether the end is scored."""
    device = torch.device("cpu")
    return {
        ended: LabelTextScorer(forward, len(TOKENS), device, end="eos" if ended else "none")
        for ended in (True, False)
    }


@pytest.mark.parametrize("end", ["eos", "none"])
def test_llm_in_its_own_vocabulary(files, decode, plain, end):
    lm = WordLM(str(files["llm"]), end=end)
    found = decode("--fusion_llm", files["llm"], "--lm_weight", "0.05", "--lm_eos", end)
    compare(plain, found, lambda *of: 0.05 * of_words(lm, *of))


@pytest.mark.parametrize("end", ["eos", "none"])
def test_an_ngram_stands_in_for_the_llm(files, decode, plain, end, tmp_path):
    """Of sentences nothing of it is left; of those that were cut, the last word."""
    ngram = LabelNgram.estimate([[2, 3, 4, 2], [5, 3]], len(TOKENS), order=3)
    ngram.save(tmp_path / "ngram.npz", TOKENS)
    lm, eos, begins = WordLM(str(files["llm"]), end=end), len(TOKENS) - 1, TOKENS.index("<space>")
    options = ["--fusion_llm", files["llm"], "--lm_weight", "0.05", "--lm_eos", end]
    found = decode(*options, "--fusion_ngram", tmp_path / "ngram.npz")

    def score(entry, ended):
        total = of_words(lm, entry, ended)
        ids = torch.tensor([eos, *entry.token_ids])
        start = max((i for i, token in enumerate(ids.tolist()) if token == begins), default=1)
        for i in range(len(ids) if ended else start, len(ids)):
            total += float(ngram.score(ids[:i], None, None)[0][ids[i]])
        return 0.05 * total

    compare(plain, found, score)


def adapted(files):
    llm = files["adapted"]
    return ["--lm_train_config", llm / "espnet_lm.yaml", "--lm_file", llm / "espnet_lm.pth"]


def test_llm_in_the_pieces(files, decode, plain):
    from espnet_llm_plugin.llm.causal_llm import CausalLLM

    lm = CausalLLM(len(TOKENS), llm=str(files["adapted"]), frozen=True).eval()
    scorers = label_scorers(lambda ids: lm(ids, None)[0])
    found = decode(*adapted(files), "--lm_weight", "0.05")
    compare(plain, found, lambda *of: 0.05 * of_labels(scorers, *of))


@pytest.fixture(scope="module")
def ilm(files):
    attention = files["attention"]
    model, _ = load_model(attention.config, attention.model)
    ilm = ZeroContextILM.of(model)
    return label_scorers(lambda ids: ilm(ids, None)[0])


def test_internal_lm_is_subtracted(decode, plain, ilm):
    found = decode("--ilm", "zero_context", "--ilm_weight", "0.05")
    compare(plain, found, lambda *of: -0.05 * of_labels(ilm, *of))


def test_mini_lstm_is_subtracted(files, decode, plain, ilm):
    model, _ = load_model(files["attention"].config, files["attention"].model)
    mini_lstm = MiniLSTMILM.load(files["mini_lstm"], model)
    scorers = label_scorers(lambda ids: mini_lstm(ids, None)[0])
    options = ["--ilm", "mini_lstm", "--ilm_file", files["mini_lstm"], "--ilm_weight", "0.05"]
    found = decode(*options)
    compare(plain, found, lambda *of: -0.05 * of_labels(scorers, *of))
    entry = found["utt-c"][0]
    assert abs(of_labels(scorers, entry, True) - of_labels(ilm, entry, True)) > 0.1


@pytest.mark.parametrize("ilm", ["zero_context", "mini_lstm"])
def test_other_precision(files, decode, ilm):
    options = ["--ilm", ilm, "--ilm_weight", "0.05"]
    options += ["--ilm_file", files["mini_lstm"]] if ilm == "mini_lstm" else []
    single, double = decode(*options), decode(*options, "--dtype", "float64")
    for utt, entries in single.items():
        assert double[utt][0].score == pytest.approx(entries[0].score, abs=1e-3)


@pytest.mark.parametrize("kind", ["own", "pieces"])
def test_joint_sum_of_all(files, decode, plain, ilm, kind):
    """CTC + attention decoder + LLM - internal LM."""
    if kind == "own":
        lm = WordLM(str(files["llm"]))
        options = ["--fusion_llm", files["llm"]]
    else:
        options = adapted(files)
    only_lm = decode(*options, "--lm_weight", "0.05")
    options += ["--lm_weight", "0.05", "--ilm", "zero_context", "--ilm_weight", "0.05"]
    found = decode(*options)
    compare(only_lm, found, lambda *of: -0.05 * of_labels(ilm, *of))
    if kind == "own":
        compare(plain, found, lambda *of: 0.05 * of_words(lm, *of) - 0.05 * of_labels(ilm, *of))


def test_weights_of_zero_change_nothing(files, decode, plain, tmp_path):
    options = ["--fusion_llm", files["llm"], "--lm_weight", "0", "--ilm", "zero_context"]
    assert decode(*options, "--output_dir", tmp_path, read=tmp_path) == plain
    times = json.loads((tmp_path / "rtf.json").read_text())
    assert times["utterances"] == len(SECONDS)
    assert times["audio_seconds"] == pytest.approx(sum(SECONDS.values()))
    rounded = 0.006 / times["audio_seconds"]  # seconds have two digits
    assert times["rtf"] == pytest.approx(times["seconds"] / times["audio_seconds"], abs=rounded)
    assert times["cpu_rtf"] > 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("attention", "--ilm_weight 0.3", "that of an attention decoder: --ilm zero_context"),
        ("attention", "--ilm bigram", "that of an attention decoder: --ilm zero_context"),
        ("attention", "--ilm mini_lstm", "--ilm_file is missing: mini-LSTM written by train_ilm"),
        ("attention", "--ilm zero_context --ilm_file x", "is for --ilm mini_lstm, not zero"),
        ("attention", "--ilm_file x", "that of an attention decoder: --ilm zero_context"),
        ("attention", "--lm_eos none", "--lm_eos none: with --search espnet it needs --fusion_llm"),
        ("attention", "--fusion_ngram LLM", "with --search espnet it needs --fusion_llm"),
        ("attention", "--fusion_llm LLM --fusion_ngram ./none", "--fusion_ngram ./none"),
        ("attention", "--fusion_llm LLM LM", "is another LM: give one"),
        ("attention", "--fusion_llm ADAPTED", "adapted to an ASR token list"),
        ("attention", "--fusion_llm LLM --fusion delayed", "knows no --fusion"),
        ("attention", "--fusion_llm LLM --time_sync true", "not to BeamSearchTimeSync"),
        ("ctc", "--ilm zero_context --ctc_weight 1 --ilm_weight 0.3", "CTC only"),
        ("attention", "--ilm zero_context --search ours", "use `--search espnet`"),
        ("transducer", "--ilm zero_context --search ours", "an RNN-T has zero_encoder and bigram"),
        ("transducer", "--ilm mini_lstm --search ours", "an RNN-T has zero_encoder and bigram"),
    ],
)
def test_what_is_refused(files, decode, kind, options, message):
    known = {"LLM": [files["llm"]], "ADAPTED": [files["adapted"]], "LM": files["lm"].lm_options()}
    words = [given for word in options.split() for given in known.get(word, [word])]
    with pytest.raises(UserError, match=message):
        decode(*words, kind=kind)


def test_tuning_of_transducers_knows_no_zero_context(files, tmp_path):
    text = tmp_path / "text"
    text.write_text("utt-a ab\nutt-b c\nutt-c d\n")
    with pytest.raises(UserError, match="an RNN-T has zero_encoder and bigram"):
        tune_scales.main(
            [
                *files["transducer"].asr_options(),
                *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
                *("--text", str(text), "--output_dir", str(tmp_path), "--ilm", "zero_context"),
            ]
        )
