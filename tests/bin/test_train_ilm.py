"""Training of a mini-LSTM for a tiny attention model, and its use on n-best lists."""

import logging
import math

import pytest
import torch

from espnet_llm_plugin.bin import rescore, train_ilm
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.mini_lstm import MiniLSTMILM
from espnet_llm_plugin.inference import train_ilm as body
from espnet_llm_plugin.inference.loading import load_model
from espnet_llm_plugin.inference.nbest_dirs import NBestEntry, read_nbest_dir, write_nbest_dir
from espnet_llm_plugin.llm.perplexity import asr_tokenizer
from tests.inference.tiny_asr import TOKENS, make_asr
from tests.llm.tiny import save_llm_dir

# Every sentence begins and ends alike, so that there is something to learn.
LINES = [f"utt-{n} ab {middle} cd" for n, middle in enumerate(["a", "dd", "bca", "c b", "ad"] * 8)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {
        "asr": make_asr(directory / "asr", "attention"),
        "other": make_asr(directory / "other", "attention", seed=1),
        "ctc": make_asr(directory / "ctc", "ctc"),
        "directory": directory,
    }
    for name, lines in (("text", LINES), ("valid", LINES[:5]), ("broken", ["utt-0"])):
        made[name] = directory / name
        made[name].write_text("\n".join(lines) + "\n")
    made["before"] = made["asr"].model.read_bytes()
    made["trained"] = directory / "mini_lstm.pth"
    train(files=made, output=made["trained"])
    return made


def train(*options, files, output, asr="asr", text="text", epochs=4):
    train_ilm.main(
        [
            *files[asr].asr_options(),
            *("--text", str(files[text]), "--valid_text", str(files["valid"])),
            *("--output", str(output), "--epochs", str(epochs)),
            *("--batch_size", "4", "--lr", "0.05", *options),
        ]
    )
    return torch.load(output, weights_only=True)


def load(files, asr="asr"):
    model, _ = load_model(files[asr].config, files[asr].model)
    return model


def test_perplexity_falls(files):
    before, *epochs = torch.load(files["trained"], weights_only=True)["training"]["perplexities"]
    assert min(epochs) < 0.6 * before
    encode = asr_tokenizer(TOKENS, "char", None)
    sentences = [encode(line.partition(" ")[2]) for line in LINES[:5]]
    model = load(files)
    trained, new = MiniLSTMILM.load(files["trained"], model), MiniLSTMILM.new(model)
    for ilm, expected in ((trained, min(epochs)), (new, before)):
        # sentence by sentence, token by token
        loss, number = 0.0, 0
        for sentence in sentences:
            state = ilm.init_state(None)
            for place, token in enumerate([*sentence, len(TOKENS) - 1]):
                prefix = torch.tensor([len(TOKENS) - 1, *sentence[:place]])
                row, state = ilm.score(prefix, state, None)
                loss, number = loss - float(row[token]), number + 1
        assert math.exp(loss / number) == pytest.approx(expected, rel=1e-4)


def test_the_asr_model_is_not_changed(files, monkeypatch, tmp_path):
    assert files["asr"].model.read_bytes() == files["before"]
    loaded = []
    monkeypatch.setattr(body, "load_model", lambda *of: loaded.append(load_model(*of)) or loaded[0])
    train(files=files, output=tmp_path / "out.pth", epochs=1)
    (model, _), weights = loaded[0], torch.load(files["asr"].model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_only_its_own_tensors_are_written(files):
    content = torch.load(files["trained"], weights_only=True)
    assert set(content) == {"mini_lstm", "decoder", "training"}
    assert {name.split(".")[0] for name in content["mini_lstm"]} == {"lstm", "output"}
    assert content["decoder"].shape == (len(TOKENS),)
    assert not files["trained"].with_name("mini_lstm.pth.state").exists()


def test_it_goes_on_where_it_was_killed(files, monkeypatch, tmp_path, caplog):
    output = tmp_path / "mini_lstm.pth"
    epoch = body.Trainer.train_epoch

    def killed(trainer):
        if trainer.epoch == 2:
            raise KeyboardInterrupt
        return epoch(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(body.Trainer, "train_epoch", killed)
        train(files=files, output=output)
    assert not output.exists()
    with caplog.at_level(logging.INFO):
        found = train(files=files, output=output)
    assert "going on after epoch 2 of 4" in caplog.text
    expected = torch.load(files["trained"], weights_only=True)
    assert found["training"] == expected["training"]
    for name, tensor in expected["mini_lstm"].items():
        torch.testing.assert_close(found["mini_lstm"][name], tensor)


def test_a_run_with_other_options_begins_anew(files, monkeypatch, tmp_path, caplog):
    output = tmp_path / "mini_lstm.pth"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            body.MiniLSTMILM, "save", lambda *of: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        train(files=files, output=output, epochs=1)
    assert len(train("--seed", "2", files=files, output=output, epochs=1)["training"]) == 3
    assert "other options or files: beginning anew" in caplog.text


def test_rescoring(files, tmp_path):
    words = {"ab a cd": -1.0, "dd d": -0.5}
    encode = asr_tokenizer(TOKENS, "char", None)
    write_nbest_dir(
        tmp_path / "lists",
        {
            "utt-0": [
                NBestEntry(text, score, tuple(ids), tuple(TOKENS[i] for i in ids))
                for text, score in words.items()
                for ids in [encode(text)]
            ]
        },
    )
    rescore.main(
        [
            *("--nbest_dir", str(tmp_path / "lists"), "--output_dir", str(tmp_path / "out")),
            *("--llm", str(save_llm_dir(tmp_path / "llm")), "--lm_weight", "0"),
            *("--ilm", "mini_lstm", "--ilm_file", str(files["trained"]), "--ilm_weight", "0.3"),
            *files["asr"].asr_options(),
        ]
    )
    ilm = MiniLSTMILM.load(files["trained"], load(files))
    for entry in read_nbest_dir(tmp_path / "out")["utt-0"]:
        loss, _ = body.sum_of_losses(ilm, [entry.token_ids])
        assert entry.score == pytest.approx(words[entry.text] + 0.3 * float(loss), abs=1e-4)
    with pytest.raises(UserError, match="it needs --ilm mini_lstm"):
        rescore.main(
            [
                *("--nbest_dir", str(tmp_path / "lists"), "--output_dir", str(tmp_path / "out2")),
                *("--llm", str(tmp_path / "llm"), "--ilm_file", str(files["trained"])),
            ]
        )


def test_another_model_is_refused(files):
    with pytest.raises(UserError, match="trained with another checkpoint or model"):
        MiniLSTMILM.load(files["trained"], load(files, "other"))
    with pytest.raises(UserError, match="is not a mini-LSTM as .*train_ilm"):
        MiniLSTMILM.load(files["text"], load(files))
    with pytest.raises(UserError, match="is not a mini-LSTM as .*train_ilm"):
        MiniLSTMILM.load(files["asr"].model, load(files))


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ([], {"asr": "ctc"}, "--ilm mini_lstm is for ESPnet models with an attention decoder"),
        ([], {"text": "broken"}, "has no sentences"),
        ([], {"epochs": 0}, "--epochs 0: at least 1"),
        (["--valid_text", "nowhere"], {}, "--valid_text nowhere: there is no such file"),
        (["--hidden_size", "0"], {}, "--hidden_size 0: at least 1"),
    ],
)
def test_mistakes(files, tmp_path, options, changed, message):
    with pytest.raises(UserError, match=message):
        train(*options, files=files, output=tmp_path / "out.pth", **changed)
