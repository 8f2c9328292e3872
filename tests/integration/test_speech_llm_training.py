"""Speech LLMs through ESPnet's own commands: start from CTC, train, resume, average, decode."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from espnet_llm_plugin import registry
from espnet_llm_plugin.bin.make_token_list import main as make_token_list
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import backbone
from tests.speech_llm.tiny_llm import TOKENS, save_adapted, save_native

pytestmark = pytest.mark.integration

RATE = 16000
UTTERANCES = 8
COMMON = """
frontend_conf: {n_fft: 256, win_length: 256, hop_length: 128, n_mels: 20}
encoder: transformer
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 24, num_blocks: 1,
  input_layer: conv2d}
normalize: utterance_mvn
batch_type: sorted
batch_size: 4
optim: adam
optim_conf: {lr: 0.01}
best_model_criterion: [[valid, loss, min]]
keep_nbest_models: 2
num_workers: 0
num_att_plot: 0
use_matplotlib: false
log_interval: 1
"""
CTC = "model_conf: {ctc_weight: 1.0, report_cer: false, report_wer: false}\n"
SPEECH_LLM = """
model: speech_llm
model_conf: {ctc_weight: 0.3, text_mask: 0.2, lsm_weight: 0.1}
decoder: speech_llm
decoder_conf:
  tuning: lora
  lora_conf: {r: 2, alpha: 4}
  adapter: frame_stacking
  adapter_conf: {stack: 2}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise with transcripts of the letters that the tiny LLMs know."""
    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    wavs, texts, shapes = [], [], []
    for i in range(UTTERANCES):
        samples = int(generator.uniform(0.5, 0.9) * RATE)
        path = directory / f"utt{i:02d}.wav"
        soundfile.write(path, generator.normal(size=samples) * 0.1, RATE)
        wavs.append(f"utt{i:02d} {path}\n")
        texts.append(f"utt{i:02d} {''.join(generator.choice(list('abcde'), size=4))}\n")
        shapes.append(f"utt{i:02d} {samples}\n")
    for name, lines in (("wav.scp", wavs), ("text", texts), ("shape", shapes)):
        (directory / name).write_text("".join(lines))
    (directory / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    save_adapted(directory / "llm")
    save_native(directory / "native")
    options = ["--token_type", "hugging_face", "--llm", str(directory / "native")]
    make_token_list([*options, "--output_dir", str(directory / "native_tokens")])
    return directory


def training(data, out, conf, *options, llm=None, native=False):
    """Arguments of espnet2.bin.asr_train."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.yaml").write_text(COMMON + conf)
    tokens = data / ("native_tokens/tokens.txt" if native else "tokens.txt")
    command = ["--config", str(out / "train.yaml"), "--output_dir", str(out), "--ngpu", "0"]
    command += ["--token_list", str(tokens), "--use_preprocessor", "true"]
    if native:
        command += ["--token_type", "hugging_face", "--bpemodel", str(data / "native")]
    else:
        command += ["--token_type", "char"]
    for part in ("train", "valid"):
        for name, kind in (("wav.scp,speech", "sound"), ("text,text", "text")):
            command += [f"--{part}_data_path_and_name_and_type", f"{data / name},{kind}"]
        command += [f"--{part}_shape_file", str(data / "shape")]
    if llm is not None:
        command += ["--decoder_conf", f"llm={llm}"]
    return [*command, *options]


def decoding(data, exp, out, *options):
    """Arguments of espnet2.bin.asr_inference."""
    return [
        *("--asr_train_config", str(exp / "config.yaml")),
        *("--asr_model_file", str(exp / "valid.loss.ave.pth")),
        *("--data_path_and_name_and_type", f"{data / 'wav.scp'},speech,sound"),
        *("--output_dir", str(out), "--ngpu", "0", "--num_workers", "0"),
        *("--beam_size", "3", "--minlenratio", "-2", "--maxlenratio", "-6", *options),
    ]


def hypotheses(out):
    """Token ids and scores by utterance."""
    ids, scores = (
        dict(line.split(maxsplit=1) for line in (out / "1best_recog" / name).open())
        for name in ("token_int", "score")
    )
    assert len(ids) == len(scores) == UTTERANCES
    return {name: (ids[name].split(), float(scores[name][7:-2])) for name in ids}


def state(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def task():
    registry.register()
    from espnet2.tasks.asr import ASRTask

    return ASRTask


@pytest.fixture
def loads(monkeypatch):
    loaded = []
    original = backbone.load_causal_lm

    def load(*args, **kwargs):
        loaded.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(backbone, "load_causal_lm", load)
    return loaded


def test_from_ctc_to_joint_decoding(data, task, tmp_path, caplog, loads):
    caplog.set_level("INFO")
    llm = data / "llm"
    task.main(cmd=training(data, tmp_path / "ctc", CTC, "--max_epoch", "1"))
    full = SPEECH_LLM.replace("tuning: lora\n  lora_conf: {r: 2, alpha: 4}", "tuning: full")
    for name, conf in (("stats_lora", SPEECH_LLM), ("stats_full", full)):
        stats = tmp_path / name
        task.main(cmd=training(data, stats, conf, "--collect_stats", "true", llm=llm))
        assert loads == [] and (stats / "train" / "feats_stats.npz").is_file()
    assert "tuning: full" in (stats / "config.yaml").read_text()

    # 1. Encoder and CTC layer from the CTC model
    ctc = tmp_path / "ctc" / "valid.loss.ave.pth"
    init = ("--init_param", f"{ctc}:encoder:encoder", f"{ctc}:ctc:ctc")
    exp = tmp_path / "exp"
    frozen = ("--freeze_param", "encoder", "ctc")
    task.main(cmd=training(data, exp, SPEECH_LLM, "--max_epoch", "1", *init, *frozen, llm=llm))
    start, first = state(ctc), state(exp / "1epoch.pth")
    for name in start:
        if name.startswith(("encoder.", "ctc.")):
            assert torch.equal(first[name], start[name]), name
    for name in ("loss_ce", "loss_ctc", "ce_per_token", "acc", "shuffled_gap", "num_skipped"):
        assert f"{name}=" in caplog.text
    assert "train" in caplog.text and caplog.text.count("shuffled_gap=") == 1  # of validation

    # 2. What a checkpoint holds: what is trained, and which LLM and prompt it was
    model, _ = task.build_model_from_file(str(exp / "config.yaml"), str(exp / "1epoch.pth"), "cpu")
    trained = {name for name, _ in model.decoder.named_parameters(prefix="decoder")}
    records = {name for name in first if name.endswith(("fingerprint", "digest"))}
    assert {name for name in first if name.startswith("decoder.")} == trained | records
    llm_size = sum(p.numel() for p in model.decoder.llm.model("cpu").parameters())
    lora = sum(v.numel() for k, v in first.items() if "lora" in k)
    assert 0 < lora < llm_size / 4

    # 3. Resumed with strict=True by ESPnet, and averaged
    more = training(data, exp, SPEECH_LLM, "--max_epoch", "2", "--resume", "true", *init, llm=llm)
    task.main(cmd=more)
    averaged = state(exp / "valid.loss.ave_2best.pth")
    assert set(averaged) == set(first)
    assert any(not torch.equal(averaged[k], first[k]) for k in first if "lora" in k)

    # 4. CTC, decoder and LM, separately and together
    from espnet2.bin import asr_inference

    lm = [f"--lm_train_config={llm}/espnet_lm.yaml", f"--lm_file={llm}/espnet_lm.pth"]
    found = {}
    for name, options in {
        "decoder": ["--ctc_weight", "0", "--lm_weight", "0"],
        "joint": ["--ctc_weight", "0.5", "--lm_weight", "0"],
        "all": ["--ctc_weight", "0.3", "--lm_weight", "0.5", *lm],
    }.items():
        asr_inference.main(decoding(data, exp, tmp_path / name, *options))
        found[name] = hypotheses(tmp_path / name)
    for name in found["decoder"]:
        scores = {results[name][1] for results in found.values()}
        assert len(scores) == 3 and all(np.isfinite(score) for score in scores)
        assert all(2 <= len(results[name][0]) <= 6 for results in found.values())

    # 5. Another LLM or prompt in its place is noticed
    other = save_adapted(tmp_path / "other", seed=5)
    text = (exp / "config.yaml").read_text()
    for broken, message in (
        (text.replace(str(llm), other), "not the one recorded"),
        (text.replace("decoder_conf:", "decoder_conf:\n    prompt: {after: cab}"), "other prompt"),
    ):
        (tmp_path / "config.yaml").write_text(broken)
        with pytest.raises(UserError, match=message):
            task.build_model_from_file(
                str(tmp_path / "config.yaml"), str(exp / "valid.loss.ave.pth"), "cpu"
            )


def run(*arguments):
    command = [sys.executable, "-m", "espnet_llm_plugin", "-m", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def test_native_tokens_by_the_command_lines(data, tmp_path):
    exp, llm = tmp_path / "exp", data / "native"
    conf = SPEECH_LLM + "  prompt: long\n"
    command = training(data, exp, conf, "--max_epoch", "1", llm=llm, native=True)
    log = run("espnet2.bin.asr_train", *command)
    assert "shuffled_gap=" in log
    saved = state(exp / "valid.loss.ave.pth")
    tokens = (data / "native_tokens" / "tokens.txt").read_text().splitlines()
    assert saved["ctc.ctc_lo.weight"].shape[0] == len(tokens) + 1  # a blank beside them
    out = tmp_path / "decode"
    options = ("--ctc_weight", "0.3", "--lm_weight", "0")
    run("espnet2.bin.asr_inference", *decoding(data, exp, out, *options))
    spare = {str(i) for i in range(len(tokens) - 5, len(tokens))}
    for ids, score in hypotheses(out).values():
        assert not spare & set(ids) and np.isfinite(score)
    text = (out / "1best_recog" / "text").read_text().splitlines()
    assert len(text) == UTTERANCES
