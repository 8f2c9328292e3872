"""Auxiliary losses in the model: sums, no label leak, gradients, checkpoints, decoding without."""

import itertools

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.model_parts import without_training_parts
from espnet_llm_plugin.speech_llm.heads.auxiliary import LOSSES, TAPS
from tests.speech_llm.tiny import batch, model
from tests.speech_llm.tiny_llm import save_adapted

EVERY = [
    {"loss": loss, "tap": tap, "weight": 0.1 * number}
    for number, (loss, tap) in enumerate(itertools.product(LOSSES, TAPS), start=1)
]
RNNT = {"loss": "rnnt", "tap": "llm_prefix", "predictor_dim": 6, "joint_dim": 8}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "adapted")


def loss_of(made, data=None):
    torch.manual_seed(5)
    loss, stats, weight = made(*(data or batch()))
    return loss, {key: float(value) for key, value in stats.items()}


@pytest.mark.parametrize("interface", ["prefix", "merged", "cross_attention"])
def test_every_loss_at_every_tap(llm, interface):
    confs = [conf for conf in EVERY if interface == "prefix" or conf["tap"] != "llm_prefix"]
    made = model(llm, model_conf={"auxiliary": confs}, interface=interface)
    loss, stats = loss_of(made)
    total = stats["loss_ce"]
    for conf in confs:
        name = f"{conf['tap']}_{conf['loss']}"
        assert stats[f"loss_{name}"] > 0
        # losses are per label, so this is the same
        assert stats[f"{name}_per_label"] == stats[f"loss_{name}"]
        total += conf["weight"] * stats[f"loss_{name}"]
    assert float(loss) == pytest.approx(total, rel=1e-5)
    loss.backward()
    without = [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # distributed training expects a gradient for each


def test_each_head_hears_its_tap(llm):
    """A frame of the encoder, of the adapter and of the LLM: losses of the heads by hand."""
    made = model(llm, model_conf={"auxiliary": EVERY}, adapter_conf={"stack": 2}).eval()
    _, stats = loss_of(made)
    speech, lengths, text, text_lengths = batch()
    hs, hlens = made.encode(speech, lengths)
    audio = made.decoder.adapt(hs, hlens)
    tokens = torch.nn.functional.pad(text.clamp(min=3), (1, 0), value=made.sos)
    _, outputs = made.decoder.text_logits(audio, tokens, text_lengths + 1)
    taps = [(hs, hlens), (audio.embeddings, audio.lengths), (outputs, audio.lengths)]
    for (loss, tap), (frames, sizes) in zip(itertools.product(LOSSES, TAPS), 2 * taps):
        head = getattr(made.auxiliary, f"{tap}_{loss}")
        expected = head.loss(frames, sizes, text.clamp(min=1), text_lengths).reduced(True)
        assert stats[f"loss_{tap}_{loss}"] == pytest.approx(float(expected), rel=1e-4)


def test_per_utterance(llm):
    """The loss then, but nats per label all the same."""
    conf = {"auxiliary": [RNNT]}
    _, by_label = loss_of(model(llm, model_conf=conf))
    made = model(llm, model_conf={**conf, "length_normalized_loss": False})
    _, by_utterance = loss_of(made)
    per_label = by_label["llm_prefix_rnnt_per_label"]
    assert by_utterance["llm_prefix_rnnt_per_label"] == pytest.approx(per_label)
    assert by_utterance["loss_llm_prefix_rnnt"] == pytest.approx(per_label * 7 / 3)


def test_options_of_a_head_and_two_of_a_kind(llm):
    confs = [RNNT, {**RNNT, "name": "second", "joint": "factorized", "predictor": "lstm"}]
    made = model(llm, model_conf={"auxiliary": [*confs, EVERY[0]]})
    first, second = made.auxiliary.llm_prefix_rnnt, made.auxiliary.second
    assert first.joint.output.weight.shape == (12, 8)
    assert second.joint.acoustic_output.weight.shape == (12, 8)
    assert second.predictor.lstm.hidden_size == 6
    _, stats = loss_of(made)
    assert stats["loss_second"] != stats["loss_llm_prefix_rnnt"]
    made.eval()
    nothing = batch(frames=(0, 70), texts=((3,), (4,)))
    assert list(made(*nothing)[1]) == list(made(*batch())[1])


# --- the text stays out of it ---


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_what_heads_hear_does_not_depend_on_the_text(llm, mask, padding):
    """Other texts of other lengths: the same inputs; other audio at the end: what the mask says."""
    conf = {"interface_conf": {"mask": mask, "padding": padding}, "prompt": {"before": "bad"}}
    made = model(llm, model_conf={"auxiliary": [EVERY[2], RNNT]}, **conf).eval()
    heard = []
    for name in ("llm_prefix_ctc", "llm_prefix_rnnt"):
        head = made.auxiliary.head(next(e for e in made.auxiliary.entries if e.name == name))
        original = head.loss
        head.loss = lambda hs, *rest, do=original: (heard.append(hs), do(hs, *rest))[1]
    speech, lengths, *texts = batch()
    _, _, *others = batch(texts=((8, 8), (4, 5, 6, 7, 8), ()))
    changed = speech.clone()
    changed[:, 4] += 1.0  # within all utterances, the last frame of the second
    made(speech, lengths, *texts)
    made(speech, lengths, *others)
    made(changed, lengths, *texts)
    own, _, other_text, _, other_audio, _ = heard
    for i, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(own[i, :length], other_text[i, :length], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(own[i, 4], other_audio[i, 4], atol=1e-3)
        sees_later = not torch.allclose(own[i, :4], other_audio[i, :4], atol=1e-4)
        assert sees_later == (mask == "bidirectional")


# --- what is trained ---


def tensors_of_llm(made):
    return {
        name: tensor.detach().clone()
        for name, tensor in made.decoder.llm.model("cpu").state_dict().items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_a_frozen_llm_passes_gradients_and_stays_bit_by_bit(llm, loss, mask, dtype):
    """Encoder and adapter learn from the auxiliary loss at the LLM's outputs alone."""
    conf = {"auxiliary": [{"loss": loss, "tap": "llm_prefix"}]}
    made = model(llm, model_conf=conf, interface_conf={"mask": mask}, dtype=dtype).train()
    before = tensors_of_llm(made)
    parts = {"encoder": made.encoder, "adapter": made.decoder.adapter, "head": made.auxiliary}
    start = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}
    assert all(start.values())
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        only_auxiliary(made).backward()
        optimizer.step()
    after = tensors_of_llm(made)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, part in parts.items():
        moved = [not torch.equal(old, new) for old, new in zip(start[name], part.parameters())]
        assert any(moved), name


def only_auxiliary(made, data=None):
    """The loss without the cross-entropy of the text."""
    speech, lengths, text, text_lengths = data or batch()
    hs, hlens = made.encode(speech, lengths)
    audio = made.decoder.adapt(hs, hlens)
    tokens = torch.nn.functional.pad(text.clamp(min=3), (1, 0), value=made.sos)
    _, outputs = made.decoder.text_logits(audio, tokens, text_lengths + 1)
    taps = {"llm_prefix": (outputs, audio.lengths)}
    return made.auxiliary.loss(taps, text.clamp(min=1), text_lengths, True, {})


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_tuned_llm_learns_from_the_auxiliary_loss(llm, tuning):
    made = model(llm, model_conf={"auxiliary": [RNNT]}, tuning=tuning).train()
    only_auxiliary(made).backward()
    learns = [
        name
        for name, p in made.decoder.llm.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    ]
    assert any("lora_B" in name for name in learns) == (tuning == "lora")
    assert learns


# --- nothing of it is needed in decoding ---


def test_decoding_needs_no_head(llm, tmp_path):
    """A model built for it lacks them, and the files of their vocabularies may be gone."""
    confs = [{**RNNT, "weight": 0.5}]
    made = model(llm, model_conf={"auxiliary": confs}).eval()
    saved = made.state_dict()
    heads = [key for key in saved if key.startswith("auxiliary.")]
    assert len(heads) == len(list(made.auxiliary.parameters()))
    gone = [{**confs[0], "vocabulary": {"token_list": str(tmp_path / "gone.txt")}}]
    with without_training_parts():
        bare = model(llm, seed=7, model_conf={"auxiliary": gone}).eval()
    assert not len(bare.auxiliary) and not list(bare.auxiliary.parameters())
    bare.load_state_dict(saved, strict=False)
    assert torch.equal(bare.utterance_nll(*batch()), made.utterance_nll(*batch()))
    assert bare.state_dict().keys() == saved.keys() - set(heads)
    with pytest.raises(UserError):
        model(llm, model_conf={"auxiliary": gone})


def test_checkpoint_without_heads(llm):
    """Enough for decoding, not for going on with the training."""
    conf = {"auxiliary": [RNNT]}
    saved = model(llm, model_conf=conf).state_dict()
    bare = {key: value for key, value in saved.items() if not key.startswith("auxiliary.")}
    made = model(llm, seed=7, model_conf=conf)
    made.load_state_dict(bare, strict=False)
    assert torch.equal(made.encoder.linear.weight, bare["encoder.linear.weight"])
    with pytest.raises(UserError, match="lacks .* auxiliary.llm_prefix_rnnt"):
        made.load_state_dict(bare, strict=True)
    some = {k: v for k, v in saved.items() if k != "auxiliary.llm_prefix_rnnt.joint.output.bias"}
    with pytest.raises(UserError, match="lacks 1 .* auxiliary.llm_prefix_rnnt.joint.output.bias"):
        made.load_state_dict(some, strict=False)


def test_the_decoder_does_not_know_the_heads(llm):
    with_heads = model(llm, model_conf={"auxiliary": EVERY})
    without = model(llm)
    assert with_heads.decoder.state_dict().keys() == without.decoder.state_dict().keys()
    owned = {id(p) for p in with_heads.decoder.parameters()}
    assert not any(id(p) in owned for p in with_heads.auxiliary.parameters())


# --- bad configurations ---


@pytest.mark.parametrize(
    "conf, message",
    [
        ({"loss": "ctc"}, "expected a list"),
        (["ctc"], "number 1 is 'ctc'; expected a mapping"),
        ([{"loss": "mse", "tap": "encoder"}], "loss is 'mse'; expected one of ctc, rnnt"),
        ([RNNT, {"loss": "ctc"}], "number 2: tap is None; expected one of encoder, adapter"),
        ([{**RNNT, "weight": 0}], "weight must be above 0, got 0"),
        ([{**RNNT, "weight": "1"}], "weight must be above 0, got '1'"),
        ([{**RNNT, "joint_size": 2}], r"\(loss rnnt\): unknown option 'joint_size'; valid options"),
        ([{**EVERY[0], "joint": "dense"}], r"\(loss ctc\): unknown option 'joint'"),
        ([RNNT, RNNT], "number 2: the name 'llm_prefix_rnnt' is taken"),
        ([{**RNNT, "name": "training"}], "the name 'training' is taken"),
        ([{**RNNT, "name": "ctc"}], "name is 'ctc'; expected letters"),
        ([{**RNNT, "name": "a-b"}], "name is 'a-b'; expected letters"),
        ([{**RNNT, "vocabulary": "words"}], "vocabulary is 'words'; expected tokens"),
        ([{**RNNT, "vocabulary": {"bpemodel": "x"}}], "vocabulary needs token_list"),
    ],
)
def test_bad_configurations(llm, conf, message):
    with pytest.raises(UserError, match=message):
        model(llm, model_conf={"auxiliary": conf})


@pytest.mark.parametrize("interface", ["merged", "cross_attention"])
def test_interfaces_without_outputs_at_the_audio(llm, interface):
    with pytest.raises(UserError, match="tap llm_prefix needs the LLM's outputs .* adapter"):
        model(llm, model_conf={"auxiliary": [RNNT]}, interface=interface)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_soft_prompts_learn_from_the_auxiliary_loss(llm, loss, mask):
    """Through a frozen LLM, whose outputs at the audio they change."""
    conf = {"auxiliary": [{"loss": loss, "tap": "llm_prefix"}]}
    made = model(llm, model_conf=conf, soft_prompt="shared", interface_conf={"mask": mask})
    before = tensors_of_llm(made)
    only_auxiliary(made.train()).backward()
    grads = [p.grad for p in made.decoder.soft_prompt.parameters()]
    assert grads and all(grad.abs().max() > 0 for grad in grads)
    torch.optim.SGD(made.parameters(), lr=1.0).step()
    after = tensors_of_llm(made)
    assert all(torch.equal(before[name], after[name]) for name in before)
