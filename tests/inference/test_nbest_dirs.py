"""N-best directories: ESPnet's, ours, and what is wrong with others."""

import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.nbest_dirs import (
    NBestEntry,
    check_tokens_of_lists,
    read_nbest_dir,
    write_nbest_dir,
)

TOKENS = ["<blank>", "<unk>", "a", "b", "<sos/eos>"]
LISTS = {
    "utt-1": [
        NBestEntry("ab", -1.5, (2, 3), ("a", "b"), {"acoustic": -1.0}),
        NBestEntry("a", -2.5, (2,), ("a",), {"acoustic": -2.0}),
    ],
    "utt-2": [NBestEntry("", 0.0, (), (), {"acoustic": 0.0})],
}


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_round_trip(tmp_path):
    write_nbest_dir(tmp_path, LISTS)
    again = read_nbest_dir(tmp_path)
    assert again == LISTS
    assert again["utt-1"][1].parts["acoustic"] == -2.0
    assert (tmp_path / "text").read_text() == "utt-1 ab\nutt-2 \n"
    assert (tmp_path / "text").read_text() == (tmp_path / "1best_recog" / "text").read_text()
    write_nbest_dir(tmp_path, {"utt-2": LISTS["utt-2"]})
    assert read_nbest_dir(tmp_path) == {"utt-2": LISTS["utt-2"]}


def test_espnets_jobs(tmp_path):
    jobs = tmp_path / "logdir"
    for job, utt, score in ((10, "u10", "-3"), (2, "u2", "tensor(-1.25e+01, device='cuda:0')")):
        write(
            jobs / f"output.{job}" / "1best_recog",
            **{"text": f"{utt} a\n", "score": f"{utt} {score}\n", "token_int": f"{utt} 2\n"},
        )
    found = read_nbest_dir(tmp_path)
    assert list(found) == ["u2", "u10"]
    assert found["u2"][0] == NBestEntry("a", -12.5, (2,), None)


def test_tokens_of_another_list(tmp_path):
    check_tokens_of_lists(LISTS, TOKENS, "exp/decode", "the LM")
    with pytest.raises(UserError, match="exp/decode.*than the LM: token 3 is 'b'.*, 'c' there"):
        check_tokens_of_lists(LISTS, [*TOKENS[:3], "c", TOKENS[4]], "exp/decode", "the LM")
    with pytest.raises(UserError, match="none of the 3"):
        check_tokens_of_lists(LISTS, TOKENS[:3], "exp/decode", "the LM")
    texts = {"u": [NBestEntry("a", 0.0)]}
    with pytest.raises(UserError, match="exp/decode has no token_int.*LLM in its own tokens"):
        check_tokens_of_lists(texts, TOKENS, "exp/decode", "the LM")


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_nbest_dir(tmp_path / "absent")
    with pytest.raises(UserError, match="has no n-best lists"):
        read_nbest_dir(tmp_path)
    write(tmp_path / "a" / "1best_recog", text="u a\n")
    with pytest.raises(UserError, match="has no score"):
        read_nbest_dir(tmp_path / "a")
    write(tmp_path / "b" / "1best_recog", text="u a\n", score="u nothing\n")
    with pytest.raises(UserError, match="the score of u is 'nothing'"):
        read_nbest_dir(tmp_path / "b")
    for job in "12":
        write(tmp_path / f"c/logdir/output.{job}/1best_recog", text="u a\n", score="u 1\n")
    with pytest.raises(UserError, match="u was decoded by two jobs"):
        read_nbest_dir(tmp_path / "c")
    write(tmp_path / "d" / "1best_recog", text="u a\n", score="u 1\n")
    write(tmp_path / "d" / "2best_recog", text="v a\n", score="v 1\n")
    with pytest.raises(UserError, match="v is there, but not in 1best_recog"):
        read_nbest_dir(tmp_path / "d")
