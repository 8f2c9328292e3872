"""A Hugging Face tokenizer with the ids of an ASR token list."""

from pathlib import Path
from typing import Any, Optional, Sequence, Union

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.token_list import BLANK, SOS_EOS, UNK


def load_sentencepiece(bpemodel: Union[str, Path]) -> Any:
    """Load a ``SentencePieceProcessor``.

    Raises:
        UserError: Missing, or not a sentencepiece model.
    """
    import sentencepiece

    if not Path(bpemodel).is_file():
        raise UserError(f"sentencepiece model {bpemodel} does not exist.")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(bpemodel))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{bpemodel} is not a sentencepiece model ({str(error).splitlines()[0]})."
        ) from None


def check_bpemodel(processor: Any, tokens: Sequence[str], name: str) -> None:
    """Check that every text piece of a sentencepiece model is in the token list.

    Raises:
        UserError: The model belongs to another token list.
    """
    known = set(tokens)
    absent = [
        piece
        for piece in map(processor.id_to_piece, range(processor.get_piece_size()))
        if piece not in known and piece not in ("<unk>", "<s>", "</s>", "<pad>")
    ]
    if absent:
        raise UserError(
            f"sentencepiece model {name} has {len(absent)} pieces that are not in the token list, "
            f"e.g. {', '.join(map(repr, absent[:3]))}; it belongs to another token list."
        )


def build_tokenizer(
    bpemodel: Union[str, Path], tokens: Sequence[str]
) -> tuple[Optional[Any], Optional[str]]:
    """Rebuild a *unigram* sentencepiece model as a Hugging Face tokenizer over ``tokens``.

    Returns:
        ``(tokenizer, None)``, or ``(None, reason)`` for models that are not unigram.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(bpemodel).read_bytes())
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type).lower()
        return None, f"{bpemodel} is a sentencepiece model of type {kind}, not unigram"

    # 1. Pieces with their log-probs, in the order of the token list. Special tokens and tokens
    #    that sentencepiece does not know get the lowest score, which leaves the penalty of unknown
    #    characters (lowest - 10, in both libraries) as it is.
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in (1, 4, 6)}
    lowest = min(piece.score for piece in proto.pieces if piece.type == 1)
    vocabulary = [(token, scores.get(token, lowest)) for token in tokens]
    backend = Tokenizer(
        models.Unigram(
            vocabulary,
            unk_id=list(tokens).index(UNK),
            byte_fallback=bool(proto.trainer_spec.byte_fallback),
        )
    )
    # 2. The same normalisation: character map, white space, dummy prefix.
    spec = proto.normalizer_spec
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    # As normalisation, not by a Metaspace pre-tokenizer: that adds no prefix before a space, and
    # splits words, while pieces may span words if the model was trained so.
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(undo)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=SOS_EOS,
        eos_token=SOS_EOS,
        pad_token=BLANK,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, None
