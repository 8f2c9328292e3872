"""The LLM of a trained speech LLM as a Hugging Face directory."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import export_tuned
from espnet_llm_plugin.llm.backbone import load_causal_lm
from espnet_llm_plugin.llm.directory import check_llm_tokens
from espnet_llm_plugin.llm.export_tuned import write_tuned_llm
from espnet_llm_plugin.llm.tuning import TunedLLM
from tests.llm.test_tuning import IDS, logits, moved
from tests.llm.tiny import char_tokens, save_adapted_dir, save_llm_dir

SMALL_IDS = IDS.clamp(max=9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "conf",
    [
        {"tuning": "lora", "lora_conf": {"targets": "all-linear"}},
        {"tuning": "lora", "train_embeddings": True},
        {"tuning": "full"},
    ],
    ids=["lora", "embeddings", "full"],
)
def test_adapted_llm(tmp_path, family, tied, conf):
    source = save_adapted_dir(tmp_path / "llm", char_tokens(), family, tied=tied)
    llm = moved(TunedLLM(str(source), **conf)).eval()
    expected = logits(llm, SMALL_IDS)
    report = write_tuned_llm(llm, tmp_path / "out")
    found = load_causal_lm(tmp_path / "out")
    torch.testing.assert_close(found(input_ids=SMALL_IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert "logits differ from those of training by" in report
    check_llm_tokens(tmp_path / "out", char_tokens())
    assert found.config.tie_word_embeddings is tied
    assert not list((tmp_path / "out").glob("adapter*"))
    assert torch.equal(logits(llm, SMALL_IDS), expected)
    # an LLM like any other: it can be tuned again
    again = TunedLLM(str(tmp_path / "out"), tuning="lora")
    torch.testing.assert_close(logits(again.eval(), SMALL_IDS), expected, atol=1e-4, rtol=1e-4)


def test_llm_with_its_own_tokens_keeps_its_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    source = save_llm_dir(tmp_path / "llm")
    llm = moved(TunedLLM(str(source))).eval()
    assert "tokenizer: that of" in write_tuned_llm(llm, tmp_path / "out")
    found = load_causal_lm(tmp_path / "out")
    torch.testing.assert_close(found(input_ids=IDS).logits, logits(llm), atol=1e-4, rtol=1e-4)
    text = "the cat sat on the mat"
    ids = [AutoTokenizer.from_pretrained(d)(text).input_ids for d in (source, tmp_path / "out")]
    assert ids[0] == ids[1] and len(ids[0]) > 3


def test_half_precision_stays_half_precision(tmp_path):
    source = save_adapted_dir(tmp_path / "llm", char_tokens())
    llm = moved(TunedLLM(str(source), dtype="bfloat16"), 0.05).eval()
    write_tuned_llm(llm, tmp_path / "out")
    found = load_causal_lm(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    expected = logits(llm, SMALL_IDS).float()
    difference = (found(input_ids=SMALL_IDS).logits.float() - expected).abs().max()
    assert difference < 0.05 * expected.abs().max()


def test_a_merge_that_changes_the_llm_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def wrong(model):
        export_tuned_merge(model)
        model.model.layers[0].mlp.up_proj.weight += 0.1

    export_tuned_merge = export_tuned.merge_lora
    monkeypatch.setattr(export_tuned, "merge_lora", wrong)
    source = save_adapted_dir(tmp_path / "llm", char_tokens())
    with pytest.raises(UserError, match="is not the one that was trained: logits differ by"):
        write_tuned_llm(TunedLLM(str(source)).eval(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
