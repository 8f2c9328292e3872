"""What a speech LLM makes of its audio, against transformers and plain sums, one by one."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from espnet.nets.ctc_prefix_score import CTCPrefixScore

from espnet_llm_plugin.bin import evaluate_audio_use
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.audio_use import embedding_ms, measure, spread
from espnet_llm_plugin.inference.ctc_agreement import (
    AgreementSums,
    Likelihood,
    greedy_text,
    text_likelihood,
)
from espnet_llm_plugin.llm.backbone import load_causal_lm
from espnet_llm_plugin.scoring.audio_use import AudioUse, read_audio_use
from espnet_llm_plugin.scoring.similarity import alignment
from espnet_llm_plugin.speech_llm.decoder import Audio
from espnet_llm_plugin.speech_llm.heads.vocabulary import PieceVocabulary, TokenVocabulary
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, make_speech_llm
from tests.llm.tiny import save_adapted_dir
from tests.speech_llm.tiny import batch, model, reference_logits, single
from tests.speech_llm.tiny_llm import TOKENS as LLM_TOKENS
from tests.speech_llm.tiny_llm import save_adapted, save_native

SPEECH_AND_TEXT = ("speech", "speech_lengths", "text", "text_lengths")
NAMES = ["a", "b", "c"]
CTC = {"model_conf": {"ctc_weight": 0.3}}
PROMPT = {"before": "bad", "after": " cab"}


def batches(*datas):
    for number, data in enumerate(datas):
        names = [f"{name}{number or ''}" for name, _ in zip(NAMES, data[0])]
        yield names, dict(zip(SPEECH_AND_TEXT, data))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "adapted")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return save_native(tmp_path_factory.mktemp("native"))


@pytest.fixture
def made(llm):
    return model(llm, prompt=PROMPT, **CTC).eval()


def audio_of(made, data, i):
    """Embeddings (P, D) of one utterance."""
    speech, lengths, _, _ = single(data, i)
    with torch.no_grad():
        audio = made.decoder.adapt(*made.encode(speech, lengths))
    return audio.embeddings[0, : int(audio.lengths)]


def text_of(data, i):
    return data[2][i, : data[3][i]].tolist()


def slow_nll(llm, made, audio, text):
    logits = reference_logits(load_causal_lm(llm), made.decoder, audio, text).double()
    log_probs = logits.masked_fill(~made.decoder.scored, -math.inf).log_softmax(-1)
    targets = [*text, made.decoder.units.eos]
    return -sum(float(log_probs[u, token]) for u, token in enumerate(targets))


@pytest.mark.parametrize("kind", ["adapted", "native"])
def test_own_and_other_audio(llm, native, kind):
    directory = llm if kind == "adapted" else native
    made = model(directory, kind == "native", prompt=PROMPT, **CTC)
    data = batch()
    use, rows, _ = measure(made, batches(data))
    assert not made.training
    audios = [audio_of(made, data, i) for i in range(3)]
    texts = [text_of(data, i) for i in range(3)]
    own, other = (
        [slow_nll(directory, made, audios[(i - step) % 3], texts[i]) for i in range(3)]
        for step in (0, 1)
    )
    assert [row.nll for row in rows] == pytest.approx(own, abs=1e-4)
    assert [row.other_nll for row in rows] == pytest.approx(other, abs=1e-4)
    tokens = 3 + sum(map(len, texts))
    assert use.nll == pytest.approx(sum(own) / tokens)
    assert use.gap == pytest.approx((sum(other) - sum(own)) / tokens, abs=1e-5)
    assert use.indifferent == sum(o <= s for o, s in zip(other, own)) / 3
    assert use.tokens_per_embedding == sum(map(len, texts)) / sum(map(len, audios))


def test_cutting_into_batches_changes_nothing(made):
    data = batch()
    together = measure(made, batches(data))
    alone = measure(
        made, ((NAMES[i : i + 1], dict(zip(SPEECH_AND_TEXT, single(data, i)))) for i in range(3))
    )
    for one, other in zip(together.utterances, alone.utterances):
        assert one.nll == pytest.approx(other.nll, abs=1e-4)
        assert one.other_nll == pytest.approx(other.other_nll, abs=1e-4)
        assert one.attention == pytest.approx(other.attention, abs=1e-5)


def test_attention_is_that_of_transformers(llm, made):
    data = batch()
    use, rows, _ = measure(made, batches(data))
    reference = load_causal_lm(llm)
    reference.set_attn_implementation("eager")
    embed, prompt = reference.get_input_embeddings(), made.decoder.prompt
    means, uniform = [], []
    for i in range(3):
        audio = audio_of(made, data, i)
        ids = [*prompt.after, prompt.sos, *text_of(data, i)]
        before = embed(torch.tensor(prompt.before))
        inputs = torch.cat([before, audio, embed(torch.tensor(ids))])[None]
        with torch.no_grad():
            weights = reference(inputs_embeds=inputs, output_attentions=True).attentions
        first, last = len(before), len(before) + len(audio)
        queries = range(last + len(prompt.after), inputs.size(1))
        layers = [w[0][:, list(queries), first:last].sum(-1).mean() for w in weights]
        means.append(torch.stack(layers).numpy())
        uniform.append(np.mean([len(audio) / (q + 1) for q in queries]))
        assert rows[i].attention == pytest.approx(means[-1], abs=1e-5)
    assert use.attention == pytest.approx(np.mean(means, axis=0), abs=1e-5)
    assert use.uniform_attention == pytest.approx(np.mean(uniform))


def test_similarity_is_that_of_the_embeddings(llm, made):
    data = batch(frames=(16, 12, 14), texts=((3, 4, 4, 5), (6, 3, 5), (7, 3)))
    use, rows, picture = measure(made, batches(data))
    embed = load_causal_lm(llm).get_input_embeddings().weight.detach().numpy()
    audios = [audio_of(made, data, i).numpy() for i in range(3)]
    texts = [embed[text_of(data, i)] for i in range(3)]
    # scoring/similarity takes the next utterance's audio, here it is the one before
    expected = alignment(audios[::-1], texts[::-1])
    assert use.alignment.utterances == expected.utterances == 2  # one has two tokens
    assert use.alignment.paired == pytest.approx(expected.paired)
    assert use.alignment.mismatched == pytest.approx(expected.mismatched)
    norm = np.linalg.norm(audios[0], axis=1)[:, None] * np.linalg.norm(texts[0], axis=1)
    assert rows[0].similarity == pytest.approx(audios[0] @ texts[0].T / norm, abs=1e-5)
    shown = NAMES.index(picture.name)
    assert picture.tokens == [made.token_list[i] for i in text_of(data, shown)]
    assert picture.similarity.shape == (len(audios[shown]), len(picture.tokens))
    assert use.picture == picture.name


def test_a_model_that_listens(llm):
    """Three utterances by heart: their audio tells which."""
    made = model(llm, tuning="full")
    data = batch(texts=((3, 4), (6, 3), (7, 8)))
    before = measure(made, batches(data)).use
    made.train()
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        made(*data)[0].backward()
        optimizer.step()
    after = measure(made, batches(data)).use
    assert abs(before.gap) < 1.0 and after.gap > 2.0
    assert after.nll < 0.3 and after.indifferent == 0.0


def test_audio_like_its_text_is_in_order(made, monkeypatch):
    texts = ((3, 5, 4, 9, 8, 7), (9, 3, 8, 4, 7, 5), (5, 9, 7, 8, 3, 4))
    data = batch(texts=texts)
    said_slowly = data[2].repeat_interleave(2, dim=1)
    audio = Audio(made.decoder.llm.embed(said_slowly), torch.full((3,), 12))
    monkeypatch.setattr(made.decoder, "adapt", lambda hs, lengths, languages: audio)
    found = measure(made, batches(data)).use.alignment
    assert found.paired == pytest.approx(1.0) and found.mismatched < 0.5


def log_prob_slowly(log_probs, labels):
    """log P_CTC by all paths through (T, C), a few frames."""
    total = -math.inf
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        if [label for label, _ in itertools.groupby(path) if label] == labels:
            total = np.logaddexp(total, sum(log_probs[t, label] for t, label in enumerate(path)))
    return total


@pytest.mark.parametrize("labels", [[], [3], [3, 4], [5, 5], [3, 4, 5, 6, 3]])
def test_ctc_likelihood(made, labels):
    encoder_out = made.encode(*single(batch(frames=(4,), texts=((3,),)), 0)[:2])[0][0]
    with torch.no_grad():
        found = text_likelihood(made.ctc, encoder_out, labels)
        log_probs = made.ctc.label_log_probs(encoder_out[None])[0].double().numpy()
    assert found.labels == len(labels)
    assert found.log_prob == pytest.approx(log_prob_slowly(log_probs, labels), abs=1e-4)


@pytest.mark.parametrize("kind", ["adapted", "native"])
def test_agreement_with_ctc(llm, native, kind):
    directory = llm if kind == "adapted" else native
    made = model(directory, kind == "native", **CTC).eval()
    torch.nn.init.normal_(made.ctc.ctc_lo.weight, std=3.0)
    data = batch(frames=(9, 2, 7))  # the second has three labels
    data[2][1], data[3][1] = torch.tensor([6, 3, 4, -1]), 3
    texts = [text_of(data, i) for i in range(3)]
    hypotheses = {"a": texts[0], "b": [3], "c": [5, 3, 6] * 4}  # of twelve labels in seven frames
    use, rows, _ = measure(made, batches(data), hypotheses)
    shift = 1 if kind == "native" else 0
    log_prob, labels = 0.0, 0
    for i in (0, 2):
        encoder_out = made.encode(*single(data, i)[:2])[0]
        scores = made.ctc.label_log_probs(encoder_out)[0].detach().double().numpy()
        scorer = CTCPrefixScore(scores, 0, scores.shape[1], np)  # eos: not among the labels
        forward, prefix = scorer.initial_state(), [0]
        for token in texts[i]:
            _, states = scorer(prefix, np.array([token + shift]), forward)
            forward, prefix = states[0], [*prefix, token + shift]
        log_prob += np.logaddexp(*forward[-1])
        labels += len(texts[i])
    assert use.ctc.reference_log_prob == pytest.approx(log_prob / labels, abs=1e-4)
    assert use.ctc.impossible == 1
    assert [row.ctc_loss for row in rows] == [pytest.approx(0, abs=1e-5), None, math.inf]
    assert use.ctc.contradicted == 0.5


class BestPath:
    """A CTC layer that is sure of labels."""

    def __init__(self, vocabulary, path):
        self.vocabulary, self.path = vocabulary, path

    def label_log_probs(self, hs_pad):
        return torch.nn.functional.one_hot(torch.tensor([self.path]), self.vocabulary.size).float()


@pytest.mark.parametrize("kind", ["adapted", "native"])
def test_greedy_text(llm, native, kind):
    units = model(native if kind == "native" else llm, kind == "native").decoder.units
    tokens = units.encode("bad cab")
    shift = 1 if kind == "native" else 0
    path = [0, *(label for token in tokens for label in (token + shift, token + shift, 0))]
    vocabulary = TokenVocabulary(units)
    assert greedy_text(BestPath(vocabulary, path), torch.zeros(len(path), 1)) == "bad cab"


def test_greedy_text_of_other_labels(native, tmp_path):
    units = model(native, True).decoder.units
    (tmp_path / "tokens").write_text("<blank>\n<unk>\na\nb\n<space>\n<sos/eos>\n")
    vocabulary = PieceVocabulary(units, str(tmp_path / "tokens"))
    path = [2, 2, 0, 2, 3, 4, 3]
    assert greedy_text(BestPath(vocabulary, path), torch.zeros(7, 1)) == "aab b"


class Units:
    """Token ids that are words."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_word_errors_between_ctc_and_hypotheses(monkeypatch):
    module = "espnet_llm_plugin.inference.ctc_agreement"
    heard = {3: "1 2 9", 2: "1 2"}  # by the number of frames
    monkeypatch.setattr(f"{module}.greedy_text", lambda ctc, out: heard[len(out)])
    monkeypatch.setattr(
        f"{module}.text_likelihood", lambda ctc, out, ids: Likelihood(-3 * len(ids), 1)
    )
    sums = AgreementSums(None, Units())
    assert sums.add(torch.zeros(3, 1), [1, 2, 3], [1, 2, 4, 5]) == 3.0
    assert sums.add(torch.zeros(2, 1), [1], [1]) == 0.0
    found = sums.report()
    assert found.greedy_wer == 100 * (1 + 1) / 4
    assert found.hypothesis_wer == 100 * (2 + 0) / 4
    assert found.disagreement == 100 * (2 + 1) / 4
    assert found.contradicted == 0.5 and found.reference_log_prob == -12 / 2
    alone = AgreementSums(None, Units())
    assert alone.add(torch.zeros(3, 1), [1, 2, 3], None) is None
    none = {"hypothesis_wer": None, "disagreement": None, "contradicted": None}
    expected = {"greedy_wer": 100 / 3, "reference_log_prob": -9.0}
    assert alone.report() == replace(found, **none, **expected)


def test_interfaces_and_models_without_some_parts(llm):
    data = batch()
    merged = measure(model(llm, interface="merged"), batches(data)).use
    assert merged.ctc is None and len(merged.attention) == 2 and merged.gates is None
    crossing = model(llm, interface="cross_attention")
    with torch.no_grad():
        for layer in crossing.decoder.interface.layers:
            layer.gate.fill_(0.5)
    use, rows, picture = measure(crossing, batches(data))
    assert use.gates == pytest.approx([math.tanh(0.5)] * 2)
    assert use.attention is None and use.alignment is None and picture is None
    assert use.gap is not None and rows[0].similarity is None


@pytest.mark.parametrize(
    "family, reason", [("mistral", "windows of 3"), ("bloom", "0 of 2 attention")]
)
def test_llms_whose_attention_cannot_be_measured(tmp_path, caplog, family, reason):
    directory = save_adapted_dir(tmp_path / "llm", LLM_TOKENS, family=family)
    use = measure(model(str(directory)), batches(batch())).use
    assert use.attention is None and use.uniform_attention is None and reason in caplog.text
    assert use.gap is not None and use.alignment is not None


def test_one_utterance_has_no_other(llm, made):
    data = single(batch(), 0)
    use = measure(made, batches(data)).use
    assert use.gap is None and use.indifferent is None and use.alignment is None
    assert use.utterances == 1 and use.nll > 0


def test_what_cannot_be_scored_is_left_out(made, caplog):
    data = batch(frames=(9, 70, 7), texts=((3, 4), (6, 3), ()))
    found = measure(made, batches(data, batch()))
    assert [row.name for row in found.utterances] == ["a", "a1", "b1", "c1"]
    assert found.use.skipped == 2 and "b is left out" in caplog.text
    with pytest.raises(UserError, match="2 utterances, none of which"):
        measure(made, batches(batch(frames=(70, 7), texts=((3, 4), ()))))


def test_bad_input(made):
    with pytest.raises(UserError, match="not of Linear"):
        measure(torch.nn.Linear(1, 1), [])
    with pytest.raises(UserError, match="utterance b has no hypothesis"):
        measure(made, batches(batch()), {"a": [3]})


def test_spread():
    keys = [f"{n}" for n in range(10)]
    assert spread(keys, 20) == spread(keys, 10) == keys
    assert spread(keys, 4) == ["0", "3", "6", "9"] and len(spread(keys, 7)) == 7
    assert spread(keys, 1) == ["0"]


def test_embedding_ms(llm):
    config = {"encoder": "conformer", "encoder_conf": {"input_layer": "conv2d"}}
    assert embedding_ms(model(llm, adapter_conf={"stack": 3}), config) == 3 * 4 * 8
    assert embedding_ms(model(llm), {"encoder": "rnn"}) is None
    compressing = model(llm, adapter="ctc_compression", **CTC)
    assert embedding_ms(compressing, config) is None


# --- the command line ---

SECONDS = {"utt-a": 0.5, "utt-b": 0.7, "utt-c": 0.4}
TEXT = {"utt-a": "ab c", "utt-b": "d a b d", "utt-c": "c"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    tiny = save_adapted_dir(directory / "llm", TOKENS, seed=3)
    made = {
        "speech_llm": make_speech_llm(directory / "speech_llm", tiny),
        "ctc": make_asr(directory / "ctc", "ctc"),
        "wav": make_audio(directory / "wav", SECONDS),
        "text": directory / "text",
        "token_int": directory / "token_int",
    }
    made["text"].write_text("".join(f"{utt} {line}\n" for utt, line in TEXT.items()))
    made["token_int"].write_text("utt-a 3 4 2 5\nutt-b\nutt-c 5 5 5 5\n")
    return made


def run(files, out, *options, kind="speech_llm"):
    data = "--data_path_and_name_and_type"
    evaluate_audio_use.main(
        [
            *files[kind].asr_options(),
            *(data, f"{files['wav']},speech,sound", data, f"{files['text']},text,text"),
            *("--output_dir", str(out), "--num_workers", "0", *options),
        ]
    )
    return read_audio_use(str(out / "audio_use.json"))


def test_command_line(files, tmp_path, capsys):
    found = run(files, tmp_path, "--token_int", str(files["token_int"]))
    assert isinstance(found, AudioUse) and found.utterances == 3
    assert found.ctc.contradicted is not None and len(found.attention) == 2
    assert f"nll: {found.nll}" in capsys.readouterr().out
    header, *rows = (
        line.split("\t") for line in (tmp_path / "utterances.tsv").read_text().splitlines()
    )
    assert [row[0] for row in rows] == list(SECONDS)
    column = header.index("nll")
    tokens = sum(int(row[1]) + 1 for row in rows)
    assert sum(float(row[column]) for row in rows) / tokens == pytest.approx(found.nll, abs=1e-3)
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG")
    # without hypotheses, and of fewer utterances
    found = run(files, tmp_path / "two", "--max_utterances", "2")
    assert found.ctc.contradicted is None and found.utterances == 2
    assert (tmp_path / "two" / "keys").read_text() == "utt-a\nutt-c\n"


def test_bad_input_of_the_command_line(files, tmp_path):
    with pytest.raises(UserError, match="not of ESPnetASRModel"):
        run(files, tmp_path, kind="ctc")
    with pytest.raises(UserError, match="utt-a has no token ids; expected the file token_int"):
        run(files, tmp_path, "--token_int", str(files["text"]))
    with pytest.raises(UserError, match="no.json: no such file"):
        read_audio_use(str(tmp_path / "no.json"))
    (tmp_path / "other.json").write_text(json.dumps({"alignment": None, "ctc": {"wer": 1}}))
    with pytest.raises(UserError, match="other.json: not written by bin/evaluate_audio_use"):
        read_audio_use(str(tmp_path / "other.json"))
