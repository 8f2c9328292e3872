"""Greedy decoding in validation: against slow decoding, error rates, how much is decoded."""

import math
import random

import pytest
import torch
from espnet2.train.reporter import Reporter

from espnet_llm_plugin.speech_llm.heads import error_rates as module
from espnet_llm_plugin.speech_llm.heads.error_rates import (
    count_errors,
    error_rates,
    greedy_tokens,
)
from espnet_llm_plugin.speech_llm.heads.sample import name_hash
from espnet_llm_plugin.speech_llm.hypothesis import DECODER
from espnet_llm_plugin.speech_llm.scorers import LLMScorer
from espnet_llm_plugin.speech_llm.search import LabelSearch
from tests.speech_llm.tiny import batch, model, single
from tests.speech_llm.tiny_llm import save_adapted, save_native

HEADS = {
    "ctc_weight": 0.3,
    "auxiliary": [{"loss": "rnnt", "tap": "llm_prefix"}, {"loss": "ctc", "tap": "adapter"}],
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_adapted(tmp_path_factory.mktemp("llm") / "adapted")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return save_native(tmp_path_factory.mktemp("native"))


def stats_of(made, data=None, **names):
    _, stats, _ = made(*(data or batch()), **names)
    return {key: float(value) for key, value in stats.items()}


@pytest.mark.parametrize("interface", ["prefix", "merged", "cross_attention"])
def test_greedy_tokens_are_those_of_the_search(llm, interface):
    made = model(llm, interface=interface, prompt={"before": "bad"}).eval()
    decoder = made.decoder
    with torch.no_grad():
        audio = decoder.adapt(*made.encode(*batch()[:2]))
        limits = [4, 12, 7]
        found = greedy_tokens(decoder, audio, limits)
        search = LabelSearch(
            sos=decoder.prompt.sos,
            eos=decoder.units.eos,
            vocab_size=made.vocab_size,
            beam_size=1,
            forbidden=tuple((~decoder.scored).nonzero().flatten().tolist()),
        )
        scorer = LLMScorer(decoder, decoder.start_after(audio), decoder.scored)
        expected = search({DECODER: scorer}, limits)
    assert found == [list(hyps[0].tokens) for hyps in expected]
    assert any(found)


@pytest.mark.parametrize("interface, most", [("prefix", 3), ("cross_attention", 63)])
def test_greedy_tokens_end_with_the_context(llm, interface, most):
    """64 positions, of which the longest audio takes 60 or none, and BOS one."""
    made = model(llm, interface=interface).eval()
    with torch.no_grad():
        audio = made.decoder.adapt(*made.encode(*batch(frames=(60, 9))[:2]))
        logits = torch.zeros(2, made.vocab_size)
        logits[:, 3] = 1.0
        original = made.decoder.step
        made.decoder.step = lambda tokens, *rest: (
            logits[: len(tokens)],
            original(tokens, *rest)[1],
        )
        found = greedy_tokens(made.decoder, audio, [70, 70])
    assert found == [most * [3], most * [3]]


def rates_of(references, hypotheses):
    found = error_rates([count_errors(*pair) for pair in zip(references, hypotheses)])
    return found["wer"], found["cer"]


def test_error_rates():
    references = ["the cat sat", "a b"]
    assert rates_of(references, references) == (0.0, 0.0)
    # 1 substitution and 1 deletion of 5 words; 1 and 1 of 11 letters
    found = rates_of(references, ["the cut sat", "a"])
    assert found == (pytest.approx(40.0), pytest.approx(100 * 2 / 11))
    assert rates_of(references, ["", "a b and so on"])[0] == pytest.approx(100 * 6 / 5)
    assert all(math.isnan(rate) for rate in [*rates_of([""], ["a"]), *rates_of([], [])])


@pytest.mark.parametrize("kind", ["adapted", "native"])
def test_rates_of_the_llm_and_all_heads_side_by_side(llm, native, kind):
    directory = llm if kind == "adapted" else native
    made = model(directory, kind == "native", model_conf={**HEADS, "report_wer_utts": 2}).eval()
    ids = [3, 4, 5, 6] if kind == "adapted" else made.decoder.units.encode("the cat")
    data = batch(texts=(ids, ids[:2], ids[:1]))
    rows = [0, 2]
    stats = stats_of(made, data, utt_id=lowest_at(rows))
    names = ("llm", "ctc", "llm_prefix_rnnt", "adapter_ctc")
    assert {key for key in stats if key[:3] in ("wer", "cer")} == {
        f"{rate}_{name}" for name in names for rate in ("wer", "cer")
    }
    # by hand, of the two utterances whose names have the lowest hashes
    units = made.decoder.units
    references = [units.decode(ids), units.decode(ids[:1])]
    with torch.no_grad():
        hs, hlens = made.encode(*data[:2])
        audio = made.decoder.adapt(hs, hlens)
        written = {
            "ctc": (made.ctc, made.ctc.greedy(hs, hlens)),
            "adapter_ctc": (
                made.auxiliary.adapter_ctc,
                made.auxiliary.adapter_ctc.greedy(audio.embeddings, audio.lengths),
            ),
        }
    for name, (head, labels) in written.items():
        hypotheses = [head.vocabulary.text(labels[row]) for row in rows]
        wer, cer = rates_of(references, hypotheses)
        assert (stats[f"wer_{name}"], stats[f"cer_{name}"]) == pytest.approx((wer, cer))
    limits = [2 * len(ids) + 10, 12]
    tokens = greedy_tokens(made.decoder, audio.select(torch.tensor(rows)), limits)
    wer, cer = rates_of(references, [units.decode(row) for row in tokens])
    assert (stats["wer_llm"], stats["cer_llm"]) == pytest.approx((wer, cer))


def lowest_at(rows, size=3):
    """Names of a batch, of which those at ``rows`` have the lowest hashes."""
    names = sorted("abc"[:size], key=name_hash)
    order = [*rows, *(row for row in range(size) if row not in rows)]
    return [name for _, name in sorted(zip(order, names))]


def validation(batches=6, size=3):
    """Names and data of batches, the shortest first; all have as much text as audio."""
    generator = random.Random(1)
    for i in range(batches):
        texts = [[generator.randint(3, 8) for _ in range(1 + i // 2 + i % 2)] for _ in range(size)]
        frames = [5 + 2 * len(text) for text in texts]
        yield [f"utt{i}-{j}" for j in range(size)], batch(frames, texts, seed=i)


def epoch(made, number, reporter):
    """ESPnet's mean of ``wer_llm`` and ``cer_adapter_ctc`` over a validation after training."""
    made.train()(*batch())
    made.eval()
    with reporter.observe("valid", epoch=number) as sub:
        for names, data in validation():
            _, stats, weight = made(*data, utt_id=names)
            sub.register(stats, weight)
            sub.next()
    return [reporter.get_value("valid", key, number) for key in ("wer_llm", "cer_adapter_ctc")]


def test_espnets_means_are_the_rates_of_the_same_utterances_in_every_epoch(llm, monkeypatch):
    """The utterances with the lowest hashes, each decoded alone, are the reference."""
    conf = {**HEADS, "report_wer_utts": 5}
    made = model(llm, model_conf={**conf, "length_normalized_loss": False}).eval()
    chosen = sorted((name for names, _ in validation() for name in names), key=name_hash)[:5]
    assert {name[3] for name in chosen} & set("345")  # long ones are among them
    errors = []
    with torch.no_grad():
        for names, data in validation():
            for row in [row for row, name in enumerate(names) if name in chosen]:
                one = single(data, row)
                audio = made.decoder.adapt(*made.encode(*one[:2]))
                ids = one[2][0].tolist()
                tokens = greedy_tokens(made.decoder, audio, [2 * len(ids) + 10])[0]
                head = made.auxiliary.adapter_ctc
                labels = head.greedy(audio.embeddings, audio.lengths)[0]
                texts = [made.decoder.units.decode(tokens), head.vocabulary.text(labels)]
                errors.append(
                    [count_errors(made.decoder.units.decode(ids), text) for text in texts]
                )
    expected = [
        error_rates(of)[rate] for of, rate in zip(zip(*errors, strict=True), ("wer", "cer"))
    ]
    decoded = []
    original = module.greedy_tokens

    def counting(decoder, audio, limits):
        decoded[-1] += len(limits)
        return original(decoder, audio, limits)

    monkeypatch.setattr(module, "greedy_tokens", counting)
    reporter = Reporter()
    for number in (1, 2):
        decoded.append(0)
        assert epoch(made, number, reporter) == pytest.approx(expected, rel=1e-5)
    assert 5 < decoded[0] < 18 and decoded[1:] == [5]
    # a run that is resumed; batches have other weights
    decoded.append(0)
    again = model(llm, model_conf=conf).eval()
    again.load_state_dict(made.state_dict())
    assert epoch(again, 3, reporter) == pytest.approx(expected, rel=1e-5)


def test_processes_share_the_number(llm, monkeypatch):
    """Of 5 utterances each of two processes decodes 3 at most."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    found = []
    original = module.greedy_tokens
    monkeypatch.setattr(
        module, "greedy_tokens", lambda *args: found.append(len(args[2])) or original(*args)
    )
    made = model(llm, model_conf={**HEADS, "report_wer_utts": 5}).eval()
    stats_of(made, batch((9, 5, 7, 8), ((3, 4), (3,), (4,), (5,))))
    assert found == [3]


def test_without_names_and_without_the_option(llm):
    """Utterances without names are numbered; training has no such statistics."""
    made = model(llm, model_conf={**HEADS, "report_wer_utts": 4})
    assert "wer_llm" not in stats_of(made.train())
    rates = [stats_of(made.eval())["wer_llm"] for _ in range(2)]
    stats_of(made.train())
    assert [stats_of(made.eval())["wer_llm"] for _ in range(2)] == rates
    assert all(math.isfinite(rate) for rate in rates)
    silent = model(llm, model_conf=HEADS).eval()
    assert not any(key.startswith("wer") for key in stats_of(silent))


def test_batch_of_which_nothing_is_left_has_the_same_statistics(llm):
    made = model(llm, model_conf={**HEADS, "report_wer_utts": 4})
    for train in (True, False):
        made.train(train)
        nothing = batch(frames=(0, 70), texts=((3,), (4,)))
        assert list(made(*nothing)[1]) == list(made(*batch())[1])
