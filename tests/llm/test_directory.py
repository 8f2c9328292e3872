"""LLM directories over a token list: form, checks, atomic writing."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
import yaml

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from espnet_llm_plugin.llm.directory import (
    check_llm_tokens,
    llm_tokens,
    read_token_list,
    write_directory,
)
from tests.llm.tiny import char_tokens, save_adapted_dir, save_llm_dir


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return save_adapted_dir(tmp_path_factory.mktemp("llm") / "adapted", char_tokens())


def write(path, tokens):
    path.write_text("".join(f"{t}\n" for t in tokens), encoding="utf-8")
    return path


class TestTokenList:
    def test_good(self, tmp_path):
        tokens = char_tokens()
        assert read_token_list(write(tmp_path / "tokens.txt", tokens)) == tokens

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="absent.txt cannot be read"):
            read_token_list(tmp_path / "absent.txt")

    def test_not_text(self, tmp_path):
        (tmp_path / "t").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="cannot be read"):
            read_token_list(tmp_path / "t")

    @pytest.mark.parametrize(
        "tokens, message",
        [
            ([], "found 0 tokens in place of <blank>"),
            (["<unk>", "<blank>", "a", "<sos/eos>"], "found '<unk>' in place of <blank>"),
            (["<blank>", "a", "<unk>", "<sos/eos>"], "found 'a' in place of <unk>"),
            (["<blank>", "<unk>", "<sos/eos>", "a"], "found 'a' in place of <sos/eos>"),
            (["<blank>", "<unk>", "a", "b", "a", "<sos/eos>"], "'a' is on line 3 .* line 5"),
        ],
    )
    def test_bad_form(self, tmp_path, tokens, message):
        with pytest.raises(UserError, match=message):
            read_token_list(write(tmp_path / "tokens.txt", tokens))


class TestCheckTokenList:
    def test_same(self, adapted, tmp_path):
        check_llm_tokens(adapted, char_tokens())
        check_llm_tokens(adapted, write(tmp_path / "tokens.txt", char_tokens()))

    def test_other_length(self, adapted):
        tokens = char_tokens()
        with pytest.raises(UserError, match="12 tokens against 11.*adapt_vocabulary"):
            check_llm_tokens(adapted, [*tokens[:-2], "<sos/eos>"])

    def test_other_token(self, adapted, tmp_path):
        tokens = char_tokens()
        tokens[4] = "x"
        file = write(tmp_path / "tokens.txt", tokens)
        with pytest.raises(UserError, match="tokens.txt: token 4 is 'e' against 'x'"):
            check_llm_tokens(adapted, file)

    def test_llm_as_downloaded(self, tmp_path):
        with pytest.raises(UserError, match="no tokens.txt.*adapt_vocabulary"):
            check_llm_tokens(save_llm_dir(tmp_path), char_tokens())

    def test_put_together_by_hand(self, tmp_path):
        directory = save_llm_dir(tmp_path)
        write(directory / "tokens.txt", char_tokens())
        with pytest.raises(UserError, match="12 tokens, but config.json says vocab_size 365"):
            llm_tokens(directory)


class TestContents:
    def test_is_an_ordinary_hugging_face_directory(self, adapted):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(adapted)
        last = len(char_tokens()) - 1
        for config in (model.config, model.generation_config):
            assert config.bos_token_id == config.eos_token_id == last
            assert config.pad_token_id == 0
        assert model.config.vocab_size == last + 1

    def test_others_may_read_it(self, adapted):
        umask = os.umask(0)
        os.umask(umask)
        for file in adapted.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file

    def test_espnet_decodes_with_it_as_it_is(self, adapted):
        conf = yaml.safe_load((adapted / "espnet_lm.yaml").read_text(encoding="utf-8"))
        assert conf["token_list"] == char_tokens() and conf["token_type"] == "char"
        lm = CausalLLM(len(conf["token_list"]), **conf["lm_conf"])
        saved = torch.load(adapted / "espnet_lm.pth")
        assert sum(tensor.numel() for tensor in saved.values()) == 32
        lm.load_state_dict({key.removeprefix("lm."): value for key, value in saved.items()})
        logits, _ = lm(torch.tensor([[11, 4]]), None)
        assert torch.isfinite(logits).all()


class TestWriting:
    def test_failure_leaves_nothing(self, tmp_path):
        def fail(partial):
            (partial / "half").write_text("half")
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            write_directory(tmp_path / "out", fail)
        assert not list(tmp_path.iterdir())

    def test_full_disk_is_a_clear_error(self, tmp_path):
        def fail(partial):
            raise OSError(28, "No space left on device")

        with pytest.raises(UserError, match="cannot write .*out: .*No space left"):
            write_directory(tmp_path / "out", fail)
        assert not list(tmp_path.iterdir())

    def test_does_not_write_over_anything(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")
        with pytest.raises(UserError, match="out exists and is not empty"):
            write_directory(tmp_path / "out", lambda partial: None)
        assert (tmp_path / "out" / "mine").read_text() == "precious"

    def test_empty_directory_may_exist(self, tmp_path):
        (tmp_path / "out").mkdir()
        write_directory(tmp_path / "out", lambda p: (p / "a").write_text("a"))
        assert [f.name for f in tmp_path.rglob("*")] == ["out", "a"]

    def test_killed_leaves_nothing_and_the_next_run_succeeds(self, tmp_path):
        code = (
            "import sys, time; from pathlib import Path\n"
            "from espnet_llm_plugin.llm.directory import write_directory\n"
            "def write(p):\n"
            "    (p / 'half').write_text('half'); print('started', flush=True); time.sleep(60)\n"
            "write_directory(Path(sys.argv[1]), write)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
        write_directory(tmp_path / "out", lambda p: (p / "a").write_text(str(time.time())))
        assert [f.name for f in tmp_path.rglob("*")] == ["out", "a"]
