"""The command that estimates priors, on tiny models."""

import pytest
import torch

from espnet_llm_plugin.bin.estimate_prior import main
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.prior import load_prior
from espnet_llm_plugin.inference.loading import load_model
from espnet_llm_plugin.inference.recognizer import encode
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, read_scp

SECONDS = {"utt-a": 0.5, "utt-b": 0.7, "utt-c": 0.4, "utt-d": 0.02}  # the last is too short


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {kind: make_asr(directory / kind, kind) for kind in ("ctc", "attention", "transducer")}
    made["wav"] = make_audio(directory / "wav", SECONDS)
    made["text"] = directory / "text"
    made["text"].write_text("utt-a ab c\nutt-b d a\n")
    return made


def estimate(files, kind, output, *options):
    main(
        [
            *files[kind].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--num_workers", "0", "--output", str(output), *options),
        ]
    )
    return load_prior(output, TOKENS)


@pytest.mark.parametrize("kind", ["ctc", "attention"])
@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_posteriors(files, kind, batch_size, tmp_path):
    import soundfile

    model, _ = load_model(files[kind].config, files[kind].model)
    rows = []
    for utt, path in read_scp(files["wav"]).items():
        if utt != "utt-d":
            encoder_out, _ = encode(model, [soundfile.read(path, dtype="float32")[0]])
            with torch.no_grad():
                rows.append(model.ctc.softmax(encoder_out.clone())[0])
    mean = torch.cat(rows).double().mean(0).float()
    frame = estimate(
        files, kind, tmp_path / "f.json", "--mode", "frame", "--batch_size", batch_size
    )
    torch.testing.assert_close(frame.log_prior.exp(), mean, rtol=1e-4, atol=1e-6)
    label = estimate(files, kind, tmp_path / "l.json", "--batch_size", batch_size)
    torch.testing.assert_close(
        label.log_prior[1:].exp(), mean[1:] / mean[1:].sum(), rtol=1e-4, atol=1e-6
    )


def test_counts(files, tmp_path):
    options = ("--estimate_from", "counts", "--text", str(files["text"]))
    prior = estimate(files, "transducer", tmp_path / "p.json", *options)
    counts = torch.tensor([0.0, 0, 2, 2, 1, 1, 1, 0])  # spaces, a, b, c, d
    expected = 0.9 * counts[1:] / 7 + 0.1 / 7
    torch.testing.assert_close(prior.log_prior[1:].exp(), expected, rtol=1e-4, atol=1e-6)


def test_bad_input(files, tmp_path):
    with pytest.raises(UserError, match="without CTC"):
        estimate(files, "transducer", tmp_path / "p.json")
    options = ("--estimate_from", "counts", "--text", str(files["text"]), "--mode", "frame")
    with pytest.raises(UserError, match="know no frames"):
        estimate(files, "ctc", tmp_path / "p.json", *options)
    with pytest.raises(UserError, match="wav.scp,speech,sound"):
        main([*files["ctc"].asr_options(), "--output", str(tmp_path / "p.json")])
    assert not (tmp_path / "p.json").exists()
