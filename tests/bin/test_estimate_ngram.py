"""bin/estimate_ngram: tokens of a configuration or of a list, and what is refused."""

import pytest
import torch
import yaml

from espnet_llm_plugin.bin.estimate_ngram import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.label_ngram import LabelNgram

TOKENS = ["<blank>", "<unk>", "a", "b", "<space>", "<sos/eos>"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("1 ab a\n2 b\n3 ba ab\n")
    return path


def test_tokens_of_a_training_or_of_a_list(text, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"token_list": TOKENS, "token_type": "char"}))
    (tmp_path / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    rows = []
    for given in (("--asr_train_config", config), ("--token_list", tmp_path / "tokens.txt")):
        output = tmp_path / "ngram.npz"
        main([*map(str, given), "--text", str(text), "--order", "3", "--output", str(output)])
        assert "3-gram over 6 tokens from 3 sentences" in capsys.readouterr().out
        rows.append(LabelNgram.load(output, TOKENS).rows(torch.tensor([[5, 2], [5, 3]])))
    ids = [[2, 3, 4, 2], [3], [3, 2, 4, 2, 3]]
    expected = LabelNgram.estimate(ids, len(TOKENS), 3).rows(torch.tensor([[5, 2], [5, 3]]))
    for found in rows:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "options,message",
    [
        ("", "give the recogniser's tokens"),
        ("--asr_train_config none.yaml", "--asr_train_config .*none.yaml"),
        ("--token_list TOKENS --order 1", "expected at least 2"),
    ],
)
def test_mistakes(text, tmp_path, options, message):
    (tmp_path / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    options = options.replace("TOKENS", str(tmp_path / "tokens.txt")).split()
    with pytest.raises(UserError, match=message):
        main(["--text", str(text), "--output", str(tmp_path / "out.npz"), *options])
    assert not (tmp_path / "out.npz").exists()
