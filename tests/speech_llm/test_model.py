"""The speech LLM as an ESPnet model: losses, statistics, skips, starts from CTC, bad input."""

import math

import pytest
import torch
from espnet2.asr.ctc import CTC
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model
from espnet2.train.reporter import Reporter

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.backbone import load_causal_lm
from espnet_llm_plugin.speech_llm.decoder import SpeechLLMDecoder
from espnet_llm_plugin.speech_llm.model import SpeechLLMModel
from espnet_llm_plugin.token_list import read_token_list
from tests.contracts.checkpoint_contract import CheckpointContract
from tests.llm.tiny import TEXT, train_sentencepiece
from tests.speech_llm.tiny import DIM, batch, decoder, model, reference_logits, single, token_list
from tests.speech_llm.tiny_llm import TOKENS, save_adapted, save_native
from tests.transducer.tiny import LinearEncoder


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "adapted")


@pytest.fixture(scope="module")
def other_llm(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "other", seed=1)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return save_native(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    bpemodel, tokens = train_sentencepiece(tmp_path_factory.mktemp("spm") / "bpe", TEXT, 40)
    return {"token_list": str(tokens), "bpemodel": str(bpemodel)}


def loss_of(made, data=None, train=False):
    """Loss and statistics, repeatable in training too."""
    torch.manual_seed(5)
    loss, stats, weight = made.train(train)(*(data or batch()))
    return float(loss), {key: float(value) for key, value in stats.items()}


@pytest.mark.parametrize("kind", ["adapted", "native"])
def test_loss_is_that_of_transformers_one_utterance_at_a_time(llm, native, kind):
    directory = llm if kind == "adapted" else native
    made = model(directory, kind == "native", prompt={"before": "bad"}, adapter_conf={"stack": 2})
    reference = load_causal_lm(directory)
    data = batch()
    nll, everything, correct = [], [], 0
    for i in range(3):
        speech, lengths, text, _ = single(data, i)
        hs, hlens = made.encode(speech, lengths)
        audio, _ = made.decoder.adapter(hs, hlens)
        targets = torch.tensor([*text[0].tolist(), made.eos])
        logits = reference_logits(reference, made.decoder, audio[0], text[0].tolist())
        logits[:, ~made.decoder.scored] = -torch.inf
        nll.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        everything.append(logits.log_softmax(-1))
        correct += int((logits.argmax(-1) == targets).sum())
    total = float(sum(nll))
    loss, stats = loss_of(made)
    assert loss == pytest.approx(total / 10, rel=1e-4)  # 7 tokens and 3 EOS
    assert stats["ce_per_token"] == pytest.approx(total / 10, rel=1e-4)
    assert stats["acc"] == pytest.approx(correct / 10)
    torch.testing.assert_close(made.utterance_nll(*data), torch.stack(nll), atol=1e-4, rtol=1e-4)
    assert float(made(*data)[2]) == 10.0
    made.length_normalized_loss = False
    assert loss_of(made)[0] == pytest.approx(total / 3, rel=1e-4)
    # smoothing too is over the tokens that can be text alone
    made.lsm_weight = 0.2
    share = 0.2 / (int(made.decoder.scored.sum()) - 1)
    rest = sum(float(-log_probs[log_probs > -torch.inf].sum()) for log_probs in everything)
    assert loss_of(made)[0] == pytest.approx(((0.8 - share) * total + share * rest) / 3, rel=1e-4)
    assert float(made(*data)[2]) == 3.0


PREFIX_CTC = {"loss": "ctc", "tap": "llm_prefix", "name": "prefix_ctc"}
WITH_CTC = {"ctc_weight": 0.3, "auxiliary": [PREFIX_CTC]}
FULL = {"ctc_weight": 0.3, "auxiliary": [{**PREFIX_CTC, "weight": 0.2}], "lsm_weight": 0.1}


@pytest.mark.parametrize("interface", ["prefix", "merged", "cross_attention"])
def test_padding_has_no_effect(llm, interface):
    conf = FULL if interface == "prefix" else {"ctc_weight": 0.3}
    made = model(llm, model_conf=conf, interface=interface, tuning="lora")
    speech, lengths, text, text_lengths = batch()
    inside = torch.arange(speech.shape[1]) < lengths[:, None]
    other = torch.where(inside[..., None], speech, torch.randn_like(speech))
    other = torch.nn.functional.pad(other, (0, 0, 0, 4), value=3.0)
    other_text = torch.nn.functional.pad(text.masked_fill(text < 0, 5), (0, 2), value=0)
    _, expected = loss_of(made)
    _, stats = loss_of(made, (other, lengths, other_text, text_lengths))
    assert stats == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_total_is_the_weighted_sum_of_the_losses(llm):
    made = model(llm, model_conf=FULL, adapter_conf={"stack": 1})
    for train in (True, False):
        loss, stats = loss_of(made, train=train)
        parts = stats["loss_ce"] + 0.3 * stats["loss_ctc"] + 0.2 * stats["loss_prefix_ctc"]
        assert loss == stats["loss"] == pytest.approx(parts)
        assert all(value > 0 for key, value in stats.items() if key.startswith("loss"))
    torch.manual_seed(0)
    made.train()(*batch())[0].backward()
    without = [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # distributed training expects a gradient for each


def test_ctc_on_the_encoder_is_espnets(llm):
    made = model(llm, model_conf={"ctc_weight": 0.5, "length_normalized_loss": False})
    reference = CTC(len(TOKENS), DIM)
    reference.load_state_dict(made.ctc.state_dict())
    speech, lengths, text, text_lengths = batch()
    hs, hlens = made.encode(speech, lengths)
    expected = float(reference(hs, hlens, text.clamp(min=0), text_lengths))
    assert loss_of(made)[1]["loss_ctc"] == pytest.approx(expected, rel=1e-5)


def test_ctc_on_the_prefix_of_an_llm_in_half_precision(llm):
    half = model(llm, model_conf={"auxiliary": [{**PREFIX_CTC, "weight": 1.0}]}, dtype="bfloat16")
    full = model(llm, model_conf={"auxiliary": [{**PREFIX_CTC, "weight": 1.0}]})
    found, expected = (loss_of(made)[1]["loss_prefix_ctc"] for made in (half, full))
    assert found == pytest.approx(expected, rel=0.05)


def test_ctc_on_the_prefix_sees_the_llms_outputs_and_never_the_text(llm):
    made = model(llm, model_conf={"auxiliary": [{**PREFIX_CTC, "weight": 1.0}]}).eval()
    data = batch()
    encoder_out, lengths = made.encode(*data[:2])
    audio = made.decoder.adapt(encoder_out, lengths)
    tokens = torch.tensor([[11, 3, 4], [11, 5, 6], [11, 7, 8]])
    _, outputs = made.decoder.text_logits(audio, tokens, torch.tensor([3, 3, 3]))
    _, others = made.decoder.text_logits(audio, tokens.flip(0), torch.tensor([3, 2, 1]))
    assert outputs.shape == (3, 9, 16)
    for i in range(3):
        inside = slice(0, lengths[i])
        torch.testing.assert_close(outputs[i, inside], others[i, inside], atol=1e-5, rtol=1e-5)
    ids = torch.tensor(made.decoder.prompt.before, dtype=torch.long)
    reference = load_causal_lm(llm)
    inputs = torch.cat([reference.get_input_embeddings()(ids), audio.embeddings[0]])[None]
    hidden = reference.model(inputs_embeds=inputs).last_hidden_state[0]
    torch.testing.assert_close(outputs[0], hidden, atol=1e-4, rtol=1e-4)


def test_each_ctc_has_its_own_vocabulary(native, pieces):
    conf = {"ctc_weight": 0.3, "ctc_vocabulary": pieces, "auxiliary": [PREFIX_CTC]}
    made = model(native, native=True, model_conf=conf)
    size = len(read_token_list(pieces["token_list"]))
    assert made.ctc.ctc_lo.out_features == size
    assert made.auxiliary.prefix_ctc.ctc_lo.out_features == made.vocab_size + 1
    swapped = {
        "ctc_weight": 0.3,
        "auxiliary": [{**PREFIX_CTC, "vocabulary": pieces}],
    }
    other = model(native, native=True, model_conf=swapped)
    assert other.ctc.ctc_lo.out_features == made.vocab_size + 1
    assert other.auxiliary.prefix_ctc.ctc_lo.out_features == size
    ids = made.decoder.units.encode("the cat")
    data = batch(frames=(9, 9), texts=(ids, ids[:1]))
    for one in (made, other):
        loss, stats = loss_of(one, data)
        assert math.isfinite(loss) and stats["loss_ctc"] > 0 and stats["loss_prefix_ctc"] > 0


def test_text_longer_than_the_stacked_prefix_is_left_out_of_that_ctc_only(llm):
    """4 labels with one repetition need 5 frames; there are 9 of the encoder and 3 of the LLM."""
    made = model(llm, model_conf=FULL, adapter_conf={"stack": 3})
    loss, stats = loss_of(made)
    assert (stats["num_skipped"], stats["num_ctc_skipped"]) == (0.0, 0.0)
    assert stats["num_prefix_ctc_skipped"] == 1.0
    alone = [loss_of(made, single(batch(), i))[1]["loss_prefix_ctc"] for i in range(3)]
    assert alone[0] == 0.0
    assert stats["loss_prefix_ctc"] == pytest.approx((2 * alone[1] + alone[2]) / 3, rel=1e-4)


def test_shuffled_gap_is_the_price_of_another_utterances_audio(llm):
    made = model(llm).eval()
    data = batch()
    speech, lengths, text, text_lengths = data
    own = made.utterance_nll(*data)
    rolled = made.utterance_nll(speech.roll(1, 0), lengths.roll(1), text, text_lengths)
    _, stats = loss_of(made)
    assert stats["shuffled_gap"] == pytest.approx(float((rolled - own).sum() / 10), abs=1e-4)
    assert "shuffled_gap" not in loss_of(made, train=True)[1]
    assert "shuffled_gap" not in loss_of(model(llm, model_conf={"shuffled_audio": False}))[1]


def test_shuffled_gap_of_single_utterances_uses_the_one_before(llm):
    made = model(llm)
    data = batch()
    first, second = (loss_of(made, single(data, i))[1]["shuffled_gap"] for i in (0, 1))
    speech, lengths, *_ = single(data, 0)
    *_, text, text_lengths = single(data, 1)
    other = made.utterance_nll(speech, lengths, text, text_lengths)
    own = made.utterance_nll(*single(data, 1))
    assert math.isnan(first)
    assert second == pytest.approx(float((other - own) / 3), abs=1e-4)
    reporter = Reporter()
    reporter.set_epoch(1)
    with reporter.observe("valid") as sub:
        for value in (first, second):
            sub.register({"shuffled_gap": torch.tensor(value)}, torch.tensor(1.0))
            sub.next()
    assert reporter.get_value("valid", "shuffled_gap", 1) == pytest.approx(second)


def test_audio_that_is_ignored_has_no_gap(llm):
    made = model(llm)
    with torch.no_grad():
        for parameter in made.decoder.adapter.parameters():
            parameter.zero_()
    speech, lengths, text, text_lengths = batch(frames=(9, 9, 9))
    assert loss_of(made, (speech, lengths, text, text_lengths))[1]["shuffled_gap"] == pytest.approx(
        0.0, abs=1e-5
    )


# --- every option has an effect ---

DECODER_CONF = [
    {"adapter_conf": {"stack": 2}},
    {"adapter_conf": {"match_text_scale": True}},
    {"adapter_conf": {"projection": "mlp"}},
    {"adapter_conf": {"extra_layers": 1, "extra_layers_conf": {"attention_heads": 2}}},
    {"adapter": "ctc_compression", "adapter_conf": {"threshold": 0.1}},
    {"adapter": "ctc_embedding", "adapter_conf": {"blank_weight": 1.0}},
    {"interface": "merged"},
    {"interface": "cross_attention"},
    {"interface_conf": {"mask": "bidirectional"}},
    {"prompt": {"after": "cab"}},
    {"dtype": "bfloat16"},
]


@pytest.mark.parametrize("conf", DECODER_CONF, ids=str)
def test_options_of_the_decoder_change_the_loss(llm, conf):
    ctc = {"ctc_weight": 0.3}  # some adapters need it
    default, _ = loss_of(model(llm, model_conf=ctc))
    changed, _ = loss_of(model(llm, model_conf=ctc, **conf))
    assert math.isfinite(changed) and changed != pytest.approx(default, rel=1e-5)


def trained(made):
    return {name for name, p in made.decoder.named_parameters() if p.requires_grad}


def test_options_of_tuning_change_what_is_trained(llm):
    frozen = trained(model(llm))
    assert frozen and all(name.startswith("adapter.") for name in frozen)
    lora = trained(model(llm, tuning="lora", lora_conf={"r": 2, "targets": ["q_proj"]}))
    more = trained(model(llm, tuning="lora", lora_conf={"r": 2, "targets": ["q_proj", "v_proj"]}))
    full = trained(model(llm, tuning="full"))
    tables = trained(model(llm, tuning="lora", train_embeddings=True))
    assert frozen < lora < more and frozen < full
    assert len(tables) > len(trained(model(llm, tuning="lora")))


def gradients(made):
    made.train()
    torch.manual_seed(5)
    made(*batch())[0].backward()
    return {name: p.grad for name, p in made.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_everything_that_is_trained_learns(llm, tuning):
    """Encoder and adapter through a frozen LLM too."""
    found = gradients(model(llm, tuning=tuning))
    # LoRA's A has no gradient as long as B is zero
    learns = {n for n, g in found.items() if g is not None and g.abs().max() > 0}
    assert {n for n in found if not n.endswith("lora_A.weight")} == learns


def test_options_of_how_the_llm_computes(llm):
    """Gradient checkpointing and the kind of attention change no gradient."""
    plain = model(llm, tuning="lora")
    other = model(llm, tuning="lora", gradient_checkpointing=True, attn_implementation="eager")
    expected, found = gradients(plain), gradients(other)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)
    running = [made.decoder.llm.model("cpu") for made in (plain, other)]
    assert [m.is_gradient_checkpointing for m in running] == [False, True]
    assert other.decoder.llm.attn_implementation == "eager"


MODEL_CONF = [
    {"ctc_weight": 0.5},
    {"auxiliary": [{**PREFIX_CTC, "weight": 0.5}]},
    {"lsm_weight": 0.2},
    {"length_normalized_loss": False},
    {"text_mask": 0.5},
]


@pytest.mark.parametrize("conf", MODEL_CONF, ids=str)
def test_options_of_the_model_change_the_loss(llm, conf):
    default, _ = loss_of(model(llm), train=True)
    changed, _ = loss_of(model(llm, model_conf=conf), train=True)
    assert changed != pytest.approx(default, rel=1e-5)


def test_text_mask_is_for_the_input_in_training_alone(llm, monkeypatch):
    made = model(llm, model_conf={"text_mask": 0.5})
    assert loss_of(made)[0] == loss_of(model(llm))[0]  # validation
    seen = []
    original = made.decoder.text_logits

    def record(audio, tokens, lengths):
        seen.append(tokens)
        return original(audio, tokens, lengths)

    monkeypatch.setattr(made.decoder, "text_logits", record)
    data = batch(frames=(9, 9), texts=((3, 4, 5, 6, 7, 8), (3, 4, 5)))
    _, stats = loss_of(made, data, train=True)
    assert (seen[0] == 1).any() and (seen[0][:, 0] == 11).all()
    named = model(llm, model_conf={"text_mask": 0.5, "text_mask_token": "h"})
    assert loss_of(named, data, train=True)[1]["loss"] != stats["loss"]


def test_pieces_as_ctc_vocabulary_change_the_loss(native, pieces):
    default = model(native, native=True, model_conf={"ctc_weight": 0.3})
    own = model(native, native=True, model_conf={"ctc_weight": 0.3, "ctc_vocabulary": pieces})
    assert loss_of(default)[1]["loss_ctc"] != loss_of(own)[1]["loss_ctc"]


# --- what is left out ---


def test_utterances_that_cannot_be_trained_on(llm, caplog):
    """No frame, or more than the LLM's 64 positions: counted, named once, no part in the loss."""
    made = model(llm, model_conf={"ctc_weight": 0.3})
    frames = (9, 0, 62, 60)
    data = batch(frames=frames, texts=((3, 4), (5,), (6, 7), (3, 4, 5)))
    names = ["good", "empty", "long", "fits"]
    torch.manual_seed(5)
    loss, stats, weight = made.eval()(*data, utt_id=names)
    made(*data, utt_id=names)
    assert float(stats["num_skipped"]) == 2.0 and float(weight) == 3 + 4  # tokens with EOS
    assert caplog.text.count("skipped empty: the encoder makes no frame") == 1
    assert "skipped long: audio (62 embeddings), prompt (1 tokens) and text (2)" in caplog.text
    assert "good" not in caplog.text and "fits" not in caplog.text
    rest = tuple(value[torch.tensor([0, 3])] for value in data)
    torch.testing.assert_close(loss, made(*rest)[0], atol=1e-4, rtol=1e-4)


def test_batch_of_which_nothing_is_left(llm):
    made = model(llm, model_conf=FULL, tuning="lora")
    for train in (True, False):
        made.train(train)
        data = batch(frames=(0, 70), texts=((3,), (4,)))
        loss, stats, weight = made(*data)
        _, usual, _ = made(*batch())
        assert float(loss) == 0.0 and 0 < float(weight) < 1e-10
        assert list(stats) == list(usual) and float(stats["num_skipped"]) == 2.0
    loss.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)


def test_empty_transcripts(llm):
    loss, stats = loss_of(model(llm, model_conf=FULL), batch(frames=(4, 2), texts=((), ())))
    assert math.isfinite(loss) and stats["num_skipped"] == 0.0


def test_transcripts_of_another_token_list(llm, native):
    with pytest.raises(UserError, match="contains token 0, which is no text"):
        loss_of(model(llm), batch(texts=((3,), (0,), (4,))))
    made = model(native, native=True)
    last = made.vocab_size - 1
    for wrong in (last, last + 1):
        with pytest.raises(UserError, match=f"contains token {wrong}, which is no text"):
            loss_of(made, batch(texts=((3,), (wrong,), (4,))))


# --- starts and checkpoints ---


def ctc_model(size):
    """Encoder and CTC as an ordinary ESPnet CTC model has them."""
    torch.manual_seed(9)
    made = torch.nn.Module()
    made.encoder, made.ctc = LinearEncoder(), CTC(size, DIM)
    return made


@pytest.mark.parametrize("kind", ["adapted", "native"])
def test_start_from_a_ctc_model(llm, native, pieces, kind, tmp_path):
    """--init_param path:encoder:encoder path:ctc:ctc, with its vocabulary beside a native LLM."""
    size = len(TOKENS)
    made = model(llm, model_conf={"ctc_weight": 0.3})
    if kind == "native":
        size = len(read_token_list(pieces["token_list"]))
        conf = {"ctc_weight": 0.3, "ctc_vocabulary": pieces}
        made = model(native, native=True, model_conf=conf)
    source = ctc_model(size)
    torch.save(source.state_dict(), tmp_path / "ctc.pth")
    for part in ("encoder", "ctc"):
        load_pretrained_model(f"{tmp_path}/ctc.pth:{part}:{part}", made, False)
    assert torch.equal(made.ctc.ctc_lo.weight, source.ctc.ctc_lo.weight)
    assert torch.equal(made.encoder.linear.weight, source.encoder.linear.weight)


def test_ctc_that_only_the_adapter_needs_stays_as_it_was_loaded(llm):
    made = model(llm, adapter="ctc_compression", adapter_conf={"threshold": 0.1})
    assert made.ctc is not None and not any(p.requires_grad for p in made.ctc.parameters())
    _, stats = loss_of(made)
    assert "loss_ctc" not in stats
    assert model(llm).ctc is None


class TestCheckpoints(CheckpointContract):
    tuning = "lora"

    @pytest.fixture(autouse=True, params=["frozen", "lora", "full"])
    def _llms(self, request, llm, other_llm):
        self.llm, self.other, self.tuning = llm, other_llm, request.param

    def make(self):
        conf = {"tuning": self.tuning, "prompt": {"before": "bad"}}
        return model(self.llm, model_conf=WITH_CTC, **conf)

    def run(self, made):
        return made.eval()(*batch())[0].detach()

    def frozen_tensors(self, made):
        if self.tuning == "full":
            return []
        own = {p.data_ptr() for p in made.parameters()}
        frozen = made.decoder.llm.model("cpu").parameters()
        return [p.data for p in frozen if p.data_ptr() not in own]

    def make_with_other_llm(self):
        return model(
            self.other,
            model_conf=WITH_CTC,
            tuning=self.tuning,
            prompt={"before": "bad"},
        )

    def test_another_prompt_is_an_error(self):
        other = model(
            self.llm,
            model_conf=WITH_CTC,
            tuning=self.tuning,
            prompt={"before": "cab"},
        )
        with pytest.raises(UserError, match="another prompt"):
            other.load_state_dict(self.make().state_dict(), strict=False)


def test_statistics_of_features_do_not_load_the_llm(llm, monkeypatch):
    from espnet_llm_plugin.llm import backbone

    monkeypatch.setattr(backbone, "load_causal_lm", lambda *args, **kwargs: pytest.fail("loaded"))
    made = model(llm)
    speech, lengths, text, text_lengths = batch()
    feats = made.collect_feats(speech, lengths, text, text_lengths)
    assert torch.equal(feats["feats"], speech)


def test_features_can_be_left_out_of_the_statistics(llm):
    """ESPnet reads the option, and this attribute."""
    assert model(llm).extract_feats_in_collect_stats
    without = model(llm, model_conf={"extract_feats_in_collect_stats": False})
    assert not without.extract_feats_in_collect_stats


# --- bad configurations ---


@pytest.mark.parametrize(
    "conf, message",
    [
        ({"ctc_wieght": 0.3}, "model_conf of 'speech_llm': unknown option 'ctc_wieght'; valid"),
        ({"ctc_weight": -1.0}, "ctc_weight must be 0 or more"),
        ({"report_wer_utts": -1}, "report_wer_utts must be 0 or more"),
        ({"lsm_weight": 1.0}, r"lsm_weight must be in \[0, 1\), got 1.0"),
        ({"text_mask": 1.5}, r"text_mask must be in \[0, 1\)"),
        ({"text_mask": 0.1, "text_mask_token": "no"}, "text_mask_token 'no' is not a token"),
        ({"text_mask_token": "a"}, "text_mask_token is given, but text_mask is 0"),
        ({"ctc_vocabulary": {}}, "ctc_vocabulary is of a CTC, but ctc_weight is 0"),
    ],
)
def test_bad_configurations(llm, conf, message):
    with pytest.raises(UserError, match=message):
        model(llm, model_conf=conf)


def test_parts_that_do_not_go_together(llm, pieces):
    names = ("frontend", "specaug", "normalize", "preencoder", "postencoder", "joint_network")
    common = {
        "vocab_size": len(TOKENS),
        "encoder": LinearEncoder(),
        "ctc": CTC(len(TOKENS), DIM),
        **dict.fromkeys(names),
    }
    with pytest.raises(UserError, match="needs decoder 'speech_llm', got Linear"):
        SpeechLLMModel(token_list=TOKENS, decoder=torch.nn.Linear(1, 1), **common)
    with pytest.raises(UserError, match="another token list"):
        other = [*TOKENS[:4], "x", *TOKENS[5:]]
        SpeechLLMModel(token_list=other, decoder=decoder(llm), **common)
    common["ctc"].ctc_type = "gtnctc"
    with pytest.raises(UserError, match="ctc_type gtnctc; model 'speech_llm' has builtin CTC only"):
        SpeechLLMModel(token_list=TOKENS, decoder=decoder(llm), ctc_weight=0.1, **common)
    with pytest.raises(UserError, match="tap llm_prefix needs .* merged"):
        model(llm, model_conf={"auxiliary": [{**PREFIX_CTC, "weight": 0.1}]}, interface="merged")
    with pytest.raises(UserError, match="ctc_embedding needs a CTC with the decoder's tokens"):
        conf = {"ctc_weight": 0.1, "ctc_vocabulary": pieces}
        loss_of(model(llm, model_conf=conf, adapter="ctc_embedding"))


def test_native_and_adapted_lists_are_not_mixed_up(llm, native):
    with pytest.raises(UserError, match="is over 12 tokens, the token list has"):
        SpeechLLMDecoder(len(token_list(native, native=True)), DIM, llm=llm)


# --- training ---


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_bfloat16_computes_the_losses_in_float32(llm, tuning):
    made = model(llm, model_conf=FULL, tuning=tuning).eval()
    expected = made(*batch())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, stats, _ = made(*batch())
    assert loss.dtype == torch.float32 and all(v.dtype != torch.bfloat16 for v in stats.values())
    assert not torch.equal(loss, expected)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()
        for p in made.parameters()
        if p.grad is not None
    )


@pytest.mark.parametrize("interface", ["prefix", "merged", "cross_attention"])
def test_learns_to_listen(llm, interface):
    """Three utterances by heart: their audio tells which, and the gap shows that it does."""
    made = model(llm, tuning="full", interface=interface)
    data = batch(texts=((3, 4), (6, 3), (7, 8)))
    before = loss_of(made, data)[1]["shuffled_gap"]
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    made.train()
    for _ in range(150):
        optimizer.zero_grad()
        made(*data)[0].backward()
        optimizer.step()
    _, stats = loss_of(made, data)
    assert stats["acc"] == 1.0 and stats["ce_per_token"] < 0.3
    assert abs(before) < 1.0 and stats["shuffled_gap"] > 2.0
