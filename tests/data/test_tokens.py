"""Token lists equal to ESPnet's, and clear messages where SentencePiece's are not."""

import random

import pytest
import sentencepiece

from espnet_llm_plugin.data.tokens import make_bpe_list, make_character_list
from espnet_llm_plugin.errors import UserError

SENTENCE = "the quick brown fox jumps over lazy dogs while seven wizards box an old mat"
WORDS = SENTENCE.split(" ")


@pytest.fixture
def text(tmp_path):
    choose = random.Random(0)
    file = tmp_path / "text"
    lines = [f"u{i} {' '.join(choose.choices(WORDS, k=8))}" for i in range(200)]
    file.write_text("\n".join([*lines, "empty", "spaces  two   words ", "tab\ta b"]) + "\n")
    return file


def espnet_list(text, output, token_type, *options):
    from espnet2.bin.tokenize_text import main

    symbols = [f"--add_symbol={s}" for s in ("<blank>:0", "<unk>:1", "<sos/eos>:-1")]
    main(
        [f"--token_type={token_type}", f"--input={text}", f"--output={output}", "--field=2-"]
        + ["--write_vocabulary=true", *symbols, *options]
    )
    return output.read_text().splitlines()


@pytest.mark.parametrize("token_type", ["char", "word"])
@pytest.mark.parametrize("size", [0, 9])
def test_same_list_as_espnet(text, tmp_path, token_type, size):
    expected = espnet_list(text, tmp_path / "theirs", token_type, f"--vocabulary_size={size}")
    tokens = make_character_list(
        [text], tmp_path / "out", token_type=token_type, vocabulary_size=size
    )
    assert tokens == expected == (tmp_path / "out/tokens.txt").read_text().splitlines()
    assert (tokens[0], tokens[1], tokens[-1]) == ("<blank>", "<unk>", "<sos/eos>")
    assert ("<space>" in tokens) == (token_type == "char")
    assert len(tokens) == size or not size


def test_options_of_character_lists(text, tmp_path):
    text.write_text("a <noise>hi <noise>\nb It's $5\n")
    (tmp_path / "nlsyms").write_text("<noise>\n")
    expected = espnet_list(
        text, tmp_path / "theirs", "char", f"--non_linguistic_symbols={tmp_path}/nlsyms"
    )
    tokens = make_character_list([text], tmp_path / "out", nlsyms=tmp_path / "nlsyms")
    assert tokens == expected and "<noise>" in tokens and "<" not in tokens
    cleaned = make_character_list([text], tmp_path / "out", cleaner="tacotron")
    assert cleaned == espnet_list(text, tmp_path / "theirs", "char", "--cleaner=tacotron")
    assert "$" not in cleaned


@pytest.mark.parametrize("bpemode, nbpe", [("unigram", 45), ("bpe", 60)])
def test_bpe_as_asr_sh_makes_it(text, tmp_path, bpemode, nbpe):
    target = tmp_path / "token_list" / f"bpe_{bpemode}{nbpe}"
    tokens = make_bpe_list([text], target, nbpe=nbpe, bpemode=bpemode)
    # asr.sh: cut -f 2- -d" " | spm_train; then the .vocab file without its first three lines
    by_hand = tmp_path / "train.txt"
    transcripts = [line.split(maxsplit=1)[1:] for line in text.read_text().splitlines()]
    by_hand.write_text("".join(t[0] + "\n" for t in transcripts if t))
    sentencepiece.SentencePieceTrainer.train(
        input=str(by_hand),
        vocab_size=nbpe,
        model_type=bpemode,
        model_prefix=str(tmp_path / "theirs"),
        character_coverage=1.0,
        input_sentence_size=100000000,
        minloglevel=2,
    )
    vocabulary = (tmp_path / "theirs.vocab").read_text()
    assert (target / "bpe.vocab").read_text() == vocabulary
    pieces = [line.split("\t")[0] for line in vocabulary.splitlines()[3:]]
    assert tokens == ["<blank>", "<unk>", *pieces, "<sos/eos>"] and len(tokens) == nbpe
    assert (target / "tokens.txt").read_text().splitlines() == tokens
    assert sorted(f.name for f in target.iterdir()) == [
        "bpe.model", "bpe.vocab", "tokens.txt", "train.txt",
    ]  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(target / "bpe.model"))
    for sentence in by_hand.read_text().splitlines():
        encoded = processor.encode(sentence, out_type=str)
        assert set(encoded) <= set(tokens)
        assert processor.decode(encoded) == " ".join(sentence.split())


def test_bpe_is_repeatable(text, tmp_path):
    for name in ("a", "b"):  # from samples of the text
        make_bpe_list([text], tmp_path / name, nbpe=45, input_sentence_size=150)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_bpe_options(text, tmp_path):
    text.write_text(text.read_text() + "rare \u0434\nx <noise> the <noise>\n" * 3)
    plain = make_bpe_list([text], tmp_path / "a", nbpe=45)
    assert "\u0434" in plain and "<noise>" not in plain
    covered = make_bpe_list([text], tmp_path / "b", nbpe=45, character_coverage=0.99)
    assert "\u0434" not in covered
    whole = make_bpe_list([text], tmp_path / "c", nbpe=45, user_symbols=["<noise>"])
    assert whole[2] == "<noise>"
    make_bpe_list([text], tmp_path / "d", nbpe=45, input_sentence_size=101)
    vocabularies = [(tmp_path / name / "bpe.vocab").read_text() for name in "ad"]
    assert vocabularies[0] != vocabularies[1]  # other scores, if not other pieces


TELUGU = "ఇన్\u200cస్టా చూడు"  # the joiner keeps two letters apart, within one word


@pytest.mark.parametrize("normalization", ["nmt_nfkc", "nfkc", "identity"])
def test_normalization_decides_on_joiners(text, tmp_path, normalization):
    text.write_text(text.read_text() + f"x {TELUGU}\n" * 3)
    make_bpe_list([text], tmp_path / "a", nbpe=60, normalization=normalization)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a/bpe.model"))
    back = processor.decode(processor.encode(TELUGU))
    assert back == (TELUGU.replace("\u200c", " ") if normalization == "nmt_nfkc" else TELUGU)


def test_several_texts(text, tmp_path):
    other = tmp_path / "other"
    other.write_text("x \u017c\u00f3\u0142w\n")
    assert "\u017c" in make_character_list([text, other], tmp_path / "a")
    assert "\u017c" not in make_character_list([text], tmp_path / "b")
    assert "\u017c" in make_bpe_list([text, other], tmp_path / "c", nbpe=50)


@pytest.mark.parametrize("bpemode", ["unigram", "bpe"])
def test_nbpe_too_large_names_the_largest_possible(text, tmp_path, bpemode):
    target = tmp_path / "out"
    with pytest.raises(UserError, match=r"--nbpe 5000 is more than .*text can fill") as error:
        make_bpe_list([text], target, nbpe=5000, bpemode=bpemode)
    assert not target.exists()
    largest = int(str(error.value).split("largest possible is ")[1].split(".")[0])
    assert len(make_bpe_list([text], target, nbpe=largest, bpemode=bpemode)) == largest
    with pytest.raises(UserError, match="is more than"):
        make_bpe_list([text], target, nbpe=largest + 1, bpemode=bpemode)
    assert len((target / "tokens.txt").read_text().splitlines()) == largest  # untouched


def test_nbpe_too_small(text, tmp_path):
    with pytest.raises(UserError, match=r"--nbpe 10 is less than .*smallest possible is \d+"):
        make_bpe_list([text], tmp_path / "out", nbpe=10)
    assert not (tmp_path / "out").exists()


def test_wrong_input(text, tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("a\nb \n")
    for make in (make_character_list, lambda *a: make_bpe_list(*a, nbpe=30)):
        with pytest.raises(UserError, match="no transcripts"):
            make([empty], tmp_path / "out")
        with pytest.raises(UserError, match="cannot read"):
            make([tmp_path / "none"], tmp_path / "out")
        empty.write_bytes(b"a fine\nb \xff\n")
        with pytest.raises(UserError, match="empty:2"):
            make([empty], tmp_path / "out")
        empty.write_text("a\nb \n")
        assert not (tmp_path / "out/tokens.txt").exists()
    with pytest.raises(UserError, match="nlsyms does not exist"):
        make_character_list([text], tmp_path / "out", nlsyms=tmp_path / "nlsyms")
    with pytest.raises(UserError, match="not one of bpe, char, word"):
        make_character_list([text], tmp_path / "out", token_type="phn")
    with pytest.raises(UserError, match="normalization 'nfc' is not one of nmt_nfkc, nfkc"):
        make_bpe_list([text], tmp_path / "out", nbpe=45, normalization="nfc")
    with pytest.raises(UserError, match="not one of unigram, bpe"):
        make_bpe_list([text], tmp_path / "out", nbpe=45, bpemode="char")
    with pytest.raises(UserError, match="no room"):
        make_character_list([text], tmp_path / "out", vocabulary_size=3)
    with pytest.raises(UserError, match="sentencepiece cannot train on .*text"):
        make_bpe_list([text], tmp_path / "out", nbpe=45, user_symbols=["<unk>"])


def test_symbols_of_the_list_in_the_text(text, tmp_path):
    text.write_text(text.read_text() + "z <unk> x <blank>\n")
    with pytest.raises(UserError, match="<blank>, <unk> more than once|<unk>, <blank> more"):
        make_character_list([text], tmp_path / "out", token_type="word")
    assert not (tmp_path / "out/tokens.txt").exists()
