"""Configurations of the CTC and CTC + AED baselines build what their comments say."""

import pytest
import torch
import yaml

from espnet_llm_plugin import registry
from espnet_llm_plugin.bin.asr_inference import get_parser
from espnet_llm_plugin.inference.options import parse_with_configs

PAPER = {
    "loquacious/train_ctc": 1.0,
    "loquacious/train_aed": 0.3,
    "ctc/train_aed_conformer": 0.3,
}


@pytest.fixture(scope="module")
def build(root, tmp_path_factory):
    """(options, ESPnet's model) of a configuration over V tokens."""
    registry.register()
    from espnet2.tasks.asr import ASRTask

    def make(name, tokens, device="cpu"):
        directory = tmp_path_factory.mktemp("conf")
        names = ["<blank>", "<unk>", *(f"t{n}" for n in range(tokens - 3)), "<sos/eos>"]
        (directory / "tokens.txt").write_text("\n".join(names) + "\n")
        arguments = ["--config", str(root / f"conf/{name}.yaml"), "--output_dir", str(directory)]
        arguments += ["--token_list", str(directory / "tokens.txt")]
        args = ASRTask.get_parser().parse_args(arguments)
        with torch.device(device):
            return args, ASRTask.build_model(args)

    return make


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PAPER)
def test_paper_scale(build, root, name):
    """arXiv 2603.15045: 16 Conformer layers and 6 decoder layers of width 1,024, 60 ms frames."""
    args, model = build(name, 10000, "meta")
    assert len(model.encoder.encoders) == 16 and model.encoder.output_size() == 1024
    assert args.encoder_conf["input_layer"] == "conv2d6" and args.frontend_conf["hop_length"] == 160
    assert model.ctc_weight == PAPER[name] and model.ctc.ctc_lo.out_features == 10000
    if model.ctc_weight < 1.0:
        from espnet2.asr.decoder.transformer_decoder import TransformerDecoder

        assert type(model.decoder) is TransformerDecoder and len(model.decoder.decoders) == 6
        assert args.best_model_criterion == [["valid", "acc", "max"]]
    else:
        assert model.decoder is None
    text = (root / f"conf/{name}.yaml").read_text()
    millions, gigabytes = count(model) / 1e6, 16 * count(model) / 1e9
    assert f"{millions:.0f} M parameters" in text and f"{gigabytes:.1f} GB" in text


def test_loquacious_models_fit_each_other(build, root):
    _, ctc = build("loquacious/train_ctc", 10000, "meta")
    _, aed = build("loquacious/train_aed", 10000, "meta")
    shapes = {name: value.shape for name, value in ctc.state_dict().items()}
    theirs = {name: value.shape for name, value in aed.state_dict().items()}
    assert shapes.items() <= theirs.items()
    speech_llm, base = (
        yaml.safe_load((root / f"conf/{place}/train_qwen2_0.5b_spm10k.yaml").read_text())
        for place in ("loquacious", "speech_llm")
    )
    # passes over the data apart, the same experiment
    for conf in (speech_llm, base):
        conf.pop("max_epoch")
    assert speech_llm.pop("num_iters_per_epoch") == 9000
    assert speech_llm == base


@pytest.mark.parametrize("corpus", ["librispeech", "loquacious"])
def test_mini(build, corpus):
    args, model = build(f"{corpus}/mini/train_aed", 200)
    _, ctc = build(f"{corpus}/mini/train_ctc", 200)
    shapes = {name: value.shape for name, value in ctc.state_dict().items()}
    theirs = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes.items() <= theirs.items() and len(model.decoder.decoders) == 2
    speech, text = torch.randn(2, 16000), torch.randint(2, 199, (2, 4))
    lengths = torch.tensor([16000, 14000]), torch.tensor([4, 3])
    loss, stats, _ = model(speech, lengths[0], text, lengths[1])
    loss.backward()
    assert torch.isfinite(loss)
    expected = 0.3 * stats["loss_ctc"] + 0.7 * stats["loss_att"]
    assert torch.isclose(loss.squeeze(), expected)
    assert args.best_model_criterion == [["valid", "acc", "max"]]


@pytest.mark.parametrize(("name", "weight"), [("decode_aed", 0.0), ("decode_aed_joint", 0.3)])
def test_decoding_is_espnets(root, name, weight):
    options = ["--config", str(root / f"conf/librispeech/{name}.yaml"), "--output_dir", "x"]
    options += ["--data_path_and_name_and_type", "wav.scp,speech,sound"]
    args = parse_with_configs(get_parser(), options)
    assert (args.search, args.ctc_weight, args.beam_size) == ("espnet", weight, 12)
