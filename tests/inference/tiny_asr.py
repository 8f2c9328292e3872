"""Tiny untrained ESPnet models on disk, with tokens, audio and LMs, for the command lines."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

from espnet_llm_plugin import registry

TOKENS = ["<blank>", "<unk>", "<space>", "a", "b", "c", "d", "<sos/eos>"]
RATE = 16000
KINDS = ("ctc", "transducer", "factorized")

_ENCODER = """
encoder: transformer
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 16, num_blocks: 1,
  dropout_rate: 0.0, input_layer: conv2d}
frontend_conf: {n_mels: 40, fs: 16k}
normalize: utterance_mvn
token_type: char
"""
_MODELS = {
    "ctc": "model: espnet\nmodel_conf: {ctc_weight: 1.0}\n",
    "attention": """
model: espnet
model_conf: {ctc_weight: 0.3}
decoder: transformer
decoder_conf: {attention_heads: 2, linear_units: 16, num_blocks: 1}
""",
    "transducer": """
model: transducer
decoder: transducer
decoder_conf: {hidden_size: 12, rnn_type: lstm}
joint_net_conf: {joint_space_size: 12}
""",
    "factorized": """
model: factorized_transducer
decoder: factorized_transducer
decoder_conf: {predictor: stateless, predictor_conf: {embed_dim: 12}, joint_dim: 12,
  blank_embed_dim: 6, alpha: 0.7, beta: 0.1, label_bonus: 0.3}
""",
}
_LMS = {
    "seq_rnn": "lm: seq_rnn\nlm_conf: {unit: 12, nlayers: 1}\n",
    "transformer": "lm: transformer\n"
    "lm_conf: {embed_unit: 12, att_unit: 12, head: 2, unit: 12, layer: 2}\n",
}


@dataclass(frozen=True)
class Files:
    """``config.yaml`` and checkpoint."""

    config: Path
    model: Path

    def asr_options(self) -> list[str]:
        return ["--asr_train_config", str(self.config), "--asr_model_file", str(self.model)]

    def lm_options(self) -> list[str]:
        return ["--lm_train_config", str(self.config), "--lm_file", str(self.model)]


def make_asr(directory: Path, kind: str, seed: int = 0, encoder: str = _ENCODER) -> Files:
    """A model of ``KINDS`` (or ``attention``) with random weights; ``encoder``: YAML."""
    registry.register()
    from espnet2.tasks.asr import ASRTask

    torch.manual_seed(seed)
    return _make(ASRTask, directory, encoder + _MODELS[kind])


def make_speech_llm(
    directory: Path,
    llm: Path,
    tokens: list[str] = TOKENS,
    ctc_weight: float = 0.3,
    token_type: str = "char",
    decoder_conf: str = "",
    model_conf: str = "",
) -> Files:
    """A speech LLM with random weights; ``*_conf``: more YAML, ``, key: value``."""
    registry.register()
    from espnet2.tasks.asr import ASRTask

    torch.manual_seed(0)
    conf = f"""
model: speech_llm
model_conf: {{ctc_weight: {ctc_weight}{model_conf}}}
decoder: speech_llm
decoder_conf: {{llm: {llm}, tuning: frozen, adapter_conf: {{stack: 2}}{decoder_conf}}}
"""
    encoder = _ENCODER.replace("token_type: char", f"token_type: {token_type}")
    return _make(ASRTask, directory, encoder + conf, tokens)


def make_lm(directory: Path, kind: str, tokens: list[str] = TOKENS, seed: int = 0) -> Files:
    """``seq_rnn`` or ``transformer``."""
    registry.register()
    from espnet2.tasks.lm import LMTask

    torch.manual_seed(seed)
    return _make(LMTask, directory, _LMS[kind] + "token_type: char\n", tokens)


def _make(task, directory: Path, conf: str, tokens: list[str] = TOKENS) -> Files:
    directory.mkdir(parents=True)
    (directory / "tokens.txt").write_text("\n".join(tokens) + "\n")
    (directory / "train.yaml").write_text(conf)
    options = ["--config", str(directory / "train.yaml"), "--output_dir", str(directory)]
    args = task.get_parser().parse_args([*options, "--token_list", str(directory / "tokens.txt")])
    model = task.build_model(args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Scores far from uniform, few blanks: hypotheses differ and are not empty.
            if parameter.dim() > 1 and not name.startswith("encoder.embed"):
                parameter.normal_(std=2.0 if "_lo." in name or "output" in name else 0.5)
            if name.endswith(("ctc_lo.bias", "acoustic_output.bias", "lin_out.bias")):
                parameter[0] = 1.0
                parameter[-1] = -30.0  # <sos/eos>, as if trained
    files = Files(directory / "config.yaml", directory / "valid.loss.ave.pth")
    with files.config.open("w") as stream:
        yaml.safe_dump({k: v for k, v in vars(args).items() if k != "config"}, stream)
    torch.save(model.state_dict(), files.model)
    return files


def make_audio(directory: Path, seconds: dict[str, float], seed: int = 0) -> Path:
    """Noise with slowly changing colour; returns ``wav.scp``."""
    generator = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for utt, length in seconds.items():
        time = np.arange(int(length * RATE)) / RATE
        tone = np.sin(2 * np.pi * generator.uniform(200, 3000, 5)[:, None] * time)
        gate = np.sin(2 * np.pi * generator.uniform(2, 6, 5)[:, None] * time).clip(0)
        samples = 0.1 * (tone * gate).sum(0) + 0.01 * generator.normal(size=len(time))
        soundfile.write(directory / f"{utt}.wav", samples, RATE)
        lines.append(f"{utt} {directory / utt}.wav\n")
    (directory / "wav.scp").write_text("".join(lines))
    return directory / "wav.scp"


def read_scp(path: Path) -> dict[str, str]:
    """Key and rest of every line."""
    pairs = (line.partition(" ")[::2] for line in path.read_text().splitlines())
    return {key: value for key, value in pairs}
