"""Complete tables of languages."""

import pytest

from espnet_llm_plugin.bin.prepare_languages import main
from espnet_llm_plugin.data.languages import complete_languages
from espnet_llm_plugin.errors import UserError

TABLE = {"b": "en", "a": "de", "c": "", "e": "fr", "else": "xx"}


def test_every_utterance_has_a_language():
    found = complete_languages(TABLE, ["b", "a", "c", "d", "e"])
    assert list(found.table.items()) == [
        ("b", "en"),
        ("a", "de"),
        ("c", "unk"),
        ("d", "unk"),
        ("e", "fr"),
    ]
    assert found.without == ["c", "d"] and not found.foreign and not found.unused
    first, second = found.report()
    assert first == "5 utterances: de 1, en 1, fr 1, unk 2"
    assert second.startswith("2 utterances have no language, e.g. c")


def test_languages_of_a_model():
    keys = ["b", "a", "e"]
    message = r"'fr' \(1 utterance, e.g. e\); it knows en, de, pl"
    with pytest.raises(UserError, match=message):
        complete_languages(TABLE, keys, ["en", "de", "pl"])
    found = complete_languages(TABLE, keys, ["en", "de", "pl"], "unk")
    assert found.table["e"] == "unk" and found.foreign == {"fr": ["e"]}
    assert found.without == [] and found.unused == ["pl"]
    assert any("without an utterance: pl" in line for line in found.report())
    assert any("taken as unknown: fr 1" in line for line in found.report())


def test_foreign_languages_are_counted_in_one_message():
    table = {"a": "xx", "b": "de", "c": "fr", "d": "xx"}
    message = r"'xx' \(2 utterances, e.g. a\), 'fr' \(1 utterance, e.g. c\); it knows de"
    with pytest.raises(UserError, match=message):
        complete_languages(table, list(table), ["de"])


def test_unknown_in_the_table_is_no_language():
    found = complete_languages({"a": "unk", "b": "de", "c": ""}, ["a", "b", "c", "d"], ["de"])
    assert found.without == ["a", "c", "d"] and found.counts == {"de": 1, "unk": 3}
    assert "3 utterances have no language, e.g. a: they count as unknown" in found.report()


def test_none_at_all():
    with pytest.raises(UserError, match="not one of the 2 utterances"):
        complete_languages({}, ["a", "b"])


def test_command_line(tmp_path, capsys):
    (tmp_path / "utt2lang").write_text("a en\nb de\n")
    (tmp_path / "wav.scp").write_text("b b.wav\na a.wav\nc c.wav\n")
    config = tmp_path / "train.yaml"
    options = ["--utt2lang", str(tmp_path / "utt2lang"), "--key_file", str(tmp_path / "wav.scp")]
    options += ["--output", str(tmp_path / "out/train"), "--config", str(config)]
    config.write_text("decoder_conf:\n  soft_prompt_conf: {languages: {en: english, de: null}}\n")
    main(options)
    assert (tmp_path / "out/train").read_text() == "b de\na en\nc unk\n"
    assert "3 utterances: de 1, en 1, unk 1" in capsys.readouterr().out
    config.write_text("decoder_conf:\n  soft_prompt_conf: {languages: [en]}\n")
    with pytest.raises(UserError, match=r"utt2lang: .*'de' \(1 utterance, e.g. b\); it knows en"):
        main(options)
    # options of the training change the configuration
    main([*options, "--asr_args=--max_epoch 1 --decoder_conf soft_prompt_conf.languages=[en,de]"])
    with pytest.raises(UserError, match="it knows en, fr"):
        main([*options, "--asr_args=--decoder_conf soft_prompt_conf.languages=[en,fr]"])
    capsys.readouterr()
    main([*options, '--asr_args=--decoder_conf soft_prompt_conf.languages=["en","de","fr"]'])
    assert "languages of the model without an utterance: fr" in capsys.readouterr().out
    config.write_text("decoder_conf: {}\n")  # they are given elsewhere
    main(options)
    with pytest.raises(UserError, match="--utt2lang .*no such file"):
        main(["--utt2lang", str(tmp_path / "nowhere"), *options[2:]])
