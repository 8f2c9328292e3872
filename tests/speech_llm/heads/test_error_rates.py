"""Greedy decoding in validation: against slow decoding, error rates, how much is decoded."""

import math

import pytest
import torch
from espnet2.train.reporter import Reporter

from espnet_llm_plugin.speech_llm.heads.error_rates import error_rates, greedy_tokens
from espnet_llm_plugin.speech_llm.hypothesis import DECODER
from espnet_llm_plugin.speech_llm.scorers import LLMScorer
from espnet_llm_plugin.speech_llm.search import LabelSearch
from tests.speech_llm.tiny import batch, model
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


def stats_of(made, data=None):
    _, stats, _ = made(*(data or batch()))
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


def test_error_rates():
    references = ["the cat sat", "a b"]
    assert error_rates(references, references) == (0.0, 0.0)
    # 1 substitution and 1 deletion of 5 words; 1 and 1 of 11 letters
    found = error_rates(references, ["the cut sat", "a"])
    assert found == (pytest.approx(40.0), pytest.approx(100 * 2 / 11))
    assert error_rates(references, ["", "a b and so on"])[0] == pytest.approx(100 * 6 / 5)
    assert all(math.isnan(rate) for rate in error_rates([""], ["a"]))


@pytest.mark.parametrize("kind", ["adapted", "native"])
def test_rates_of_the_llm_and_all_heads_side_by_side(llm, native, kind):
    directory = llm if kind == "adapted" else native
    made = model(directory, kind == "native", model_conf={**HEADS, "report_wer_utts": 2}).eval()
    ids = [3, 4, 5, 6] if kind == "adapted" else made.decoder.units.encode("the cat")
    data = batch(texts=(ids, ids[:2], ids[:1]))
    stats = stats_of(made, data)
    names = ("llm", "ctc", "llm_prefix_rnnt", "adapter_ctc")
    assert {key for key in stats if key[:3] in ("wer", "cer")} == {
        f"{rate}_{name}" for name in names for rate in ("wer", "cer")
    }
    # by hand, of the first two utterances
    units = made.decoder.units
    references = [units.decode(ids), units.decode(ids[:2])]
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
        hypotheses = [head.vocabulary.text(row) for row in labels[:2]]
        wer, cer = error_rates(references, hypotheses)
        assert (stats[f"wer_{name}"], stats[f"cer_{name}"]) == pytest.approx((wer, cer))
    limits = [2 * len(ids) + 10, 14]
    tokens = greedy_tokens(made.decoder, audio.select(torch.tensor([0, 1])), limits)
    wer, cer = error_rates(references, [units.decode(row) for row in tokens])
    assert (stats["wer_llm"], stats["cer_llm"]) == pytest.approx((wer, cer))


def test_so_many_utterances_of_every_validation(llm):
    """The rest costs nothing and has no part in ESPnet's mean; training begins anew."""
    made = model(llm, model_conf={**HEADS, "report_wer_utts": 4})
    assert "wer_llm" not in stats_of(made.train())
    made.eval()
    rates = [stats_of(made)["wer_llm"] for _ in range(3)]
    assert not math.isnan(rates[0]) and not math.isnan(rates[1]) and math.isnan(rates[2])
    stats_of(made.train())
    assert not math.isnan(stats_of(made.eval())["wer_llm"])
    reporter = Reporter()
    reporter.set_epoch(1)
    with reporter.observe("valid") as sub:
        for value in rates:
            sub.register({"wer_llm": torch.tensor(value)}, torch.tensor(1.0))
            sub.next()
    expected = (rates[0] + rates[1]) / 2
    assert reporter.get_value("valid", "wer_llm", 1) == pytest.approx(expected)
    silent = model(llm, model_conf=HEADS).eval()
    assert not any(key.startswith("wer") for key in stats_of(silent))


def test_batch_of_which_nothing_is_left_has_the_same_statistics(llm):
    made = model(llm, model_conf={**HEADS, "report_wer_utts": 4})
    for train in (True, False):
        made.train(train)
        nothing = batch(frames=(0, 70), texts=((3,), (4,)))
        assert list(made(*nothing)[1]) == list(made(*batch())[1])
