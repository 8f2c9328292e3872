"""Statistics of n-best lists: against slow references, and files that are not lists."""

import json
import math

import jiwer
import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.nbest import Entry, entropy, read_lists, statistics

REFERENCES = {"a": "One two three", "b": "two two", "c": "three"}
LISTS = {
    "a": [("one two", -1.0), ("one two three four", -1.5), ("ONE two three", -4.0)],
    "b": [("two", -2.0), ("two three", -2.0)],
}


def entries(lists):
    return {
        utt: [Entry(text.split(), total) for text, total in hyps] for utt, hyps in lists.items()
    }


def write(path, lists):
    lines = [
        {"utt": utt, "rank": rank, "text": text, "total": total}
        for utt, hyps in lists.items()
        for rank, (text, total) in enumerate(hyps, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_statistics_equal_a_slow_computation():
    found = statistics(REFERENCES, entries(LISTS))
    # errors in the order of the lists: a 1 1 0; b 1 1; c (no list) 1
    assert found.oracle == pytest.approx([100 * n / 6 for n in (1 + 1 + 1, 1 + 1 + 1, 0 + 1 + 1)])
    assert found.best == found.oracle[-1]
    first = jiwer.process_words(list(REFERENCES.values()), ["One two", "two", ""])
    assert found.oracle[0] == pytest.approx(100 * first.wer)
    assert (found.utterances, found.words) == (3, 6)
    assert found.mean_length == pytest.approx((3 + 2 + 1) / 3)
    assert found.without_variance == pytest.approx(2 / 3)
    posterior = [math.exp(-1), math.exp(-1.5), math.exp(-4)]
    posterior = [weight / sum(posterior) for weight in posterior]
    effective = math.exp(-sum(p * math.log(p) for p in posterior))
    assert found.effective == pytest.approx((effective + 2 + 1) / 3)


def test_case_counts_when_asked_for():
    found = statistics(REFERENCES, entries(LISTS), case_sensitive=True)
    assert found.oracle == pytest.approx([100 * n / 6 for n in (2 + 1 + 1, 2 + 1 + 1, 1 + 1 + 1)])


@pytest.mark.parametrize("scores", [[0.0], [-1e4, -1e4], [1e4, -1e4], [2.0, 2.0, 2.0]])
def test_entropy_at_its_ends(scores):
    equal = len(set(scores)) == 1
    assert math.exp(entropy(scores)) == pytest.approx(len(scores) if equal else 1)


def test_lists_from_several_jobs(tmp_path):
    files = [write(tmp_path / f"{utt}.jsonl", {utt: LISTS[utt]}) for utt in LISTS]
    assert read_lists(files) == entries(LISTS)


def test_bad_lists(tmp_path):
    path = tmp_path / "nbest.jsonl"
    with pytest.raises(UserError, match="no such file"):
        read_lists([path])
    path.write_text('{"utt": "a", "rank": 1, "text": null, "total": 0}\n')
    with pytest.raises(UserError, match=r"nbest.jsonl:1 is not a line of asr_inference's"):
        read_lists([path])
    write(path, LISTS)
    with pytest.raises(UserError, match="a has rank 1 out of order"):
        read_lists([path, path])
    with pytest.raises(UserError, match="no n-best list"):
        statistics({"other": "word"}, entries(LISTS))
