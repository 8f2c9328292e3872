"""causal_llm through ESPnet's own lm_train and lm_calc_perplexity, then exported."""

import json
import math

import pytest
import torch
import yaml

from tests.llm.tiny import TEXT, save_llm_dir, train_sentencepiece

pytestmark = pytest.mark.integration

CONFIG = {
    "lm": "causal_llm",
    "max_epoch": 2,
    "batch_type": "sorted",
    "batch_size": 4,
    "optim": "adamw",
    "optim_conf": {"lr": 0.01},
    "best_model_criterion": [["valid", "loss", "min"]],
    "keep_nbest_models": 2,
    "num_workers": 0,
}
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """ESPnet with the plugin, a token list, text and shape files."""
    from espnet_llm_plugin import registry

    registry.register(("lm", "lm_model"))
    root = tmp_path_factory.mktemp("work")
    train_sentencepiece(root / "sp", TEXT, 40)
    for name, lines in (("train", TEXT * 4), ("valid", TEXT[:3])):
        ids = [f"{name}{i}" for i in range(len(lines))]
        (root / name).write_text("".join(f"{i} {t}\n" for i, t in zip(ids, lines)))
        (root / f"{name}_shape").write_text("".join(f"{i} 40,40\n" for i in ids))
    return root


def lm_train(work, tag, lm_conf, *extra):
    from espnet2.tasks.lm import LMTask

    config = work / f"{tag}.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "lm_conf": lm_conf}))
    options = {
        "config": config,
        "output_dir": work / tag,
        "token_type": "bpe",
        "bpemodel": work / "sp.model",
        "token_list": work / "sp.tokens.txt",
    }
    for name in ("train", "valid"):
        options[f"{name}_data_path_and_name_and_type"] = f"{work / name},text,text"
        options[f"{name}_shape_file"] = work / f"{name}_shape"
    command = [part for k, v in options.items() for part in (f"--{k}", str(v))]
    LMTask.main(cmd=[*command, *extra])
    return work / tag


def perplexity(work, config, checkpoint, output_dir):
    from espnet2.bin.lm_calc_perplexity import main

    main(
        cmd=[
            f"--data_path_and_name_and_type={work / 'valid'},text,text",
            f"--train_config={config}",
            f"--model_file={checkpoint}",
            f"--output_dir={output_dir}",
        ]
    )
    return float((output_dir / "ppl").read_text())


@pytest.fixture(scope="module")
def scratch(work):
    return lm_train(work, "scratch", {"config": SMALL})


@pytest.fixture(scope="module")
def exported(work, scratch):
    from espnet_llm_plugin.bin import export_llm

    export_llm.main(
        [
            f"--lm_train_config={scratch / 'config.yaml'}",
            f"--lm_file={scratch / 'valid.loss.ave.pth'}",
            f"--output_dir={work / 'llm'}",
        ]
    )
    return work / "llm"


def test_training_learns_and_perplexity_is_that_of_the_export(work, scratch, exported):
    """Trained, averaged over two epochs, exported, used frozen: one and the same model."""
    vocab_size = len((work / "sp.tokens.txt").read_text(encoding="utf-8").split("\n")) - 1
    averaged = scratch / "valid.loss.ave_2best.pth"
    assert averaged.exists()
    trained = perplexity(work, scratch / "config.yaml", averaged, work / "ppl1")
    assert 1 < trained < 0.75 * vocab_size
    frozen = perplexity(
        work, exported / "espnet_lm.yaml", exported / "espnet_lm.pth", work / "ppl2"
    )
    assert frozen == pytest.approx(trained, rel=1e-6)


def test_exported_logits_equal_the_checkpoints(scratch, exported):
    from espnet2.tasks.lm import LMTask
    from transformers import AutoModelForCausalLM

    model, _ = LMTask.build_model_from_file(
        scratch / "config.yaml", scratch / "valid.loss.ave.pth", "cpu"
    )
    ids = torch.tensor([[model.sos, 4, 5, 6]])
    with torch.no_grad():
        expected = model.lm(ids, None)[0][..., 1:]
        found = AutoModelForCausalLM.from_pretrained(exported)(input_ids=ids).logits[..., 1:]
    assert torch.equal(found, expected)


def test_own_llm_is_adapted_and_fine_tuned(work, exported):
    """The user's path in miniature: LLM -> other token list -> fine-tune -> frozen use."""
    from espnet2.tasks.lm import LMTask

    from espnet_llm_plugin.bin import adapt_vocabulary

    model, tokens = train_sentencepiece(work / "other", TEXT, 32)
    adapt_vocabulary.main(
        [
            f"--llm={exported}",
            f"--token_list={tokens}",
            f"--bpemodel={model}",
            f"--output_dir={work / 'adapted'}",
        ]
    )
    files = ["--token_list", str(tokens), "--bpemodel", str(model)]
    tuned = lm_train(work, "tuned", {"llm": str(work / "adapted")}, *files)
    before = perplexity(
        work,
        work / "adapted" / "espnet_lm.yaml",
        work / "adapted" / "espnet_lm.pth",
        work / "ppl3",
    )
    after = perplexity(work, tuned / "config.yaml", tuned / "valid.loss.ave.pth", work / "ppl4")
    assert after < before and math.isfinite(before)
    start, _ = LMTask.build_model_from_file(tuned / "config.yaml", None, "cpu")
    end, _ = LMTask.build_model_from_file(
        tuned / "config.yaml", tuned / "valid.loss.ave.pth", "cpu"
    )
    changed = [
        name for (name, a), b in zip(start.named_parameters(), end.parameters()) if (a != b).any()
    ]
    assert len(changed) == len(list(end.parameters()))


def test_training_resumes(work, scratch):
    """ESPnet resumes with strict=True from checkpoint.pth."""
    again = lm_train(work, "scratch", {"config": SMALL}, "--resume", "true", "--max_epoch", "3")
    assert (again / "3epoch.pth").exists()
    saved = torch.load(again / "3epoch.pth")
    assert all(name.startswith("lm.llm.") for name in saved)


def test_statistics_can_be_collected_without_the_llm(work, monkeypatch):
    """With ESPnet's extract_feats_in_collect_stats=false no model is built at all."""
    from espnet_llm_plugin.llm import causal_llm

    def never(*args, **kwargs):
        raise AssertionError("built the model")

    monkeypatch.setattr(causal_llm, "build_from_config", never)
    extra = ["--collect_stats", "true", "--model_conf", "extract_feats_in_collect_stats=false"]
    stats = lm_train(work, "stats", {"config": SMALL}, *extra)
    lines = (stats / "train" / "text_shape").read_text().splitlines()
    assert len(lines) == len(TEXT) * 4


def test_frozen_llm_decodes_in_espnets_speech2text(work, exported):
    """--lm_train_config espnet_lm.yaml --lm_file espnet_lm.pth, as asr_inference builds an LM."""
    from espnet2.tasks.lm import LMTask

    model, conf = LMTask.build_model_from_file(
        exported / "espnet_lm.yaml", exported / "espnet_lm.pth", "cpu"
    )
    row, state = model.lm.score(torch.tensor([model.sos]), None, None)
    assert row.shape == (len(conf.token_list),) and state.length == 1


def test_copying_is_trained_by_lm_train_and_exported(work, caplog):
    """`--model copy`: its figures are in the log of each epoch; perplexity and export as ever."""
    import logging

    from espnet_llm_plugin.bin import copy_accuracy, export_llm

    options = ["--model", "copy", "--model_conf", "plain_share=0.5", "--model_conf", "drop=0.2"]
    with caplog.at_level(logging.INFO):
        copier = lm_train(work, "copier", {"config": SMALL}, *options)
    figures = [r.getMessage() for r in caplog.records if "epoch results" in r.getMessage()]
    assert len(figures) == 2
    for name in ("acc_copy", "acc_clean", "acc_random", "gap_copy", "loss_plain"):
        assert all(f"{name}=" in line for line in figures)
    conf = yaml.safe_load((copier / "config.yaml").read_text())
    assert conf["model"] == "copy" and conf["model_conf"]["drop"] == 0.2
    checkpoint = copier / "valid.loss.ave.pth"
    trained = perplexity(work, copier / "config.yaml", checkpoint, work / "ppl5")
    export_llm.main(
        [
            f"--lm_train_config={copier / 'config.yaml'}",
            f"--lm_file={checkpoint}",
            f"--output_dir={work / 'copier_llm'}",
        ]
    )
    files = [work / "copier_llm" / f"espnet_lm.{end}" for end in ("yaml", "pth")]
    assert perplexity(work, *files, work / "ppl6") == pytest.approx(trained, rel=1e-6)
    copy_accuracy.main(
        [
            *["--llm", str(work / "copier_llm"), "--text", str(work / "valid")],
            *["--output", str(work / "copy.json")],
        ]
    )
    assert (work / "copy.json").is_file()


LORA = {"tuning": "lora", "lora_conf": {"r": 4, "alpha": 16, "targets": "all-linear"}}


def word_perplexity(llm, work, output):
    from espnet_llm_plugin.bin import llm_perplexity

    llm_perplexity.main([f"--llm={llm}", f"--text={work / 'valid'}", f"--output={output}"])
    return json.loads(output.read_text())["word_perplexity"]


@pytest.fixture(scope="module")
def native(work):
    """An LLM with its own tokens and its token list."""
    from espnet_llm_plugin.bin import make_token_list

    llm = save_llm_dir(work / "native")
    make_token_list.main(
        ["--token_type", "hugging_face", "--llm", str(llm), "--output_dir", str(work / "tokens")]
    )
    return llm, work / "tokens" / "tokens.txt"


@pytest.mark.parametrize("tokens", ["asr", "own"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_fine_tuning_in_either_vocabulary(work, exported, native, tokens, tuning):
    """Trained, saved, averaged, resumed, exported: perplexity falls, and is that of the export."""
    from espnet_llm_plugin.bin import export_llm

    llm, extra = exported, []
    if tokens == "own":
        llm, token_list = native
        extra = ["--token_type", "hugging_face", "--bpemodel", str(llm)]
        extra += ["--token_list", str(token_list)]
    tag = f"{tuning}_{tokens}"
    conf = {"llm": str(llm), **(LORA if tuning == "lora" else {})}
    lm_train(work, tag, conf, *extra, "--max_epoch", "1")
    lm_train(work, tag, conf, *extra, "--resume", "true")
    checkpoint = work / tag / "valid.loss.ave.pth"
    if tuning == "lora":
        saved = torch.load(checkpoint)
        assert all("lora_" in name or "fingerprint" in name for name in saved)
    files = work / tag / "config.yaml", checkpoint
    export_llm.main(
        [
            *[f"--lm_train_config={files[0]}", f"--lm_file={files[1]}"],
            f"--output_dir={work / tag / 'llm'}",
        ]
    )
    before = word_perplexity(llm, work, work / tag / "before.json")
    after = word_perplexity(work / tag / "llm", work, work / tag / "after.json")
    assert after < 0.9 * before
    if tokens == "asr":
        trained = perplexity(work, *files, work / tag / "ppl1")
        exports = [work / tag / "llm" / f"espnet_lm.{end}" for end in ("yaml", "pth")]
        assert perplexity(work, *exports, work / tag / "ppl2") == pytest.approx(trained, rel=1e-4)
    else:
        from espnet2.tasks.lm import LMTask
        from transformers import AutoModelForCausalLM

        model, _ = LMTask.build_model_from_file(*files, "cpu")
        lm = model.lm.eval()
        ids = torch.tensor([[model.sos, 4, 300, 6]])
        again = AutoModelForCausalLM.from_pretrained(work / tag / "llm")
        with torch.no_grad():
            expected = again(input_ids=torch.tensor([[1, 4, 300, 6]])).logits  # BOS is 1
            found = lm(ids, None)[0]
        same = [n for n in range(found.shape[-1]) if n not in (2, found.shape[-1] - 1)]
        torch.testing.assert_close(found[..., same], expected[..., same], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[..., -1], expected[..., 2], atol=1e-4, rtol=1e-4)  # EOS


def test_statistics_of_a_pretrained_llm_do_not_load_it(work, native, monkeypatch):
    from espnet_llm_plugin.llm import backbone, causal_llm

    def never(*args, **kwargs):
        raise AssertionError("loaded the LLM")

    monkeypatch.setattr(backbone, "load_causal_lm", never)
    monkeypatch.setattr(causal_llm, "load_causal_lm", never)
    llm, token_list = native
    extra = ["--collect_stats", "true", "--model_conf", "extract_feats_in_collect_stats=false"]
    extra += ["--token_type", "hugging_face", "--bpemodel", str(llm)]
    extra += ["--token_list", str(token_list)]
    stats = lm_train(work, "native_stats", {"llm": str(llm), **LORA}, *extra)
    assert len((stats / "train" / "text_shape").read_text().splitlines()) == len(TEXT) * 4
