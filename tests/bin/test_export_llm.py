"""A trained causal_llm as a Hugging Face directory: equal logits, clear refusals."""

import shutil

import pytest
import torch
import yaml

from espnet_llm_plugin.bin import export_llm
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from espnet_llm_plugin.llm.directory import check_llm_tokens
from tests.llm.tiny import TEXT, char_tokens, save_adapted_dir, train_sentencepiece

SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}


def write_lm(directory, tokens, lm_conf, **extra):
    """What lm_train leaves: config.yaml and a checkpoint; returns the LM too."""
    directory.mkdir()
    lm = CausalLLM(len(tokens), **lm_conf)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    conf = {
        "token_list": tokens,
        "lm": "causal_llm",
        "lm_conf": lm_conf,
        "model": "lm",
        "model_conf": {},
        "init": None,
        "bpemodel": None,
        **extra,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(conf, allow_unicode=True))
    state = {f"lm.{name}": value for name, value in lm.state_dict().items()}
    torch.save(state, directory / "lm.pth")
    return lm.eval()


def run(directory, output_dir, config="config.yaml", checkpoint="lm.pth"):
    return export_llm.main(
        [
            f"--lm_train_config={directory / config}",
            f"--lm_file={directory / checkpoint}",
            f"--output_dir={output_dir}",
        ]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lm") / "exp"
    write_lm(directory, char_tokens(), {"config": SMALL})
    return directory


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "exp")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_from_scratch(tied, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    tokens = char_tokens()
    conf = {"config": {**SMALL, "tie_word_embeddings": tied}}
    lm = write_lm(tmp_path / "exp", tokens, conf)
    assert run(tmp_path / "exp", tmp_path / "llm") == 0
    assert "12 tokens; no tokenizer: the token list has no sentencepiece" in capsys.readouterr().out
    check_llm_tokens(tmp_path / "llm", tokens)
    ids = [11, 4, 5, 6]
    expected = logits(lm.llm, ids)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert torch.equal(logits(loaded, ids), expected)
    frozen = CausalLLM(12, llm=str(tmp_path / "llm"), frozen=True)
    assert torch.equal(frozen(torch.tensor([ids]))[0][0][:, 1:], expected[:, 1:])


def test_round_trip_of_a_fine_tuned_llm(tmp_path):
    adapted = save_adapted_dir(tmp_path / "adapted", char_tokens())
    lm = write_lm(tmp_path / "exp", char_tokens(), {"llm": str(adapted)})
    run(tmp_path / "exp", tmp_path / "llm")
    before = CausalLLM(12, llm=str(adapted), frozen=True).model()
    after = CausalLLM(12, llm=str(tmp_path / "llm"), frozen=True).model()
    ids = [11, 4, 5, 6]
    assert torch.equal(logits(after, ids), logits(lm.llm, ids))
    assert not torch.allclose(logits(after, ids), logits(before, ids))


def test_sentencepiece_model_and_tokenizer_go_with_it(tmp_path):
    from transformers import AutoTokenizer

    model, tokens = train_sentencepiece(tmp_path / "sp", TEXT, 40)
    names = tokens.read_text(encoding="utf-8").split("\n")[:-1]
    write_lm(tmp_path / "exp", names, {"config": SMALL}, bpemodel=str(model))
    run(tmp_path / "exp", tmp_path / "llm")
    assert (tmp_path / "llm" / "bpe.model").read_bytes() == model.read_bytes()
    ids = AutoTokenizer.from_pretrained(tmp_path / "llm")(TEXT[0])["input_ids"]
    assert "".join(names[i] for i in ids) == "▁" + TEXT[0].replace(" ", "▁")


class TestErrors:
    def fails(self, directory, tmp_path, message, **files):
        with pytest.raises(UserError, match=message):
            run(directory, tmp_path / "llm", **files)
        assert not (tmp_path / "llm").exists()

    def edit(self, directory, **changes):
        conf = yaml.safe_load((directory / "config.yaml").read_text())
        conf.update(changes)
        (directory / "config.yaml").write_text(yaml.safe_dump(conf))

    def test_no_config(self, trained, tmp_path):
        self.fails(trained, tmp_path, "training config .*no.yaml does not", config="no.yaml")

    def test_no_checkpoint(self, trained, tmp_path):
        self.fails(trained, tmp_path, "checkpoint .*no.pth does not exist", checkpoint="no.pth")

    def test_not_a_config(self, copy, tmp_path):
        (copy / "config.yaml").write_text("a: [")
        self.fails(copy, tmp_path, "not the config.yaml of an lm_train run")
        (copy / "config.yaml").write_text("encoder: conformer")
        self.fails(copy, tmp_path, "not the config.yaml of an lm_train run .'lm'")

    def test_other_kind_of_lm(self, copy, tmp_path):
        self.edit(copy, lm="transformer")
        self.fails(copy, tmp_path, "of a transformer LM; only causal_llm")

    def test_frozen(self, copy, tmp_path):
        self.edit(copy, lm_conf={"llm": "dir", "frozen": True})
        self.fails(copy, tmp_path, "nothing was trained: its directory dir")

    def test_bpemodel_gone(self, copy, tmp_path):
        self.edit(copy, bpemodel="data/gone.model")
        self.fails(copy, tmp_path, "data/gone.model, which does not exist")

    def test_damaged_checkpoint(self, copy, tmp_path):
        (copy / "lm.pth").write_bytes(b"half")
        self.fails(copy, tmp_path, "lm.pth cannot be loaded as a checkpoint")

    def test_missing_tensor(self, copy, tmp_path):
        state = torch.load(copy / "lm.pth")
        name = "lm.llm.model.layers.1.mlp.up_proj.weight"
        del state[name]
        torch.save(state, copy / "lm.pth")
        self.fails(copy, tmp_path, f"lacks 1 of the 20 trained tensors of the LM, e.g. {name}")

    def test_output_exists(self, trained, tmp_path):
        (tmp_path / "llm").mkdir()
        (tmp_path / "llm" / "x").touch()
        with pytest.raises(UserError, match="exists and is not empty"):
            run(trained, tmp_path / "llm")


# --- the LLM of a speech LLM ---


def speech_llm(tmp_path, decoder_conf):
    from tests.inference.tiny_asr import TOKENS, make_speech_llm

    source = save_adapted_dir(tmp_path / "llm", TOKENS)
    return source, make_speech_llm(tmp_path / "asr", source, decoder_conf=decoder_conf)


def run_asr(files, output_dir):
    return export_llm.main([*files.asr_options(), f"--output_dir={output_dir}"])


@pytest.mark.parametrize("interface", ["prefix", "merged", "cross_attention"])
def test_lora_of_a_speech_llm_is_merged(tmp_path, capsys, interface):
    from espnet2.tasks.asr import ASRTask

    from espnet_llm_plugin.llm.backbone import load_causal_lm

    conf = f", tuning: lora, lora_conf: {{r: 2, dropout: 0.1}}, interface: {interface}"
    source, files = speech_llm(tmp_path, conf)
    assert run_asr(files, tmp_path / "out") == 0
    assert "logits differ from those of training by" in capsys.readouterr().out
    model, _ = ASRTask.build_model_from_file(files.config, files.model, "cpu")
    ids = [7, 3, 4, 5, 3]
    found = logits(load_causal_lm(tmp_path / "out"), ids)
    expected = logits(model.decoder.llm.eval().model("cpu"), ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, logits(load_causal_lm(source), ids), atol=1e-2)


def test_speech_models_without_a_trained_llm(tmp_path):
    from tests.inference.tiny_asr import make_asr

    source, files = speech_llm(tmp_path, "")
    with pytest.raises(UserError, match=f"frozen LLM, nothing of it was trained.*{source}"):
        run_asr(files, tmp_path / "out")
    files = make_asr(tmp_path / "ctc", "ctc")
    with pytest.raises(UserError, match="has no LLM of its own"):
        run_asr(files, tmp_path / "out")
    files.model.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded as a checkpoint of"):
        run_asr(files, tmp_path / "out")
    files.model.unlink()
    with pytest.raises(UserError, match="valid.loss.ave.pth does not exist"):
        run_asr(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--lm_file=a"],
        ["--lm_train_config=a", "--lm_file=b", "--asr_model_file=c"],
        ["--asr_train_config=a"],
    ],
)
def test_one_of_lm_and_asr(options):
    with pytest.raises(UserError, match="either --lm_train_config and --lm_file, or"):
        export_llm.main([*options, "--output_dir=out"])
