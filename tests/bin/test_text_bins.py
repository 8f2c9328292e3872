"""Options of the text command lines reach the functions behind them."""

import pytest

from espnet_llm_plugin.bin import make_token_list, prepare_lm_text
from espnet_llm_plugin.data.tokens import make_bpe_list

SYLLABLES = ["ta", "no", "mi", "le", "ras", "hon", "pe", "dug", "bil", "so"]
LINES = [
    f"u{i:03d} {SYLLABLES[i % 10]}{SYLLABLES[i * 7 % 9]} <x> {SYLLABLES[i // 30]}{SYLLABLES[i % 8]}"
    for i in range(300)
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    # rare letters: not covered by 98 % of the characters, and hardly all in a sample of a third
    rare = [f"v{letter} {letter}" for letter in "qvwzkj"]
    path.write_text("\n".join([*LINES, *rare]) + "\n")
    return path


@pytest.mark.parametrize(
    "option, value, name, argument",
    [
        ("--bpe_char_cover", "0.98", "character_coverage", 0.98),
        ("--bpe_input_sentence_size", "101", "input_sentence_size", 101),
    ],
)
def test_options_of_pieces(text, tmp_path, option, value, name, argument):
    def tokens(directory, *options):
        make_token_list.main(
            ["--text", str(text), "--output_dir", str(tmp_path / directory), "--nbpe", "40"]
            + list(options)
        )
        return (tmp_path / directory / "tokens.txt").read_text().splitlines()

    plain, changed = tokens("plain"), tokens("changed", option, value)
    assert changed != plain
    expected = make_bpe_list([text], tmp_path / "expected", nbpe=40, **{name: argument})
    assert changed == expected


def test_symbols_that_characters_do_not_take_apart(text, tmp_path):
    (tmp_path / "nlsyms").write_text("<x>\n")
    options = ["--text", str(text), "--output_dir", str(tmp_path / "char"), "--token_type", "char"]
    make_token_list.main(options)
    plain = (tmp_path / "char" / "tokens.txt").read_text().splitlines()
    make_token_list.main([*options, "--nlsyms_txt", str(tmp_path / "nlsyms")])
    tokens = (tmp_path / "char" / "tokens.txt").read_text().splitlines()
    assert "<x>" not in plain and "x" in plain
    assert "<x>" in tokens and "x" not in tokens


def test_sentences_without_ids(tmp_path, capsys):
    (tmp_path / "plain").write_text("one two\n\nthree four\n")
    out = tmp_path / "lm.txt"
    prepare_lm_text.main(["--plain_text", str(tmp_path / "plain"), "--output", str(out)])
    lines = [line.split(maxsplit=1) for line in out.read_text().splitlines()]
    assert [sentence for _, sentence in lines] == ["one two", "three four"]
    assert len({name for name, _ in lines}) == 2
    assert "2 lines; 1 empty" in capsys.readouterr().out
