"""The command lines with a speech LLM that has soft prompts of languages."""

import json
import logging

import pytest

from espnet_llm_plugin.bin import asr_inference, evaluate_audio_use, evaluate_nll, tune_scales
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.loading import load_asr
from espnet_llm_plugin.inference.recognizer import encode
from tests.inference.tiny_asr import TOKENS, make_audio, make_speech_llm, read_scp
from tests.llm.tiny import save_adapted_dir

SECONDS = {"utt-b": 0.9, "utt-a": 0.5, "utt-c": 1.3, "utt-d": 0.7}
LANGUAGES = {"utt-b": "en", "utt-a": "de", "utt-c": "en", "utt-d": "to"}
TEXT = {"utt-b": "d a b d", "utt-a": "ab c", "utt-c": "c", "utt-d": "a"}
CONF = ", soft_prompt: per_language, soft_prompt_conf: {length: 2, languages: [en, de, to]}"
SEARCH = ("--beam_size", "3", "--ctc_weight", "0.3", "--penalty", "0.5", "--maxlenratio", "-8")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    llm = save_adapted_dir(directory / "llm", TOKENS, seed=3)
    predicting = f"{CONF}, language_prediction: true"
    made = {
        "languages": make_speech_llm(directory / "languages", llm, decoder_conf=CONF),
        "predicting": make_speech_llm(directory / "predicting", llm, decoder_conf=predicting),
        "plain": make_speech_llm(directory / "plain", llm),
        "wav": make_audio(directory / "wav", SECONDS),
        "utt2lang": directory / "utt2lang",
        "text": directory / "text",
    }
    for name, table in (("utt2lang", LANGUAGES), ("text", TEXT)):
        made[name].write_text("".join(f"{utt} {value}\n" for utt, value in table.items()))
    return made


@pytest.fixture
def run(files, tmp_path):
    """Decode into ``tmp_path/out``; returns the n-best entries by utterance."""

    def decode(*options, kind="languages", wav=None, out="out", search=SEARCH):
        data = f"{wav or files['wav']},speech,sound"
        directory = tmp_path / out
        asr_inference.main(
            [
                *files[kind].asr_options(),
                *("--data_path_and_name_and_type", data, "--num_workers", "0"),
                *("--output_dir", str(directory), *search, *map(str, options)),
            ]
        )
        lines = (directory / "nbest.jsonl").read_text().splitlines()
        return {entry["utt"]: entry for entry in map(json.loads, lines)}

    return decode


def same(one, other):
    assert one["token_int"] == other["token_int"]
    assert one["total"] == pytest.approx(other["total"], abs=1e-3)


def test_each_utterance_has_the_vectors_of_its_language(run, files, tmp_path):
    found = run("--utt2lang", files["utt2lang"])
    by_code = {code: run("--lang", code, out=code) for code in ("en", "de", "to", "unk")}
    for utt, code in LANGUAGES.items():
        same(found[utt], by_code[code][utt])
        assert found[utt]["lang"] == code
        assert len({entries[utt]["total"] for entries in by_code.values()}) == 4
    assert read_scp(tmp_path / "out/1best_recog/lang") == LANGUAGES
    assert not (tmp_path / "out/1best_recog/lang_predicted").exists()
    together = run("--utt2lang", files["utt2lang"], "--batch_size", "4", out="batch")
    for utt, entry in found.items():
        same(together[utt], entry)
    # nothing given: unknown, as in ESPnet's own inference
    for utt, entry in run(out="nothing").items():
        same(entry, by_code["unk"][utt])
        assert entry["lang"] == "unk"


def test_the_llm_without_audio_has_the_same_soft_prompt(run, files):
    search = (*SEARCH, "--textlm_weight", "0.5")
    given = ("--utt2lang", files["utt2lang"])
    found, english = run(*given, search=search), run("--lang", "en", search=search, out="en")
    unknown = run("--lang", "unk", search=search, out="unk")
    for utt in ("utt-b", "utt-c"):
        same(found[utt], english[utt])
        assert found[utt]["textlm"] != pytest.approx(unknown[utt]["textlm"], abs=1e-3)


def test_espnets_search_has_the_unknown_language(run, files, tmp_path):
    search = ("--beam_size", "7", "--ctc_weight", "0.4", "--max_repeats", "0")
    ours = run(search=search)
    asr_inference.main(
        [
            *files["languages"].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--num_workers", "0", "--search", "espnet", "--output_dir", str(tmp_path / "espnet")),
            *search[:4],
        ]
    )
    theirs = read_scp(tmp_path / "espnet/1best_recog/text")
    assert {utt: entry["text"] for utt, entry in ours.items()} == theirs


def test_predicted_languages(run, files, tmp_path):
    found = run(kind="predicting")
    predicted = read_scp(tmp_path / "out/1best_recog/lang_predicted")
    assert predicted == read_scp(tmp_path / "out/1best_recog/lang")
    # slowly: mean of the frames, row of each language
    asr = load_asr(files["predicting"].config, files["predicting"].model)
    head = asr.model.decoder.language_head
    import soundfile

    for utt in SECONDS:
        samples, _ = soundfile.read(files["wav"].parent / f"{utt}.wav", dtype="float32")
        mean = encode(asr.model, [samples])[0][0].mean(0)
        scores = {
            code: float(
                mean @ getattr(head, f"lang_{code}")[:-1] + getattr(head, f"lang_{code}")[-1]
            )
            for code in ("en", "de", "to")
        }
        assert predicted[utt] == max(scores, key=scores.get)
        same(found[utt], run("--lang", predicted[utt], kind="predicting", out="as")[utt])
    # with languages given they are used, and the prediction is there to be compared
    given = run("--utt2lang", files["utt2lang"], kind="predicting", out="given")
    assert {utt: entry["lang"] for utt, entry in given.items()} == LANGUAGES
    assert {utt: entry["lang_predicted"] for utt, entry in given.items()} == predicted
    unknown = run("--lang", "unk", kind="predicting", out="unknown")
    assert {entry["lang"] for entry in unknown.values()} == {"unk"}


def test_segments_of_long_audio_share_the_language(run, tmp_path):
    wav = make_audio(tmp_path / "wav", {"long": 4.0, "short": 0.8}, seed=2)
    table = tmp_path / "utt2lang"
    table.write_text("long de\nshort to\n")
    cut = ["--long_form", "silence", "--max_segment_seconds", "1.5", "--segment_overlap", "0.2"]
    found = run(*cut, "--utt2lang", table, wav=wav)
    for utt, code in (("long", "de"), ("short", "to")):
        same(found[utt], run(*cut, "--lang", code, wav=wav, out=code)[utt])
    # one prediction for all segments
    alone = run(*cut, wav=wav, kind="predicting", out="alone")
    batch = run(*cut, "--batch_size", "2", wav=wav, kind="predicting", out="batch")
    for utt, entry in alone.items():
        same(entry, batch[utt])
        again = run(*cut, "--lang", entry["lang"], wav=wav, kind="predicting", out="again")
        same(entry, again[utt])


def test_utterances_without_a_language(run, tmp_path, caplog):
    table = tmp_path / "utt2lang"
    table.write_text("utt-b en\nutt-a\nutt-c de\n")
    with caplog.at_level(logging.WARNING):
        found = run("--utt2lang", table)
    assert "2 of 4 utterances have no language" in caplog.text and "unknown" in caplog.text
    expected = {"utt-b": "en", "utt-a": "unk", "utt-c": "de", "utt-d": "unk"}
    assert {utt: entry["lang"] for utt, entry in found.items()} == expected
    run("--utt2lang", table, kind="predicting", out="predicting")
    assert "theirs is predicted" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--lang", "fr"],
            "4 of 4 utterances .*: 'fr' .4 utterances, e.g. utt-b.; it knows en, de, to",
        ),
        (["--utt2lang", "missing"], "--utt2lang missing: there is no such file"),
        (["--utt2lang", "{utt2lang}", "--lang", "en"], "give one of them"),
        (
            ["--utt2lang", "{tmp}/foreign"],
            "2 of 4 utterances .*'xx' .1 utterance, e.g. utt-c.*'yy' .1.*--unknown_language",
        ),
        (["--unknown_language", "predict"], "this model does not predict languages"),
        (["--utt2lang", "{tmp}/other"], "a language of none of the 4 utterances"),
    ],
)
def test_bad_languages(run, files, tmp_path, options, message):
    (tmp_path / "foreign").write_text("utt-a en\nutt-c xx\nutt-d yy\n")
    (tmp_path / "other").write_text("else en\n")
    with pytest.raises(UserError, match=message):
        run(*(option.format(utt2lang=files["utt2lang"], tmp=tmp_path) for option in options))


def test_languages_that_the_model_does_not_know(run, files, tmp_path, caplog):
    table = tmp_path / "foreign"
    table.write_text("utt-b en\nutt-a xx\nutt-c xx\nutt-d yy\n")
    unknown = run("--utt2lang", table, "--unknown_language", "unk")
    assert "3 of 4 utterances have languages that" in caplog.text
    assert "'xx' (2 utterances, e.g. utt-a), 'yy' (1 utterance, e.g. utt-d)" in caplog.text
    expected = {"utt-b": "en", "utt-a": "unk", "utt-c": "unk", "utt-d": "unk"}
    assert {utt: entry["lang"] for utt, entry in unknown.items()} == expected
    options = ("--utt2lang", table, "--unknown_language", "predict")
    predicted = run(*options, kind="predicting", out="predicted")
    assert predicted["utt-b"]["lang"] == "en"
    for utt in ("utt-a", "utt-c", "utt-d"):
        assert predicted[utt]["lang"] == predicted[utt]["lang_predicted"] != "unk"
    score(evaluate_nll, files, tmp_path / "nll", *options, kind="predicting")


@pytest.mark.parametrize(
    "option", [("--lang", "en"), ("--utt2lang", "en"), ("--unknown_language", "unk")]
)
def test_models_without_languages_refuse_them(run, option):
    message = f"{option[0]}: this model has no soft prompts of languages"
    with pytest.raises(UserError, match=message):
        run(*option, kind="plain")


def test_tuning_uses_the_languages(run, files, tmp_path):
    found = {}
    for name, given in (("given", ("--utt2lang", str(files["utt2lang"]))), ("none", ())):
        tune_scales.main(
            [
                *files["languages"].asr_options(),
                *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
                *("--text", str(files["text"]), "--output_dir", str(tmp_path / name), *given),
                *("--ctc_weights", "0.3", "--label_bonuses", "0.5", "1.5", "--beam_size", "3"),
            ]
        )
        found[name] = json.loads((tmp_path / name / "scales.json").read_text())["points"]
        for number, point in enumerate(found[name]):
            search = ("--beam_size", "3", "--ctc_weight", "0.3", "--penalty", str(point["penalty"]))
            entries = run(*given, search=search, out=f"{name}{number}")
            errors = sum(_errors(TEXT[utt], entry["text"]) for utt, entry in entries.items())
            words = sum(len(line.split()) for line in TEXT.values())
            assert point["wer"] == pytest.approx(100 * errors / words)
    assert found["given"] != found["none"]


def _errors(reference, hypothesis):
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(reference.split(), hypothesis.split())


def score(module, files, directory, *options, kind="languages"):
    module.main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--data_path_and_name_and_type", f"{files['text']},text,text"),
            *("--output_dir", str(directory), "--num_workers", "0", *map(str, options)),
        ]
    )


def test_likelihoods_use_the_languages(files, tmp_path):
    nll = {}
    for name, options in {
        "given": ("--utt2lang", files["utt2lang"]),
        **{code: ("--lang", code) for code in ("en", "de", "to", "unk")},
        "nothing": (),
    }.items():
        score(evaluate_nll, files, tmp_path / name, *options)
        nll[name] = json.loads((tmp_path / name / "nll.json").read_text())["total_nll"]
        score(evaluate_audio_use, files, tmp_path / name, *options)
        table = (tmp_path / name / "utterances.tsv").read_text().splitlines()[1:]
        by_utterance = {line.split("\t")[0]: float(line.split("\t")[3]) for line in table}
        assert sum(by_utterance.values()) == pytest.approx(nll[name], abs=1e-2)
        nll[f"{name}, by utterance"] = by_utterance
    assert nll["nothing"] == pytest.approx(nll["unk"], abs=1e-4)
    assert len({round(nll[name], 4) for name in ("given", "en", "de", "to", "unk")}) == 5
    for utt, code in LANGUAGES.items():
        found = nll["given, by utterance"][utt]
        assert found == pytest.approx(nll[f"{code}, by utterance"][utt], abs=1e-3)
    with pytest.raises(UserError, match="no soft prompts of languages"):
        score(evaluate_nll, files, tmp_path / "plain", "--lang", "en", kind="plain")
