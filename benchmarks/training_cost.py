#!/usr/bin/env python3
"""Least memory and time of training a configuration: where the numbers in conf/ are from.

Estimates, no measurements: the weights with AdamW's state; the tensors that autograd keeps of one
utterance until the backward pass, counted on the CPU under bfloat16 autocast (a GPU's kernels may
keep others), for utterances of --seconds; and 6 operations a parameter and encoder frame at
--tflops. Neither a frozen LLM nor the search of MWER training is in them.

    python benchmarks/training_cost.py conf/transducer/train_*.yaml
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any, Iterable, Optional

import torch
import yaml

from espnet_llm_plugin import registry
from espnet_llm_plugin.errors import run_cli
from espnet_llm_plugin.scoring.table import markdown

RATE = 16000
HOURS = 960.0  # of LibriSpeech
PIECES = 5000
PIECES_A_SECOND = 3.8  # 9.4 million words in 960 hours, at an assumed 1.4 pieces a word
BYTES = 16  # of a parameter: fp32 weight, gradient and AdamW's two moments


def gigabytes(parameters: int) -> float:
    """Of the weights, their gradients and AdamW's moments."""
    return BYTES * parameters / 1e9


def gpu_hours(
    parameters: int, frame_s: float, epochs: int, hours: float = HOURS, tflops: float = 100.0
) -> float:
    """Least hours: forward and backward are 6 operations a parameter and frame of the encoder."""
    frames = 3600 * hours / frame_s
    return 6 * parameters * frames * epochs / (tflops * 1e12) / 3600


def build(conf: dict[str, Any]) -> torch.nn.Module:
    """The model of a configuration, over made pieces, its loss that of the transducer alone."""
    registry.register()
    from espnet2.tasks.asr import ASRTask

    conf = copy.deepcopy(conf)
    for name in ("mwer_weight", "mwer_conf"):
        conf["model_conf"].pop(name, None)
    for name in ("dynamic_chunk_sizes", "full_context_probability"):  # chunk_size instead
        conf["encoder_conf"].pop(name, None)
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens.txt"
        pieces = [f"t{number}" for number in range(PIECES - 3)]
        tokens.write_text("\n".join(["<blank>", "<unk>", *pieces, "<sos/eos>"]) + "\n")
        (Path(directory) / "train.yaml").write_text(yaml.safe_dump(conf))
        options = ["--config", f"{directory}/train.yaml"]
        options += [
            "--token_list",
            str(tokens),
            "--output_dir",
            directory,
            "--normalize",
            "utterance_mvn",
        ]
        return ASRTask.build_model(ASRTask.get_parser().parse_args(options))


def kept_bytes(model: torch.nn.Module, seconds: float) -> int:
    """Bytes that autograd keeps of one more utterance: without casts of the weights."""
    return _kept(model, seconds, 2) - _kept(model, seconds, 1)


def _kept(model: torch.nn.Module, seconds: float, utterances: int) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())  # alive: its place is not reused
        return tensor

    batch = utterance(seconds, utterances)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**batch)[0]
    assert loss.requires_grad
    return sum(size for _, size in kept.values())


def utterance(seconds: float, utterances: int = 1) -> dict[str, torch.Tensor]:
    """A batch of noise."""
    labels = torch.randint(2, PIECES - 1, (utterances, round(PIECES_A_SECOND * seconds)))
    speech = torch.randn(utterances, int(RATE * seconds))
    return dict(
        speech=speech,
        speech_lengths=torch.full((utterances,), speech.size(1)),
        text=labels,
        text_lengths=torch.full((utterances,), labels.size(1)),
    )


def frame_seconds(model: torch.nn.Module, seconds: float) -> float:
    """Duration of an encoder frame, to a millisecond."""
    batch = utterance(seconds)
    with torch.no_grad():
        frames = model.eval().encode(batch["speech"], batch["speech_lengths"])[1]
    return round(seconds / int(frames[0]), 3)


def rows(configs: Iterable[Path], args: argparse.Namespace) -> Iterable[list[str]]:
    for config in configs:
        conf: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
        if conf["decoder_conf"].get("predictor") == "llm":
            # frozen: nothing of it is kept; a predictor without a weight of its own stands in
            conf["decoder_conf"] |= {"predictor": "stateless", "predictor_conf": {"embed_dim": 1}}
        model = build(conf)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frame_s = frame_seconds(model, args.seconds)
        kept = kept_bytes(model, args.seconds) / args.seconds
        batch_s = conf["batch_bins"] / RATE
        yield [
            config.stem,
            f"{parameters / 1e6:.0f} M",
            f"{gigabytes(parameters):.1f}",
            f"{kept / 1e6:.0f}",
            f"{batch_s:.0f}",
            f"{kept * batch_s / 1e9:.0f}",
            f"{1000 * frame_s:.0f}",
            str(conf["max_epoch"]),
            f"{gpu_hours(parameters, frame_s, conf['max_epoch'], args.hours, args.tflops):.1f}",
        ]


def main(cmd: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=15.0, help="of an utterance")
    parser.add_argument("--hours", type=float, default=HOURS, help="of speech")
    parser.add_argument("--tflops", type=float, default=100.0, help="that a GPU reaches")
    args = parser.parse_args(cmd)
    torch.manual_seed(0)
    header = ["configuration", "parameters", "AdamW, GB", "kept, MB/s", "batch, s"]
    header += ["kept, GB", "frame, ms", "epochs", "GPU hours"]
    print(markdown(header, list(rows(args.configs, args))))


if __name__ == "__main__":
    run_cli(main)
