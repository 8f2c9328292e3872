"""Options of decoding with a speech LLM."""

import argparse
from dataclasses import dataclass
from typing import Optional

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.languages import add_language_options
from espnet_llm_plugin.speech_llm.guards import RepetitionGuard
from espnet_llm_plugin.speech_llm.hypothesis import END_DETECTION, SearchWeights
from espnet_llm_plugin.speech_llm.long_form import METHODS, LongForm


@dataclass(frozen=True)
class SpeechLLMOptions:
    """How a speech LLM is searched.

    Attributes:
        weights: Of the scorers.
        beam_size: Hypotheses of an utterance.
        nbest: Length of the result.
        batch_size: Segments of long audio searched together.
        ctc_top_k: Labels that the CTC keeps of an utterance; None: all.
        ctc_compression: Threshold above which equal neighbouring CTC frames are one; None: off.
        maxlenratio, minlenratio, max_tokens_per_second: See
            :func:`~espnet_llm_plugin.speech_llm.guards.length_limits`.
        guard: Against token loops.
        end_detection: See :class:`~espnet_llm_plugin.speech_llm.search.LabelSearch`.
        long_form: How long audio is cut.
    """

    weights: SearchWeights = SearchWeights()
    beam_size: int = 4
    nbest: int = 1
    batch_size: int = 1
    ctc_top_k: Optional[int] = None
    ctc_compression: Optional[float] = None
    maxlenratio: float = 0.0
    minlenratio: float = 0.0
    max_tokens_per_second: float = 20.0
    guard: RepetitionGuard = RepetitionGuard()
    end_detection: str = "espnet"
    long_form: LongForm = LongForm()


def add_speech_llm_options(parser: argparse.ArgumentParser, weights: bool = True) -> None:
    """What our search of a speech LLM has beside ESPnet's options; with or without weights.

    ESPnet's --ctc_weight, --lm_weight, --penalty, --maxlenratio, --minlenratio, --beam_size,
    --nbest and --normalize_length keep their names and meaning.
    """
    group = parser.add_argument_group("Speech LLM (speech_llm)")
    if weights:
        _add_weights(group)
    group.add_argument(
        "--ctc_top_k",
        type=int,
        default=10000,
        help="Labels of an utterance that the CTC keeps, by their highest posterior; 0: all",
    )
    group.add_argument(
        "--ctc_compression",
        type=float,
        default=0.0,
        help="Neighbouring CTC frames with the same best label, of at least this probability, are "
        "one for the prefix scores; 0: off",
    )
    group.add_argument(
        "--max_tokens_per_second",
        type=float,
        default=20.0,
        help="Longest output for the audio's duration; 0: no limit but --maxlenratio",
    )
    group.add_argument(
        "--max_repeats",
        type=int,
        default=5,
        help="How often tokens may repeat themselves in a row, at any length up to "
        "--max_repeat_ngram; 0: as often as they like",
    )
    group.add_argument(
        "--max_repeat_ngram", type=int, default=8, help="Longest repetition looked for"
    )
    group.add_argument(
        "--end_detection",
        choices=END_DETECTION,
        default="espnet",
        help="When an utterance is done: ESPnet's criterion, or that of transformers' generate",
    )
    group.add_argument(
        "--long_form",
        choices=METHODS,
        default="off",
        help="Cut audio longer than --max_segment_seconds: where it is quietest, or in CTC blanks",
    )
    group.add_argument(
        "--max_segment_seconds", type=float, default=30.0, help="Longest piece with --long_form"
    )
    group.add_argument(
        "--segment_overlap",
        type=float,
        default=1.0,
        help="Seconds beyond each cut that the encoder sees",
    )
    add_language_options(parser)


def _add_weights(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--textlm_weight",
        type=float,
        default=0.0,
        help="Weight of the same LLM without audio; below 0 it is subtracted",
    )
    group.add_argument(
        "--length_norm",
        type=float,
        help="Rank hypotheses by score / length**length_norm (default: 0, or 1 with "
        "--normalize_length true)",
    )


def speech_llm_options(
    args: argparse.Namespace, penalty: Optional[float], has_lm: bool
) -> SpeechLLMOptions:
    """What the options of a decoding command ask for.

    Args:
        args: Parsed options.
        penalty: Bonus of a token, from either of its two names.
        has_lm: Whether there is an external LM; without one ``--lm_weight`` has no meaning.

    Raises:
        UserError: A value out of its range.
    """
    if args.ctc_top_k < 0:
        raise UserError(f"--ctc_top_k {args.ctc_top_k}: expected a number of labels, or 0 for all")
    if not 0.0 <= args.ctc_compression <= 1.0:
        raise UserError(
            f"--ctc_compression {args.ctc_compression}: expected a probability, or 0 for off"
        )
    length_norm = args.length_norm
    if length_norm is None:
        length_norm = 1.0 if args.normalize_length else 0.0
    elif args.normalize_length and length_norm != 1.0:
        raise UserError(
            f"--length_norm {length_norm} and --normalize_length true, which is --length_norm 1: "
            "give one"
        )
    return SpeechLLMOptions(
        weights=SearchWeights(
            ctc_weight=args.ctc_weight,
            textlm_weight=args.textlm_weight,
            lm_weight=args.lm_weight if has_lm else 0.0,
            penalty=penalty or 0.0,
            length_norm=length_norm,
        ),
        beam_size=args.beam_size,
        nbest=args.nbest,
        batch_size=args.batch_size,
        ctc_top_k=args.ctc_top_k or None,
        ctc_compression=args.ctc_compression or None,
        maxlenratio=args.maxlenratio,
        minlenratio=args.minlenratio,
        max_tokens_per_second=args.max_tokens_per_second,
        guard=RepetitionGuard(args.max_repeats, args.max_repeat_ngram),
        end_detection=args.end_detection,
        long_form=LongForm(args.long_form, args.max_segment_seconds, args.segment_overlap),
    )
