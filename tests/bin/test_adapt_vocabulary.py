"""The command line of vocabulary adaptation, from files to files."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from espnet_llm_plugin.bin import adapt_vocabulary
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.directory import check_llm_tokens
from tests.llm.tiny import TEXT, char_tokens, save_llm_dir, tiny_tokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """LLM directory, sentencepiece model with token list, text."""
    root = tmp_path_factory.mktemp("files")
    model, tokens = train_sentencepiece(root / "sp", TEXT, 60)
    (root / "text").write_text("\n".join(TEXT) + "\n")
    (root / "text_ids").write_text("".join(f"u{i} {t}\n" for i, t in enumerate(TEXT)))
    save_llm_dir(root / "llm", tied=False)
    return dict(llm=root / "llm", bpemodel=model, token_list=tokens, text=root / "text")


def run(files, output_dir, *extra, without=()):
    options = {**files, "output_dir": output_dir}
    command = [f"--{k}={v}" for k, v in options.items() if k not in without]
    return adapt_vocabulary.main([*command, *extra])


def report(directory):
    return json.loads((directory / "vocabulary_report.json").read_text(encoding="utf-8"))


def test_writes_an_llm_over_the_token_list(files, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert run(files, out) == 0
    check_llm_tokens(out, files["token_list"])
    assert (out / "bpe.model").read_bytes() == files["bpemodel"].read_bytes()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    tokens = (out / "tokens.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert model.config.vocab_size == len(tokenizer) == len(tokens)
    ids = tokenizer(TEXT[0], add_special_tokens=False)["input_ids"]
    assert "".join(tokens[i] for i in ids) == "▁" + TEXT[0].replace(" ", "▁")

    figures = report(out)
    assert figures["words"] == sum(len(t.split()) for t in TEXT)
    assert figures["sentences"] == len(TEXT) and figures["unknown_tokens"] == 0
    assert figures["tokens_before"] == sum(
        len(tiny_tokenizer("sentencepiece")(t, add_special_tokens=False)["input_ids"]) for t in TEXT
    )
    assert figures["text_tokens"] == len(tokens) - 3
    assert 0 < figures["exact_match_share"] < 1
    assert figures["not_found"] == []
    printed = capsys.readouterr().out
    text = (out / "vocabulary_report.txt").read_text(encoding="utf-8")
    assert printed == f"{text}wrote {out}\n"
    assert f"exact matches: {figures['exact_matches']} of {figures['text_tokens']}" in text
    assert f"before {figures['word_perplexity_before']:.1f}, after " in text


def test_perplexities_are_those_of_the_models(files, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(files, tmp_path / "out")
    figures = report(tmp_path / "out")
    for directory, key, blank in (
        (files["llm"], "word_perplexity_before", None),
        (tmp_path / "out", "word_perplexity_after", 0),
    ):
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        total = 0.0
        for sentence in TEXT:
            ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            row = torch.tensor([[tokenizer.bos_token_id, *ids]])
            logits = model(row).logits[0, :-1].detach()
            if blank is not None:
                logits[:, blank] = -torch.inf
            total += float(logits.log_softmax(-1).gather(1, row[0, 1:, None]).sum())
        words = sum(len(t.split()) for t in TEXT)
        expected = float(torch.tensor(-total / words).exp())
        assert figures[key] == pytest.approx(expected, rel=1e-3)


def test_own_vocabulary_keeps_the_perplexity(files, tmp_path):
    """Adapting an adapted LLM to the same token list finds everything and changes nothing."""
    run(files, tmp_path / "once")
    run({**files, "llm": tmp_path / "once"}, tmp_path / "twice")
    figures = report(tmp_path / "twice")
    assert figures["exact_match_share"] == 1.0
    # blank takes part in the softmax of the native perplexity, not of the adapted one
    before, after = figures["word_perplexity_before"], figures["word_perplexity_after"]
    assert after < before
    assert after == pytest.approx(report(tmp_path / "once")["word_perplexity_after"], rel=1e-4)


def rows(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).get_input_embeddings().weight.detach()


def test_options_reach_the_adaptation(files, tmp_path):
    variants = {
        "mean": [],
        "first": ["--oov_init=first"],
        "weighted": ["--oov_init=length_weighted_mean"],
        "random": ["--oov_init=random"],
        "seeded": ["--oov_init=random", "--seed=1"],
        "unmatched": ["--oov_init=random", "--exact_match=false"],
    }
    tables = {}
    for name, options in variants.items():
        run(files, tmp_path / name, *options, without=["text"])
        tables[name] = rows(tmp_path / name)
        assert "word_perplexity_after" not in report(tmp_path / name)
    names = list(tables)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(tables[a], tables[b]), (a, b)
    assert report(tmp_path / "unmatched")["exact_matches"] == 0


def test_text_options(files, tmp_path):
    with_ids = {**files, "text": files["text"].with_name("text_ids")}
    run(files, tmp_path / "a", "--max_text_lines=2")
    run(with_ids, tmp_path / "b", "--max_text_lines=2", "--text_has_ids=true")
    a, b = report(tmp_path / "a"), report(tmp_path / "b")
    assert a["sentences"] == b["sentences"] == 2
    assert a["word_perplexity_after"] == b["word_perplexity_after"]


def test_characters_without_sentencepiece(files, tmp_path, capsys):
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("".join(f"{t}\n" for t in char_tokens()))
    out = tmp_path / "out"
    run({**files, "token_list": tokens}, out, without=["bpemodel"])
    figures = report(out)
    assert figures["token_type"] == "char" and figures["exact_match_share"] == 1.0
    assert figures["unknown_tokens"] > 0
    assert "no tokenizer: the token list has no sentencepiece model" in capsys.readouterr().out
    assert not (out / "tokenizer.json").exists() and not (out / "bpe.model").exists()


def test_token_type(files, tmp_path):
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<blank>\n<unk>\nthe\ncat\n<sos/eos>\n")
    for kind in ("word", "char"):
        options = {**files, "token_list": tokens}
        run(options, tmp_path / kind, f"--token_type={kind}", without=["bpemodel", "text"])
    assert not torch.equal(rows(tmp_path / "word")[2], rows(tmp_path / "char")[2])


def test_bpe_model_gets_no_tokenizer(files, tmp_path, capsys):
    model, tokens = train_sentencepiece(tmp_path / "sp", TEXT, 60, model_type="bpe")
    run({**files, "bpemodel": model, "token_list": tokens}, tmp_path / "out")
    assert "of type bpe, not unigram" in capsys.readouterr().out
    assert (tmp_path / "out" / "bpe.model").exists()


def test_capital_letters_are_warned_about(files, tmp_path, capsys):
    upper = [t.upper() for t in TEXT]
    model, tokens = train_sentencepiece(tmp_path / "sp", upper, 60)
    run({**files, "bpemodel": model, "token_list": tokens}, tmp_path / "out", without=["text"])
    assert "warning: in lower case" in capsys.readouterr().out


def test_too_long_sentences_are_counted(files, tmp_path):
    text = tmp_path / "text"
    text.write_text("the cat\n" + "cat " * 70 + "\n")
    run({**files, "text": text}, tmp_path / "out")
    figures = report(tmp_path / "out")
    assert (figures["sentences"], figures["sentences_too_long"], figures["words"]) == (1, 1, 2)


def test_stored_precision_is_kept(files, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files["llm"]).to(torch.bfloat16)
    llm = shutil.copytree(files["llm"], tmp_path / "llm")
    model.save_pretrained(llm)
    run({**files, "llm": llm}, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == model.dtype


class TestErrors:
    """Each is found before anything is written."""

    def fails(self, files, tmp_path, message, without=()):
        with pytest.raises(UserError, match=message):
            run(files, tmp_path / "out", without=without)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))

    def test_llm(self, files, tmp_path):
        self.fails({**files, "llm": "./absent"}, tmp_path, "LLM directory ./absent does not exist")

    def test_llm_without_tokenizer(self, files, tmp_path):
        llm = shutil.copytree(files["llm"], tmp_path / "llm")
        for file in llm.glob("tokenizer*"):
            file.unlink()
        self.fails({**files, "llm": llm}, tmp_path, "has no usable tokenizer")

    def test_token_list(self, files, tmp_path):
        bad = tmp_path / "tokens.txt"
        bad.write_text("a\nb\nc\nd\n")
        self.fails({**files, "token_list": bad}, tmp_path, "tokens.txt: expected <blank> first")

    def test_bpemodel_of_another_list(self, files, tmp_path):
        other = tmp_path / "tokens.txt"
        other.write_text("".join(f"{t}\n" for t in char_tokens()))
        self.fails({**files, "token_list": other}, tmp_path, "belongs to another token list")

    def test_text(self, files, tmp_path):
        self.fails({**files, "text": tmp_path / "no"}, tmp_path, "no cannot be read")

    def test_bpemodel_needed(self, files, tmp_path):
        self.fails(files, tmp_path, "give --bpemodel", without=["bpemodel"])

    def test_output_exists(self, files, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").touch()
        with pytest.raises(UserError, match="out exists and is not empty"):
            run(files, tmp_path / "out")

    def test_command_line_shows_one_line(self, files, tmp_path):
        module = "espnet_llm_plugin.bin.adapt_vocabulary"
        command = [f"--llm={tmp_path / 'no'}", f"--token_list={files['token_list']}"]
        done = subprocess.run(
            [sys.executable, "-m", module, *command, f"--output_dir={tmp_path / 'out'}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: LLM directory") and done.stderr.count("\n") == 1
