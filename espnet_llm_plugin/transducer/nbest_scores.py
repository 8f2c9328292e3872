"""Full-sum scores of a transcript and of N hypotheses of each utterance, acoustics shared.

B utterances, T frames, N hypotheses, S = 1 + N sequences (the transcript first), U labels of the
longest sequence, K distinct labels among an utterance's sequences, V tokens, L = V - 2 labels of
the factorized transducer, D encoder width, J joiner width.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from espnet_llm_plugin.transducer.joint import joint_nll
from espnet_llm_plugin.transducer.lattice import lattice_nll
from espnet_llm_plugin.transducer.loss import factorized_lattice
from espnet_llm_plugin.transducer.predictors import as_history

if TYPE_CHECKING:
    from espnet_llm_plugin.transducer.base_model import Lattice
    from espnet_llm_plugin.transducer.decoder import FactorizedTransducerDecoder


class NBest(NamedTuple):
    """N-best lists of a batch as tensors; an utterance may have fewer than N hypotheses."""

    tokens: Tensor  # (B, N, U) token ids, padded with 1
    lengths: Tensor  # (B, N), 0 where there is no hypothesis
    exists: Tensor  # (B, N)
    errors: Tensor  # (B, N) word errors, 0 where there is no hypothesis


class SequenceScores(NamedTuple):
    """What a batch's transcripts and hypotheses get from the model."""

    nll: Tensor  # (B,) -log P(transcript | speech), nats
    hypotheses: Tensor  # (B, N) score of each hypothesis as in the search, its alignments summed
    further: dict[str, Tensor]  # (B,) each: ilm, the predictor's -log P(transcript)


def factorized_nbest_nll(
    acoustic_logits: Tensor,
    lm_log_probs: Tensor,
    blank_logits: Tensor,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    lm_scale: float = 1.0,
    blank_norm: str = "sigmoid",
) -> Tensor:
    """``factorized_rnnt_loss`` of S label sequences of each utterance, which share the acoustics.

    The label positions of all sequences stand side by side, so that the normaliser is one product
    of the (T, L) acoustic scores and the (L, S (U+1)) LM scores: there are never S copies of the
    former. The lattices are S for each utterance, of two numbers a cell.

    Args:
        acoustic_logits: (B, T, L).
        lm_log_probs: (B, S, U+1, L); any log-probabilities where a sequence has ended.
        blank_logits: (B, T, S, U+1).
        targets: (B, S, U) integers in [0, L); padding may hold anything.
        frame_lengths: (B,) integers in [1, T].
        target_lengths: (B, S) integers in [0, U].
        lm_scale: alpha.
        blank_norm: ``sigmoid`` or ``softmax``.

    Returns:
        (B, S) nats; +inf where the masks leave no alignment.
    """
    num_utts, num_sequences, num_labels = targets.shape
    positions = num_sequences * (num_labels + 1)
    inside = torch.arange(num_labels, device=targets.device) < target_lengths.unsqueeze(-1)
    blank, label = factorized_lattice(
        acoustic_logits,
        lm_log_probs.flatten(1, 2),
        blank_logits.flatten(2),
        # the label after a sequence's last position is any: its lattice does not use it
        pad(targets.masked_fill(~inside, 0), (0, 1)).flatten(1)[:, :-1],
        frame_lengths,
        torch.full_like(frame_lengths, positions - 1),
        lm_scale=lm_scale,
        blank_norm=blank_norm,
    )

    def lattices(log_probs: Tensor) -> Tensor:
        """(B, T, S (U+1)) -> (B S, T, U+1)."""
        separate = log_probs.unflatten(2, (num_sequences, num_labels + 1))
        return separate.transpose(1, 2).flatten(0, 1)

    nll = lattice_nll(
        lattices(blank),
        lattices(label),
        frame_lengths.repeat_interleave(num_sequences),
        target_lengths.flatten(),
    )
    return nll.unflatten(0, (num_utts, num_sequences))


def factorized_scores(
    decoder: "FactorizedTransducerDecoder", batch: "Lattice", nbest: NBest
) -> SequenceScores:
    """Scores of a factorized transducer.

    The transcript's likelihood is that of training (``lm_scale``); a hypothesis has the score it
    has in decoding, ``log P_alpha(y | x) + beta sum_u l[u, y_u] + label_bonus U`` [arXiv 2404.01716
    eq. 6, with the label bonus of this package's search].
    """
    tokens, lengths = _with_transcript(batch, nbest)
    labels = tokens - 1
    acoustic, acoustic_blank = decoder.acoustic(batch.encoder_out)
    lm = decoder.predictor(labels.flatten(0, 1)).unflatten(0, labels.shape[:2])
    blank = sequence_blank_logits(decoder, batch.encoder_out, as_history(labels))
    blank = blank.float() + acoustic_blank[:, :, None, None]

    def nll(sequences: slice, lm_scale: float) -> Tensor:
        return factorized_nbest_nll(
            acoustic,
            lm[:, sequences],
            blank[:, :, sequences],
            labels[:, sequences],
            batch.frame_lengths,
            lengths[:, sequences],
            lm_scale=lm_scale,
            blank_norm=decoder.blank_norm,
        )

    if decoder.decoding_alpha == decoder.lm_scale:  # one product for all
        both = nll(slice(None), decoder.lm_scale)
        transcript_nll, scores = both[:, 0], -both[:, 1:]
    else:
        transcript_nll = nll(slice(0, 1), decoder.lm_scale)[:, 0]
        scores = -nll(slice(1, None), decoder.decoding_alpha)
    chosen = lm[:, :, :-1].gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    inside = torch.arange(labels.shape[2], device=labels.device) < lengths.unsqueeze(-1)
    lm_sums = chosen.masked_fill(~inside, 0.0).sum(dim=-1)
    if decoder.beta:  # 0 times -inf would be NaN
        scores = scores + decoder.beta * lm_sums[:, 1:]
    scores = scores + decoder.label_bonus * nbest.lengths
    return SequenceScores(transcript_nll, scores, {"ilm": -lm_sums[:, 0]})


def sequence_blank_logits(
    decoder: "FactorizedTransducerDecoder", encoder_out: Tensor, history: Tensor
) -> Tensor:
    """The joiner's part of the blank logits, (B, T, S, U+1), of histories (B, S, U+1).

    It depends on the last label alone, and an utterance's hypotheses have nearly the same labels:
    the joiner's tensor is (B, T, K, J) instead of (B, T, S (U+1), J).
    """
    rows, indices = zip(*(row.unique(return_inverse=True) for row in history.cpu()))
    distinct = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(history.device)
    joined = decoder.blank.join(
        decoder.blank.project(encoder_out).unsqueeze(2),
        decoder.blank.predict(distinct).unsqueeze(1),
    )  # (B, T, K)
    index = torch.stack(indices).to(history.device).flatten(1).unsqueeze(1)
    chosen = joined.gather(2, index.expand(-1, joined.shape[1], -1))
    return chosen.unflatten(2, history.shape[1:])


def rnnt_scores(model: torch.nn.Module, batch: "Lattice", nbest: NBest) -> SequenceScores:
    """Scores of an RNN-T with ESPnet's decoder and joint network."""
    tokens, lengths = _with_transcript(batch, nbest)
    model.decoder.set_device(tokens.device)
    history = pad(tokens.flatten(0, 1), (1, 0), value=model.blank_id)
    decoder_out = model.decoder(history).unflatten(0, tokens.shape[:2])  # (B, S, U+1, Dd)
    each = []
    for s in range(tokens.shape[1]):
        longest = int(lengths[:, s].max())
        each.append(
            joint_nll(
                model.joint_network,
                batch.encoder_out,
                decoder_out[:, s, : longest + 1],
                tokens[:, s, :longest],
                batch.frame_lengths,
                lengths[:, s],
                model.blank_id,
            )
        )
    both = torch.stack(each, dim=1)
    return SequenceScores(both[:, 0], -both[:, 1:], {})


def _with_transcript(batch: "Lattice", nbest: NBest) -> tuple[Tensor, Tensor]:
    """Token ids (B, S, U) padded with 1, lengths (B, S); the transcript, then the hypotheses."""
    longest = max(batch.text.shape[1], nbest.tokens.shape[2])
    transcript, hypotheses = (
        pad(tokens, (0, longest - tokens.shape[-1]), value=1)
        for tokens in (batch.text, nbest.tokens)
    )
    tokens = torch.cat([transcript.unsqueeze(1), hypotheses], dim=1)
    return tokens, torch.cat([batch.text_lengths.unsqueeze(1), nbest.lengths], dim=1)
