"""What ``bin/evaluate_audio_use`` found out about a speech LLM, as it is kept in a file.

Whether the LLM listens to the audio or only writes likely text, whether the audio looks like text
to it, and whether a CTC layer, which cannot do without the audio, agrees.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.similarity import Alignment

NUMBERS, PICTURE = "audio_use.json", "similarity.png"  # side by side
# Nats per label of the transcript. With the CTC model of the stories corpus (WER 24) its own
# hypotheses had less than 0, transcripts with one word in 13 replaced at random 1 (5 % above 3),
# another utterance's transcript, or a loop at the end, 10 (95 % above 4).
CONTRADICTION = 3.0


@dataclass(frozen=True)
class CTCAgreement:
    """Of the CTC layer on the encoder with transcripts and hypotheses.

    Attributes:
        reference_log_prob: log P_CTC(transcript) in nats per CTC label.
        impossible: Utterances whose transcript has more labels than frames; left out of
            ``reference_log_prob`` and ``contradicted``.
        greedy_wer: Word errors of greedy CTC, per cent of the transcripts' words.
        hypothesis_wer: Word errors of the hypotheses, likewise; None without hypotheses.
        disagreement: Word errors between hypotheses and greedy CTC, likewise: where two errors
            rates are low and this one is high, the two make different errors.
        contradicted: Share of the hypotheses whose log P_CTC is lower than the transcript's by
            ``CONTRADICTION`` nats per label of the transcript or more.
    """

    reference_log_prob: Optional[float]
    impossible: int
    greedy_wer: float
    hypothesis_wer: Optional[float] = None
    disagreement: Optional[float] = None
    contradicted: Optional[float] = None


@dataclass(frozen=True)
class AudioUse:
    """Means over a set; None where a model has no such thing.

    Attributes:
        utterances: Measured.
        skipped: Utterances that the model cannot score (no frame, or beyond the context).
        nll: -log P(text and EOS | its audio), nats per token.
        other_nll: The same with another utterance's audio; None for a single utterance.
        indifferent: Share of the utterances that another's audio makes at least as likely.
        attention: By layer: share of the text's attention that the audio gets. High is no proof:
            the first position of all draws attention whatever it is. Near zero is one.
        uniform_attention: That share if all positions were given the same.
        gates: Of cross-attention, by layer; 0: the audio is not let in.
        alignment: Rank correlation of tokens and the audio positions most similar to them.
        tokens_per_embedding: Text tokens (EOS not counted) over audio embeddings.
        crowded: Share of the utterances with more tokens than audio embeddings.
        ctc: None without CTC layer.
        picture: The utterance in the picture of similarities.
    """

    utterances: int
    skipped: int
    nll: float
    other_nll: Optional[float]
    indifferent: Optional[float]
    attention: Optional[list[float]]
    uniform_attention: Optional[float]
    gates: Optional[list[float]]
    alignment: Optional[Alignment]
    tokens_per_embedding: float
    crowded: float
    ctc: Optional[CTCAgreement]
    picture: Optional[str]

    @property
    def gap(self) -> Optional[float]:
        """Nats per token by which another's audio is worse: near 0, the audio is ignored."""
        return None if self.other_nll is None else self.other_nll - self.nll

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def read_audio_use(path: str) -> AudioUse:
    """Read ``audio_use.json``.

    Raises:
        UserError: There is no such file, or it is something else.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; bin/evaluate_audio_use writes it")
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, kind in (("alignment", Alignment), ("ctc", CTCAgreement)):
            table[name] = None if table[name] is None else kind(**table[name])
        return AudioUse(**table)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not written by bin/evaluate_audio_use ({error!r})") from error
