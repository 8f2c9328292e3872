"""The scale of the text embeddings, read from the files, against the loaded model."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.backbone import load_causal_lm
from espnet_llm_plugin.llm.embedding_scale import text_embedding_scale
from tests.llm.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_loaded_model(tmp_path, family, tied):
    tiny_model(family, tied=tied).save_pretrained(tmp_path)
    table = load_causal_lm(tmp_path).get_input_embeddings()
    for rows in (37, 20):
        expected = float(table(torch.arange(rows)).square().mean().sqrt())
        assert text_embedding_scale(tmp_path, rows) == pytest.approx(expected, rel=1e-5)


def test_in_parts_and_in_torch_files(tmp_path):
    model = tiny_model("llama")
    expected = float(model.get_input_embeddings().weight.square().mean().sqrt())
    model.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    model.config.save_pretrained(tmp_path / "torch")
    torch.save(model.state_dict(), tmp_path / "torch" / "pytorch_model.bin")
    for name in ("parts", "torch"):
        assert text_embedding_scale(tmp_path / name, 37) == pytest.approx(expected, rel=1e-5)


def test_weights_of_another_architecture(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save({"wte.weight": torch.ones(37, 16)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="have 0 tensors called model.embed_tokens.weight"):
        text_embedding_scale(tmp_path, 37)
