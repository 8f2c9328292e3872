"""Token lists of transcripts (stage 5), with ESPnet's symbols in ESPnet's order."""

import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional, Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import read_lines
from espnet_llm_plugin.data.problems import Problems
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.token_list import BLANK, SOS_EOS, UNK

PathLike = Union[str, Path]

BPE_MODES = ("unigram", "bpe")
# SentencePiece's default, which ESPnet uses, turns the zero-width (non-)joiners of Indic words into
# spaces; the other two keep them.
NORMALIZATIONS = ("nmt_nfkc", "nfkc", "identity")
SENTENCEPIECE_SYMBOLS = 3  # <unk>, <s>, </s> come first in every model trained here


def read_transcripts(texts: Sequence[PathLike]) -> Iterator[str]:
    """Transcripts of ``<id> <transcript>`` files, words separated by one space, none empty."""
    for path in texts:
        problems = Problems(str(path))
        for _, line in read_lines(path, problems):
            words = line.split()[1:]
            if words:
                yield " ".join(words)
        problems.check("Save the file as UTF-8.")


def _write_list(tokens: Sequence[str], output_dir: Path) -> list[str]:
    tokens = [BLANK, UNK, *tokens, SOS_EOS]
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise UserError(
            f"the token list would contain {', '.join(repeated)} more than once: the training "
            "text contains this symbol of the token list's own; remove it there"
        )
    return write_tokens(tokens, output_dir)


def write_tokens(tokens: Sequence[str], output_dir: PathLike) -> list[str]:
    """Write ``tokens.txt``, one token a line."""
    with writing(output_dir), atomic_write(Path(output_dir) / "tokens.txt") as stream:
        stream.writelines(token + "\n" for token in tokens)
    return list(tokens)


def make_character_list(
    texts: Sequence[PathLike],
    output_dir: PathLike,
    *,
    token_type: str = "char",
    nlsyms: Optional[PathLike] = None,
    cleaner: Optional[str] = None,
    vocabulary_size: int = 0,
) -> list[str]:
    """Write ``tokens.txt`` of all characters (``char``) or words (``word``), most frequent first.

    Args:
        texts: Files of ``<id> <transcript>`` lines.
        output_dir: E.g. ``data/token_list/char``.
        token_type: ``char`` (a space is ``<space>``) or ``word``.
        nlsyms: File of non-linguistic symbols, one a line, that ``char`` does not take apart.
        cleaner: ESPnet's text cleaner.
        vocabulary_size: Largest size, special symbols included; 0 for no limit.
    """
    # These two import nothing heavy; espnet2.text.build_tokenizer would import torch.
    from espnet2.text.char_tokenizer import CharTokenizer
    from espnet2.text.word_tokenizer import WordTokenizer

    if nlsyms is not None and not Path(nlsyms).is_file():
        raise UserError(f"file of non-linguistic symbols {nlsyms} does not exist")
    if token_type == "char":
        tokenizer = CharTokenizer(non_linguistic_symbols=nlsyms)
    elif token_type == "word":
        tokenizer = WordTokenizer()
    else:
        raise UserError(f"token type '{token_type}' is not one of bpe, char, word")
    clean = str
    if cleaner is not None:
        from espnet2.text.cleaner import TextCleaner

        clean = TextCleaner(cleaner)
    counts: Counter[str] = Counter()
    for transcript in read_transcripts(texts):
        counts.update(tokenizer.text2tokens(clean(transcript)))
    if not counts:
        raise UserError(f"no transcripts in {', '.join(map(str, texts))}")
    tokens = [token for token, _ in counts.most_common()]  # ties: first seen first
    if vocabulary_size:
        if vocabulary_size < 4:
            raise UserError(f"a vocabulary of {vocabulary_size} leaves no room beside 3 symbols")
        tokens = tokens[: vocabulary_size - 3]
    with writing(output_dir):
        return _write_list(tokens, Path(output_dir))


def make_bpe_list(
    texts: Sequence[PathLike],
    output_dir: PathLike,
    *,
    nbpe: int,
    bpemode: str = "unigram",
    character_coverage: float = 1.0,
    user_symbols: Sequence[str] = (),
    input_sentence_size: int = 100_000_000,
    normalization: str = "nmt_nfkc",
) -> list[str]:
    """Train a SentencePiece model: ``bpe.model``, ``bpe.vocab``, ``train.txt``, ``tokens.txt``.

    Args:
        texts: Files of ``<id> <transcript>`` lines.
        output_dir: E.g. ``data/token_list/bpe_unigram500``.
        nbpe: Size of SentencePiece's vocabulary. As in ESPnet its ``<unk>``, ``<s>``, ``</s>``
            give way to ``<blank>``, ``<unk>``, ``<sos/eos>``: the token list has ``nbpe`` entries.
        bpemode: ``unigram`` or ``bpe``.
        character_coverage: Share of the characters that must be in the vocabulary.
        user_symbols: Pieces that are never taken apart.
        input_sentence_size: Most sentences to train on.
        normalization: What SentencePiece does to text first, one of :data:`NORMALIZATIONS`.

    Raises:
        UserError: ``nbpe`` is too large (the largest possible is named) or too small.
    """
    import sentencepiece

    if bpemode not in BPE_MODES:
        raise UserError(f"bpemode '{bpemode}' is not one of {', '.join(BPE_MODES)}")
    if normalization not in NORMALIZATIONS:
        raise UserError(
            f"normalization '{normalization}' is not one of {', '.join(NORMALIZATIONS)}"
        )
    output_dir = Path(output_dir)
    with (
        writing(output_dir),
        tempfile.TemporaryDirectory(prefix="bpe.", dir=_parent(output_dir)) as temporary,
    ):
        work = Path(temporary)
        with open(work / "train.txt", "w", encoding="utf-8") as stream:
            count = sum(bool(stream.write(line + "\n")) for line in read_transcripts(texts))
        if not count:
            raise UserError(f"no transcripts in {', '.join(map(str, texts))}")
        # Sentences and model go through memory, and the seed of the sampling is fixed: a model
        # made from file names contains them, and two runs would give different bytes.
        sentencepiece.set_random_generator_seed(0)
        model = io.BytesIO()
        try:
            with open(work / "train.txt", encoding="utf-8") as sentences:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=(line.rstrip("\n") for line in sentences),
                    model_writer=model,
                    vocab_size=nbpe,
                    model_type=bpemode,
                    character_coverage=character_coverage,
                    input_sentence_size=input_sentence_size,
                    user_defined_symbols=list(user_symbols),
                    normalization_rule_name=normalization,
                    minloglevel=2,
                )
        except RuntimeError as error:
            raise UserError(_explain(str(error), nbpe, texts)) from error
        (work / "bpe.model").write_bytes(model.getvalue())
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
        scores = [processor.get_score(index) for index in range(processor.get_piece_size())]
        with open(work / "bpe.vocab", "w", encoding="utf-8") as stream:
            stream.writelines(f"{piece}\t{score:g}\n" for piece, score in zip(pieces, scores))
        pieces = pieces[SENTENCEPIECE_SYMBOLS:]
        tokens = _write_list(pieces, work)
        # tokens.txt is moved last: it stands for a complete directory.
        output_dir.mkdir(exist_ok=True)
        (output_dir / "tokens.txt").unlink(missing_ok=True)
        for name in ("train.txt", "bpe.model", "bpe.vocab", "tokens.txt"):
            (work / name).replace(output_dir / name)
        return tokens


def _parent(directory: Path) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    return directory.parent


def _explain(message: str, nbpe: int, texts: Sequence[PathLike]) -> str:
    names = ", ".join(map(str, texts))
    too_high = re.search(r"set it to a value <= (\d+)", message)
    if too_high:
        return (
            f"--nbpe {nbpe} is more than {names} can fill: the largest possible is {too_high[1]}. "
            "Give a smaller --nbpe or more text"
        )
    too_low = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
    if too_low:
        return (
            f"--nbpe {nbpe} is less than the characters of {names} need: the smallest possible is "
            f"{too_low[1]}. Give a larger --nbpe or a smaller --bpe_char_cover"
        )
    return f"sentencepiece cannot train on {names}: {message}"
