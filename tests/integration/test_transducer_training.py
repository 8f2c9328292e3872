"""Training, averaging, resuming and decoding through ESPnet's unmodified commands."""

import logging

import numpy as np
import pytest
import soundfile
import torch

from espnet_llm_plugin import registry
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import backbone
from tests.transducer.tiny import save_llm

pytestmark = pytest.mark.integration

TOKENS = ["<blank>", "<unk>", "<space>", "a", "b", "c", "<sos/eos>"]
RATE = 16000
ENCODER = """
frontend_conf: {n_fft: 256, win_length: 256, hop_length: 128, n_mels: 20}
encoder: transformer
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 24, num_blocks: 1,
  input_layer: conv2d}
normalize: utterance_mvn
token_type: char
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
RNNT = """
model: transducer
model_conf: {ctc_weight: 0.3, acoustic_residual: true}
decoder: transducer
decoder_conf: {hidden_size: 12}
joint_net_conf: {joint_space_size: 12}
"""
FACTORIZED = """
model: factorized_transducer
model_conf: {ctc_weight: 0.3}
decoder: factorized_transducer
decoder_conf: {predictor: stateless, predictor_conf: {embed_dim: 8}, joint_dim: 8,
  blank_embed_dim: 4}
"""
LLM = """
model: factorized_transducer
decoder: factorized_transducer
decoder_conf: {predictor: llm, joint_dim: 8, blank_embed_dim: 4}
"""
CTC = "model_conf: {ctc_weight: 1.0, report_cer: false, report_wer: false}\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve utterances of noise, one of which is far too short for its transcript."""
    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    wavs, texts = [], []
    for i in range(12):
        seconds = 0.2 if i == 3 else generator.uniform(0.5, 0.9)
        path = directory / f"utt{i:02d}.wav"
        soundfile.write(path, generator.normal(size=int(seconds * RATE)) * 0.1, RATE)
        words = "".join(generator.choice(list("abc "), size=40 if i == 3 else 5)).strip() or "a"
        wavs.append(f"utt{i:02d} {path}\n")
        texts.append(f"utt{i:02d} {words}\n")
    (directory / "wav.scp").write_text("".join(wavs))
    (directory / "text").write_text("".join(texts))
    (directory / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    (directory / "llm").mkdir()
    save_llm(directory / "llm", tokens=TOKENS)
    return directory


@pytest.fixture(scope="module")
def task():
    registry.register()
    from espnet2.tasks.asr import ASRTask

    return ASRTask


@pytest.fixture
def train(data, task):
    def run(out, conf, *options):
        out.mkdir(exist_ok=True)
        (out / "train.yaml").write_text(ENCODER + conf)
        command = ["--config", str(out / "train.yaml"), "--output_dir", str(out)]
        command += ["--token_list", str(data / "tokens.txt"), "--ngpu", "0"]
        for part in ("train", "valid"):
            for name, kind in (("wav.scp,speech", "sound"), ("text,text", "text")):
                triple = f"{data / name},{kind}"
                command += [f"--{part}_data_path_and_name_and_type", triple]
            shape = out.parent / "stats" / part / "speech_shape"
            command += [f"--{part}_shape_file", str(shape)]
        task.main(cmd=[*command, *options])
        return out

    (data / "run" / "stats").mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid"):
        (data / "run" / "stats" / part).mkdir(exist_ok=True)
        lengths = [line.split() for line in (data / "wav.scp").read_text().splitlines()]
        (data / "run" / "stats" / part / "speech_shape").write_text(
            "".join(f"{utt} {len(soundfile.read(path)[0])}\n" for utt, path in lengths)
        )
    return run


def decode(data, out, tmp_path, transducer_conf, beam_size=3):
    """espnet2.bin.asr_inference, as asr.sh calls it."""
    from espnet2.bin import asr_inference

    (tmp_path / "decode.yaml").write_text(
        f"beam_size: {beam_size}\ntransducer_conf: {transducer_conf}\n"
    )
    # ESPnet's default search may run on for long with untrained models
    asr_inference.main(
        [
            *("--config", str(tmp_path / "decode.yaml")),
            *("--asr_train_config", str(out / "config.yaml")),
            *("--asr_model_file", str(out / "valid.loss.ave.pth")),
            *("--data_path_and_name_and_type", f"{data / 'wav.scp'},speech,sound"),
            *("--output_dir", str(tmp_path / "decode")),
            *("--ngpu", "0", "--num_workers", "0"),
        ]
    )
    lines = (tmp_path / "decode" / "1best_recog" / "score").read_text().splitlines()
    assert len(lines) == 12
    return {line.split()[0]: line for line in lines}


def state(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("conf", [RNNT, FACTORIZED], ids=["rnnt", "factorized"])
def test_ctc_start_training_and_decoding(data, train, tmp_path, caplog, conf):
    caplog.set_level(logging.INFO)
    exp = data / "run"
    if not (exp / "ctc" / "valid.loss.ave.pth").exists():
        train(exp / "ctc", CTC, "--max_epoch", "1")
    name = "rnnt" if conf is RNNT else "weak"
    target = "joint_network" if conf is RNNT else "decoder"
    ctc = f"{exp}/ctc/valid.loss.ave.pth"
    init = [f"{ctc}:encoder:encoder", f"{ctc}:ctc.ctc_lo:{target}.acoustic_output"]
    out = train(exp / name, conf, "--max_epoch", "1", "--init_param", *init)
    assert "skipped utt03: " in caplog.text and caplog.text.count("skipped utt03: ") == 1
    assert "nll_per_label=" in caplog.text and "num_skipped=" in caplog.text
    first = state(out / "1epoch.pth")
    # resumed with strict=True by ESPnet, then averaged
    train(exp / name, conf, "--max_epoch", "2", "--resume", "true", "--init_param", *init)
    averaged = state(out / "valid.loss.ave_2best.pth")
    assert set(averaged) == set(first)
    assert not any(torch.equal(v, first[k]) for k, v in averaged.items() if k.endswith("lo.weight"))
    for number, search in enumerate(
        ("{search_type: tsd, max_sym_exp: 3}", "{search_type: maes, nstep: 2}")
    ):
        (tmp_path / str(number)).mkdir()
        decode(data, out, tmp_path / str(number), search)
    (tmp_path / "greedy").mkdir()
    decode(data, out, tmp_path / "greedy", "{}", beam_size=1)


@pytest.fixture
def loads(monkeypatch):
    loaded = []
    original = backbone.load_causal_lm

    def load(*args, **kwargs):
        loaded.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(backbone, "load_causal_lm", load)
    return loaded


def test_llm_swap_from_collect_stats_to_decoding(data, train, tmp_path, task, loads):
    exp = data / "run"
    llm = f"predictor_conf.llm={data / 'llm'}"
    weak = train(exp / "weak1", FACTORIZED, "--max_epoch", "1", "--model_conf", "ctc_weight=0.0")
    common = ("--decoder_conf", llm)
    train(exp / "stats_llm", LLM, "--collect_stats", "true", *common)
    assert loads == []  # collect_stats builds the model without the LLM
    init = ("--init_param", f"{weak}/valid.loss.ave.pth:::decoder.predictor")
    frozen = ("--freeze_param", "encoder")
    out = train(exp / "strong", LLM, "--max_epoch", "2", *common, *init, *frozen)
    assert len(loads) == 1
    before, after = state(weak / "valid.loss.ave.pth"), state(out / "valid.loss.ave_2best.pth")
    kept = {k for k in before if not k.startswith("decoder.predictor.")}
    assert set(after) == {*kept, "decoder.predictor.identity.fingerprint"}
    assert all(torch.equal(after[k], before[k]) for k in kept if k.startswith("encoder."))
    assert not torch.equal(
        after["decoder.acoustic_output.weight"], before["decoder.acoustic_output.weight"]
    )
    scores = decode(data, out, tmp_path, "{search_type: tsd, max_sym_exp: 3}")
    assert len(loads) == 2 and scores

    # another LLM in its place is noticed when the averaged checkpoint is loaded
    (tmp_path / "other").mkdir()
    other = save_llm(tmp_path / "other", tokens=TOKENS, seed=5)
    config = (out / "config.yaml").read_text().replace(str(data / "llm"), other)
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(UserError, match="not the one recorded"):
        task.build_model_from_file(
            str(tmp_path / "config.yaml"), str(out / "valid.loss.ave.pth"), "cpu"
        )
