"""Stage 13 of a speech LLM: decodings of a tiny model are scored, measured and diagnosed."""

import json
import shutil

import pytest

from espnet_llm_plugin.bin import asr_inference, score
from tests.inference.tiny_asr import RATE, TOKENS, make_audio, make_speech_llm
from tests.integration.test_recipes import run
from tests.llm.tiny import save_adapted_dir

pytestmark = pytest.mark.integration

SECONDS = {"utt-a": 0.5, "utt-b": 0.9, "utt-c": 0.6}


def decoded(model, directory, wav, weight):
    """What stage 12 leaves of a set."""
    asr_inference.main(
        [
            *model.asr_options(),
            *("--data_path_and_name_and_type", f"{wav},speech,sound", "--num_workers", "0"),
            *("--output_dir", str(directory / "logdir/output.1"), "--ctc_weight", weight),
            *("--beam_size", "2", "--nbest", "2"),
        ]
    )
    for path in (directory / "logdir/output.1/1best_recog").iterdir():
        shutil.copy(path, directory)
    (directory / ".done").touch()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A trained speech LLM, decoded alone and jointly: (directory, options of asr_llm.sh)."""
    directory = tmp_path_factory.mktemp("recipe")
    llm = save_adapted_dir(directory / "llm", TOKENS, seed=3)
    exp, data = directory / "exp/asr_sl", directory / "dump/raw/dev"
    model = make_speech_llm(exp, llm)
    (exp / ".done").touch()
    data.mkdir(parents=True)
    wav = make_audio(directory / "wav", SECONDS)
    shutil.copy(wav, data / "wav.scp")
    lines = {
        "text": dict.fromkeys(SECONDS, "ab c"),
        "utt2spk": {utt: utt for utt in SECONDS},
        "utt2num_samples": {utt: int(RATE * seconds) for utt, seconds in SECONDS.items()},
    }
    for name, values in lines.items():
        (data / name).write_text("".join(f"{utt} {value}\n" for utt, value in values.items()))
    (directory / "tokens/char").mkdir(parents=True)
    (directory / "tokens/char/tokens.txt").write_text("\n".join(TOKENS) + "\n")
    decoded(model, exp / "decode_alone/dev", wav, "0")
    decoded(model, exp / "decode_joint/dev", wav, "0.4")
    options = ["--token_type", "char", "--token_listdir", "tokens", "--asr_exp", "exp/asr_sl"]
    options += ["--asr_config", model.config]
    options += ["--test_sets", "dev", "--nj", "1", "--stage", "13"]
    return directory, options


def stage(root, experiment, *more):
    directory, options = experiment
    script = root / "egs2/TEMPLATE/asr1/asr_llm.sh"
    result = run([script, *options, *more], directory)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_page_of_a_decoding(root, experiment):
    directory = experiment[0] / "exp/asr_sl"
    alone, joint = directory / "decode_alone/dev", directory / "decode_joint"
    options = ["--inference_tag", "decode_joint", "--alone_tag", "decode_alone"]

    def verdicts():
        found = json.loads((joint / "diagnosis.json").read_text())["findings"]
        return {finding["signature"]: finding["verdict"] for finding in found}

    printed = stage(root, experiment, *options)
    assert "exp/asr_sl/decode_alone/dev is not scored: the LLM alone is not compared" in printed
    before, measured = verdicts(), (joint / "audio_use/audio_use.json").stat().st_mtime_ns
    assert json.loads((joint / "audio_use/audio_use.json").read_text())["ctc"]["hypothesis_wer"] > 0
    assert before["LLM ignores the audio"] != "not measured"
    text = experiment[0] / "dump/raw/dev/text"
    score.main(["--ref", str(text), "--hyp", str(alone / "text"), "--output_dir", str(alone)])
    stage(root, experiment, *options)
    after, hides = verdicts(), "joint decoding hides the LLM's errors"
    assert before.pop(hides) == "not measured" != after.pop(hides)
    assert before == after
    # measured once
    assert (joint / "audio_use/audio_use.json").stat().st_mtime_ns == measured
    assert "LLM alone, exp/asr_sl/decode_alone/dev" in (joint / "diagnosis.md").read_text()
