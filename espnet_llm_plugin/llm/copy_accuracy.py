"""How well a causal LM copies from its context.

B: sentences, U: tokens of the longest, V: vocabulary.
"""

import zlib
from pathlib import Path
from typing import Any, Sequence, Union

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.copy_batch import copy_score
from espnet_llm_plugin.llm.copy_noise import CopyNoise, NoisyPrefix, noisy_prefix, random_pieces

CLEAN = CopyNoise(
    drop=0.0, replace=0.0, insert=0.0, max_repeats=1, max_blanks=0, embedding_noise=0.0
)


@torch.no_grad()
def measure_copying(
    model: Any, text: torch.Tensor, lengths: torch.Tensor, noise: CopyNoise, vocab_size: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Losses and accuracies of a batch, each token predicted from its prefix and the true text.

    The noise depends on the batch only, so that one epoch compares with another.

    Args:
        model: Hugging Face causal LM over an ASR token list.
        text: Token ids (B, U), padded on the right.
        lengths: (B,).
        noise: Of the prefixes.
        vocab_size: V.

    Returns:
        ``loss_plain`` and ``acc_plain`` of the text alone; ``loss_copy`` and ``acc_copy`` after a
        noisy copy; ``acc_clean`` after a clean one; ``acc_random``: random pieces after a clean
        copy of them, where knowing the language does not help; ``gap_copy`` (if B > 1): loss after
        the noisy copy of another sentence of the batch, minus ``loss_copy``: about 0 if prefixes
        are ignored. Then the number of tokens.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(text.cpu().numpy().tobytes()))

    def score(prefix, of=text):
        return copy_score(model, prefix, of, lengths, generator)

    def copy_of(what, how):
        return noisy_prefix(what, lengths, how, vocab_size, generator=generator)

    plain = score(None)
    noisy = copy_of(text, noise)
    copied = score(noisy)
    pieces = random_pieces(tuple(text.shape), vocab_size, generator).to(text)
    stats = {
        "loss_plain": plain.nll,
        "acc_plain": plain.accuracy,
        "loss_copy": copied.nll,
        "acc_copy": copied.accuracy,
        "acc_clean": score(copy_of(text, CLEAN)).accuracy,
        "acc_random": score(copy_of(pieces, CLEAN), pieces).accuracy,
    }
    if len(text) > 1:
        rolled = NoisyPrefix(noisy.ids.roll(1, 0), noisy.lengths.roll(1, 0), noisy.noise.roll(1, 0))
        stats["gap_copy"] = score(rolled).nll - copied.nll
    return stats, plain.tokens


def measure_directory(
    llm_dir: Union[str, Path], sentences: Sequence[str], noise: CopyNoise, batch_size: int = 32
) -> dict[str, float]:
    """:func:`measure_copying` of a text under an LLM whose rows are the tokens of an ASR list.

    Args:
        llm_dir: Directory as ``adapt_vocabulary`` and ``export_llm`` write it.
        sentences: Words separated by spaces; at least two.
        noise: Of the prefixes.
        batch_size: B.

    Raises:
        UserError: Not such a directory, fewer than two sentences.
    """
    from espnet_llm_plugin.llm.backbone import load_causal_lm
    from espnet_llm_plugin.llm.perplexity import adapted_tokenizer

    if len(sentences) < 2:
        raise UserError("copying is measured on at least two sentences.")
    encode, tokens = adapted_tokenizer(llm_dir)
    model = load_causal_lm(llm_dir).eval()
    # Neighbours in length share a batch; the last one is never of a single sentence.
    encoded = sorted((encode(sentence) for sentence in sentences), key=len)
    starts = list(range(0, len(encoded) - 1, batch_size))
    totals: dict[str, float] = {}
    count = 0
    for start, end in zip(starts, [*starts[1:], len(encoded)]):
        part = encoded[start:end]
        text = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in part], True)
        lengths = torch.tensor([len(ids) for ids in part])
        stats, number = measure_copying(model, text, lengths, noise, len(tokens))
        for name, value in stats.items():
            totals[name] = totals.get(name, 0.0) + float(value) * int(number)
        count += int(number)
    return {name: total / count for name, total in totals.items()}
