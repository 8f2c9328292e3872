"""What a recipe fills into the configuration of a speech LLM."""

import pytest

from espnet_llm_plugin.bin.speech_llm_options import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.speech_llm.recipe import recipe_options
from espnet_llm_plugin.training_config import read_training_config

CONFIG = """
decoder_conf: {soft_prompt: per_language, soft_prompt_conf: {length: 4}}
model_conf:
    ctc_vocabulary: {token_list: old.txt, bpemodel: old.model}
    auxiliary:
    -   {loss: ctc, tap: adapter, weight: 0.2, vocabulary: tokens}
    -   {loss: rnnt, tap: llm_prefix, vocabulary: {token_list: old.txt, bpemodel: old.model}}
    -   {loss: rnnt, tap: encoder}
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "train.yaml").write_text(CONFIG)
    return tmp_path / "train.yaml"


def test_languages_and_pieces(path):
    config = read_training_config(path)
    words = recipe_options(config, ["no", "de"], "data/pieces/bpe.model")
    assert not any(" " in word for word in words)
    filled = read_training_config(path, " ".join(words))
    # `no` of YAML would be False
    assert filled["decoder_conf"]["soft_prompt_conf"] == {"length": 4, "languages": ["no", "de"]}
    new = {"token_list": "data/pieces/tokens.txt", "bpemodel": "data/pieces/bpe.model"}
    assert filled["model_conf"]["ctc_vocabulary"] == new
    before, after = (conf["model_conf"]["auxiliary"] for conf in (config, filled))
    assert after[1] == {**before[1], "vocabulary": new}
    assert [after[0], after[2]] == [before[0], before[2]]


def test_what_is_given_stays(path):
    languages = "--decoder_conf soft_prompt_conf.languages=[pl]"
    assert recipe_options(read_training_config(path, languages), ["en"]) == []
    none = "--decoder_conf soft_prompt=shared --max_epoch 3"
    assert recipe_options(read_training_config(path, none), ["en"]) == []
    assert recipe_options({}, ["en"], "bpe.model") == []
    heads = {"model_conf": {"auxiliary": [{"loss": "rnnt", "tap": "adapter"}]}}
    assert recipe_options(heads, [], "bpe.model") == []


def test_options_have_no_spaces(path):
    config = {"model_conf": {"auxiliary": [{"name": "a b", "vocabulary": {"token_list": "x"}}]}}
    with pytest.raises(UserError, match="auxiliary .* cannot have spaces"):
        recipe_options(config, [], "bpe.model")


def test_command_line(path, tmp_path, capsys):
    ctc = tmp_path / "config.yaml"
    ctc.write_text("bpemodel: data/pieces/bpe.model\n")
    main(["--config", str(path), "--langs", "hi bn", "--ctc_config", str(ctc)])
    words = capsys.readouterr().out.split()
    assert words[:2] == ["--decoder_conf", 'soft_prompt_conf.languages=["hi","bn"]']
    assert words[2:4] == ["--model_conf", "ctc_vocabulary.token_list=data/pieces/tokens.txt"]
    main(["--config", str(path), "--asr_args=--decoder_conf soft_prompt=shared", "--langs", "hi"])
    assert capsys.readouterr().out.split() == []
    ctc.write_text("bpemodel: null\n")
    with pytest.raises(UserError, match="the CTC model has no pieces"):
        main(["--config", str(path), "--ctc_config", str(ctc)])
