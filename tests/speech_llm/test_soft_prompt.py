"""Soft prompts in the speech LLM: values, gradients, context, checkpoints, decoding, bad input."""

import copy
import math

import pytest
import torch

from espnet_llm_plugin.errors import UserError, UtteranceError
from espnet_llm_plugin.llm.backbone import load_causal_lm
from espnet_llm_plugin.speech_llm.languages import NOT_GIVEN
from tests.contracts.checkpoint_contract import CheckpointContract
from tests.contracts.scorer_contract import ScorerContract
from tests.speech_llm.test_decoder import Listening, speech
from tests.speech_llm.tiny import DIM, batch, decoder, model, reference_logits, single
from tests.speech_llm.tiny_languages import CONF, NAMES, lang, loss_of, multilingual
from tests.speech_llm.tiny_llm import TOKENS, save_adapted, save_native

LANGUAGES = lang("de", "to", "de")
PROMPT = {"before": "bad", "after": " cab"}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "adapted")


@pytest.fixture(scope="module")
def other_llm(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "other", seed=1)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return save_native(tmp_path_factory.mktemp("native"))


def vectors(made, code):
    name = code if code in ("unk", "shared") else f"lang_{code}"
    return made.decoder.soft_prompt.get_parameter(name).detach()


def slow_nll(llm, made, data, i, soft):
    """-log P of utterance i by transformers on the soft vectors and the audio."""
    speech, lengths, text, _ = single(data, i)
    audio, _ = made.decoder.adapter(*made.encode(speech, lengths))
    both = torch.cat([soft, audio[0]])
    logits = reference_logits(load_causal_lm(llm), made.decoder, both, text[0].tolist())
    logits[:, ~made.decoder.scored] = -math.inf
    targets = torch.tensor([*text[0].tolist(), made.eos])
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


# --- training ---


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
@pytest.mark.parametrize("prompt", ["none", PROMPT], ids=["none", "prompt"])
def test_loss_is_that_of_transformers_with_the_vectors_of_the_language(llm, tuning, prompt):
    made = multilingual(llm, prompt=prompt, tuning=tuning, adapter_conf={"stack": 2}).eval()
    data = batch()
    for languages, codes in (
        (LANGUAGES, ["de", "to", "de"]),
        (lang("unk", None, "en"), ["unk", "unk", "en"]),
    ):
        expected = [slow_nll(llm, made, data, i, vectors(made, c)) for i, c in enumerate(codes)]
        found = made.utterance_nll(*data, **languages)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)
        loss, stats = loss_of(made, data, **languages)
        assert float(loss) == pytest.approx(sum(expected) / 10, rel=1e-4)
        assert stats["num_no_language"] == codes.count("unk")


def test_shared_vectors(llm):
    made = model(llm, soft_prompt="shared", soft_prompt_conf={"length": 2}).eval()
    data = batch()
    expected = [slow_nll(llm, made, data, i, vectors(made, "shared")) for i in range(3)]
    torch.testing.assert_close(
        made.utterance_nll(*data), torch.tensor(expected), atol=1e-4, rtol=1e-4
    )
    assert "num_no_language" not in loss_of(made)[1]
    # languages in the data of a model that has no use for them
    assert loss_of(made, **LANGUAGES) == loss_of(made)


def test_none_is_as_if_there_were_no_soft_prompts(llm):
    plain, none = model(llm), model(llm, soft_prompt="none")
    assert list(plain.state_dict()) == list(none.state_dict())
    for train in (True, False):
        assert loss_of(none, train=train) == loss_of(plain, train=train)


def test_bidirectional_prefix_has_the_vectors_in_it(llm):
    """They see the audio, and the audio them."""
    conf = {"interface_conf": {"mask": "bidirectional"}}
    made, causal = multilingual(llm, **conf).eval(), multilingual(llm).eval()
    assert float(loss_of(made, **LANGUAGES)[0]) != float(loss_of(causal, **LANGUAGES)[0])
    # as if the vectors were audio
    data = batch()
    encoder_out, lengths = made.encode(*data[:2])
    audio = made.decoder.adapt(encoder_out, lengths, torch.tensor([0, 2, 0]))
    tokens, sizes = torch.tensor([[11, 3], [11, 5], [11, 7]]), torch.tensor([2, 2, 2])
    found, outputs = made.decoder.text_logits(audio, tokens, sizes)
    for i in range(3):
        both = torch.cat([audio.soft[i], audio.embeddings[i, : audio.lengths[i]]])[None]
        size = torch.tensor([both.size(1)])
        whole = type(audio)(both, size)
        expected, all_outputs = made.decoder.text_logits(whole, tokens[i : i + 1], sizes[:1])
        torch.testing.assert_close(found[i], expected[0], atol=1e-5, rtol=1e-5)
        # the outputs at the audio are those at the audio alone
        own = outputs[i, : audio.lengths[i]]
        torch.testing.assert_close(own, all_outputs[0, 3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
def test_gradient_reaches_the_languages_of_the_batch_alone(llm, tuning):
    made = multilingual(llm, tuning=tuning)
    before = copy.deepcopy(dict(load_causal_lm(llm).named_parameters()))
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    start = {name: p.detach().clone() for name, p in made.named_parameters()}
    loss_of(made, train=True, **LANGUAGES)[0].backward()
    soft = dict(made.decoder.soft_prompt.named_parameters())
    reached = {name for name, p in soft.items() if p.grad.abs().max() > 0}
    assert reached == {"lang_de", "lang_to"}
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    optimizer.step()
    for name, parameter in made.decoder.soft_prompt.named_parameters():
        changed = not torch.equal(parameter, start[f"decoder.soft_prompt.{name}"])
        assert changed == (name in reached)
    held = dict(made.decoder.llm.model().named_parameters())
    for name, parameter in before.items():
        if name in held:  # not those that LoRA has renamed
            assert torch.equal(held[name], parameter), name


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
@pytest.mark.parametrize("loss", ["ctc", "rnnt"])
def test_auxiliary_losses_reach_the_vectors_through_a_frozen_llm(llm, loss, mask):
    conf = {"auxiliary": [{"loss": loss, "tap": "llm_prefix", "weight": 1.0}]}
    made = multilingual(llm, model_conf=conf, interface_conf={"mask": mask})
    made.train()
    data = batch()
    encoder_out, lengths = made.encode(*data[:2])
    audio = made.decoder.adapt(encoder_out, lengths, torch.tensor([0, 2, 0]))
    tokens, sizes = torch.tensor([[11, 3], [11, 5], [11, 7]]), torch.tensor([2, 2, 2])
    _, outputs = made.decoder.text_logits(audio, tokens, sizes)
    taps = {"llm_prefix": (outputs, audio.lengths)}
    text = data[2].masked_fill(data[2] < 0, made.eos)
    made.auxiliary.loss(taps, text, data[3], True, {}).backward()
    reached = {
        name: p.grad is not None and bool(p.grad.abs().max() > 0)
        for name, p in made.decoder.soft_prompt.named_parameters()
    }
    assert reached == {"lang_de": True, "lang_to": True, "lang_en": False, "unk": False}


def test_language_dropout_trains_the_unknown_language(llm):
    made = multilingual(llm, soft={"language_dropout": 0.5})
    unknown = made.decoder.soft_prompt.languages.unknown_row
    ids = torch.zeros(4000, dtype=torch.long)
    rows = made.decoder.soft_prompt.train()(ids, 4000)
    dropped = (rows == vectors(made, "unk")).all(dim=2).all(dim=1)
    assert 0.45 < dropped.float().mean() < 0.55
    assert torch.equal(rows[~dropped], vectors(made, "de").expand(int((~dropped).sum()), -1, -1))
    made.decoder.soft_prompt.eval()
    assert torch.equal(made.decoder.soft_prompt(ids, 4000)[7], vectors(made, "de"))
    assert torch.equal(made.decoder.soft_prompt(ids + unknown, 4000)[7], vectors(made, "unk"))


def test_shuffled_audio_keeps_the_soft_prompt_of_the_transcript(llm):
    made = multilingual(llm).eval()
    data = batch()
    speech, lengths, text, text_lengths = data
    own = made.utterance_nll(*data, **LANGUAGES)
    rolled = (speech.roll(1, 0), lengths.roll(1), text, text_lengths)
    other = made.utterance_nll(*rolled, **LANGUAGES)
    stats = loss_of(made, **LANGUAGES)[1]
    assert stats["shuffled_gap"] == pytest.approx(float((other - own).sum() / 10), abs=1e-4)
    # of single utterances too, which have the audio of the one before
    fresh = multilingual(llm)
    loss_of(fresh, single(data, 2), **lang("de"))
    gap = loss_of(fresh, single(data, 0), **lang("de"))[1]["shuffled_gap"]
    assert gap == pytest.approx(float(other[0] - own[0]) / 5, abs=1e-4)


def test_statistics_have_the_same_names_when_nothing_is_left(llm):
    made = multilingual(llm, language_prediction=True)
    _, stats = loss_of(made, train=True, **LANGUAGES)
    data = batch(frames=(9, 5, 7), texts=((3,) * 60, (4,) * 60, (5,) * 60))
    _, nothing = loss_of(made, data, train=True, **LANGUAGES)
    assert list(nothing) == list(stats)


# --- context ---


def test_vectors_count_in_the_context(llm, caplog):
    """The tiny LLM sees 64 tokens."""
    plain = model(llm, adapter_conf={"stack": 1})
    made = multilingual(llm, adapter_conf={"stack": 1})
    sizes = torch.tensor([4])
    assert int(made.decoder.room(sizes)) == int(plain.decoder.room(sizes)) - 3
    text = ((3, 4, 5, 6),)
    fits = 64 - 1 - 4 - 3
    assert loss_of(made, batch((fits,), text), **lang("de"))[1]["num_skipped"] == 0
    assert loss_of(made, batch((fits + 1,), text), **lang("de"))[1]["num_skipped"] == 1
    assert "prompt (4 tokens)" in caplog.text
    made.eval()
    with pytest.raises(UtteranceError, match="the prompt 4 tokens"):
        made.decoder.init_state(speech(60))
    made.decoder.init_state(speech(59))
    # soft prompt alone that is too long
    with pytest.raises(UserError, match="the prompt has 63 tokens, LLM .* sees 64"):
        multilingual(llm, soft={"length": 62})


# --- initial values ---


def test_random_vectors_are_as_large_as_text(llm):
    table = load_causal_lm(llm).get_input_embeddings().weight
    made = multilingual(llm, soft={"length": 40})
    found = torch.cat([vectors(made, code) for code in (*NAMES, "unk")])
    expected = float(table.square().mean().sqrt())
    assert float(found.std()) == pytest.approx(expected, rel=0.1)
    assert float(vectors(multilingual(llm, soft={"std": 0.5, "length": 40}), "de").std()) > 0.4
    assert not torch.equal(vectors(made, "de"), vectors(made, "en"))


@pytest.mark.parametrize("kind", ["adapted", "native"])
def test_vectors_from_the_names_of_the_languages(llm, native, kind):
    directory = llm if kind == "adapted" else native
    names = NAMES if kind == "adapted" else {"de": "the cat", "en": "a dog"}
    soft = {**CONF, "languages": names, "init": "language_name", "length": 6}
    made = model(directory, kind == "native", soft_prompt="per_language", soft_prompt_conf=soft)
    assert not made.decoder.llm.is_loaded
    table = load_causal_lm(directory).get_input_embeddings().weight.detach()
    for code, name in names.items():
        ids = made.decoder.units.encode(name)
        expected = torch.stack([table[ids[k % len(ids)]] for k in range(6)])
        torch.testing.assert_close(vectors(made, code), expected)
    mean = torch.stack([vectors(made, code) for code in names]).mean(0)
    torch.testing.assert_close(vectors(made, "unk"), mean)
    noisy = model(
        directory,
        kind == "native",
        soft_prompt="per_language",
        soft_prompt_conf={**soft, "std": 0.1},
    )
    difference = vectors(noisy, "de") - vectors(made, "de")
    assert 0.05 < float(difference.std()) < 0.2


# --- prediction ---


def test_prediction_is_trained(llm):
    conf = {"language_prediction": True, "model_conf": {"language_weight": 0.5}}
    made = multilingual(llm, **conf)
    loss, stats = loss_of(made, train=True, **LANGUAGES)
    assert float(loss) == pytest.approx(stats["loss_ce"] + 0.5 * stats["loss_language"])
    assert stats["acc_language"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    loss.backward()
    head = made.decoder.language_head
    assert all(p.grad.abs().max() > 0 for p in head.parameters())
    without = multilingual(llm, language_prediction=True)
    assert without.language_weight == 0.1


def test_what_is_not_given_is_predicted_but_not_in_training(llm):
    made = multilingual(llm, language_prediction=True)
    encoder_out, lengths = made.encode(*batch()[:2])
    predicted = made.decoder.language_head.predict(encoder_out, lengths)
    given = torch.tensor([NOT_GIVEN, 1, 3])
    adapted = made.eval().decoder.adapt(encoder_out, lengths, given).soft
    codes = list(NAMES)
    assert torch.equal(adapted[0], vectors(made, codes[int(predicted[0])]))
    assert torch.equal(adapted[1], vectors(made, codes[1]))
    assert torch.equal(adapted[2], vectors(made, "unk"))
    all_predicted = made.decoder.adapt(encoder_out, lengths).soft
    for row, number in zip(all_predicted, predicted.tolist()):
        assert torch.equal(row, vectors(made, codes[number]))
    in_training = made.train().decoder.adapt(encoder_out, lengths, given).soft
    assert torch.equal(in_training[0], vectors(made, "unk"))


# --- new languages ---


def test_languages_trained_alone(llm):
    """All else stays bit by bit, running means of a batch norm included."""
    conf = {"train_languages": ["to"], "auxiliary": [{"loss": "rnnt", "tap": "adapter"}]}
    made = multilingual(llm, tuning="lora", language_prediction=True, model_conf=conf)
    made.encoder.norm = torch.nn.BatchNorm1d(2)  # a part with a running mean
    made.train()
    made.encoder.norm(torch.randn(4, 2))
    start = copy.deepcopy(made.state_dict())
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(made, train=True, **lang("to", "to", "de"))[0].backward()
        made.encoder.norm(torch.randn(4, 2))
        optimizer.step()
    changed = {name for name, value in made.state_dict().items() if not value.equal(start[name])}
    assert changed == {"decoder.soft_prompt.lang_to", "decoder.language_head.lang_to"}


# --- decoding ---


@pytest.mark.parametrize("interface", ["prefix", "merged", "cross_attention"])
class TestScorer(ScorerContract):
    vocab_size = len(TOKENS)

    @pytest.fixture(autouse=True)
    def _conf(self, llm, interface):
        conf = {"soft_prompt": "per_language", "soft_prompt_conf": CONF}
        made = decoder(llm, interface=interface, adapter_conf={"stack": 2}, **conf).eval()
        for name, parameter in made.interface.named_parameters():
            if "gate" in name:  # closed at the start
                parameter.data.fill_(0.7)
        self.decoder = made

    def make_scorer(self):
        from espnet.nets.scorer_interface import BatchScorerInterface

        scorer = Listening(self.decoder, speech())
        scorer.__class__ = type("Scorer", (Listening, BatchScorerInterface), {})
        return scorer


def test_steps_of_a_batch_follow_each_languages_vectors(llm):
    made = multilingual(llm).eval().decoder
    hs, lengths = torch.randn(3, 7, DIM), torch.tensor([7, 5, 6])
    languages = torch.tensor([2, 0, NOT_GIVEN])
    state = made.start_after(made.adapt(hs, lengths, languages))
    tokens = torch.tensor([[11, 3, 4]] * 3)
    audio = made.adapt(hs, lengths, languages)
    expected, _ = made.text_logits(audio, tokens, torch.tensor([3, 3, 3]))
    expected = expected.masked_fill(~made.scored, -1e9)
    for u in range(3):
        logits, state = made.step(tokens[:, u], state, torch.arange(3))
        torch.testing.assert_close(logits, expected[:, u], atol=1e-4, rtol=1e-4)
    alone = made.init_state(hs[2, :6])
    row, _ = made.score(torch.tensor([11]), alone, hs[2])
    torch.testing.assert_close(row, expected[2, 0].log_softmax(-1), atol=1e-4, rtol=1e-4)


# --- checkpoints ---


class TestCheckpoint(CheckpointContract):
    @pytest.fixture(autouse=True)
    def _llms(self, llm, other_llm):
        self.llm, self.other = llm, other_llm

    def make(self):
        return multilingual(self.llm, language_prediction=True, tuning="frozen")

    def run(self, made):
        return made.eval().utterance_nll(*batch(), **LANGUAGES)

    def frozen_tensors(self, made):
        return list(made.decoder.llm.model().parameters())

    def make_with_other_llm(self):
        return multilingual(self.other, language_prediction=True)


def test_checkpoints_of_other_languages_are_refused(llm):
    saved = multilingual(llm).state_dict()
    assert sum("soft_prompt" in name for name in saved) == 4  # with the unknown language
    fewer = {"languages": {"de": "bad", "en": "head"}}
    more = {"languages": {**NAMES, "fr": "bade"}}
    for made, message in (
        (multilingual(llm, soft=fewer), "decoder.soft_prompt for to, which"),
        (multilingual(llm, soft=more), "lacks .*decoder.soft_prompt.lang_fr"),
        (model(llm), "decoder.soft_prompt for"),
        (model(llm, soft_prompt="shared"), "lacks .*decoder.soft_prompt.shared"),
    ):
        with pytest.raises(UserError, match=message):
            made.load_state_dict(saved, strict=False)
    # the order is not of the checkpoint
    turned = multilingual(llm, seed=3, soft={"languages": dict(reversed(NAMES.items()))})
    turned.load_state_dict(saved)
    same = multilingual(llm, seed=3)
    same.load_state_dict(saved)
    for one in (turned, same):
        one.eval()
    torch.testing.assert_close(
        turned.utterance_nll(*batch(), **LANGUAGES), same.utterance_nll(*batch(), **LANGUAGES)
    )


# --- bad input ---


@pytest.mark.parametrize(
    "conf, message",
    [
        ({"soft_prompt": "private"}, "soft_prompt 'private'; expected none, shared, per_language"),
        ({"soft_prompt_conf": {"length": 3}}, "soft_prompt_conf is given, but soft_prompt is none"),
        ({"soft_prompt": "per_language"}, "needs soft_prompt_conf languages"),
        (
            {"soft_prompt": "shared", "soft_prompt_conf": {"languages": ["en"]}},
            "languages is for `soft_prompt: per_language`",
        ),
        (
            {"soft_prompt": "shared", "soft_prompt_conf": {"init": "language_name"}},
            "init language_name is for",
        ),
        ({"soft_prompt": "shared", "soft_prompt_conf": {"length": 0}}, "set `soft_prompt: none`"),
        ({"soft_prompt": "shared", "soft_prompt_conf": {"std": -1}}, "std must be 0 or more"),
        ({"soft_prompt": "shared", "soft_prompt_conf": {"lenght": 1}}, "unknown option 'lenght'"),
        ({"soft_prompt": "shared", "soft_prompt_conf": 8}, "must be a mapping"),
        ({"soft_prompt": "shared", "language_prediction": True}, "needs `soft_prompt: per_lang"),
    ],
)
def test_bad_configuration(llm, conf, message):
    with pytest.raises(UserError, match=message):
        model(llm, **conf)


@pytest.mark.parametrize(
    "soft, message",
    [
        ({"init": "zero"}, "init 'zero'; expected random or language_name"),
        ({"language_dropout": 1.0}, r"language_dropout must be in \[0, 1\)"),
        ({"unknown_language": "skip"}, "unknown_language 'skip'"),
        ({"init": "language_name", "languages": ["de"]}, "cannot write 'german'"),
    ],
)
def test_bad_languages(llm, soft, message):
    with pytest.raises(UserError, match=message):
        multilingual(llm, soft=soft)


def test_training_without_languages(llm):
    with pytest.raises(UserError, match="utt2lang,lang,text"):
        multilingual(llm)(*batch())
    with pytest.raises(UserError, match="language_weight is given, but"):
        multilingual(llm, model_conf={"language_weight": 0.2})
    with pytest.raises(UserError, match="train_languages"):
        model(llm, model_conf={"train_languages": ["de"]})
