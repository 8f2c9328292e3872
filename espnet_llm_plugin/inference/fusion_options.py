"""Options of combining a CTC model or a transducer with a language model and a prior."""

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.ctc_beam import RECOMBINATIONS
from espnet_llm_plugin.fusion.delayed import (
    POLICIES,
    DelayedFusion,
    Fusion,
    LabelPrefixes,
    WordPrefixes,
)
from espnet_llm_plugin.fusion.words import Spelling

if TYPE_CHECKING:
    from espnet_llm_plugin.inference.loading import LoadedASR

METHODS = ("label", "delayed", "rescore")
ENDS = ("eos", "newline", "none")


@dataclass(frozen=True)
class FusionOptions:
    """How an LM is combined with a search.

    Attributes:
        method: ``label``: at every label; ``delayed``: now and then, by ``policy``; ``rescore``:
            at the end, for the hypotheses that are left.
        policy: Of delayed fusion.
        interval: Encoder frames, of the policy ``every_n_frames``.
        llm: LLM with its own vocabulary, instead of an LM over the ASR tokens.
        llm_dtype: Of ``llm``.
        end: What ends a sentence; None: ``eos``, but nothing in label-wise fusion with a
            transducer, as in ESPnet.
        temperature: Of the LM.
        lowercase: Whether ``llm`` reads the words in lower case.
        ngram: LM over the ASR tokens: stands in for ``llm`` until that has read a word; without
            ``llm`` it is the LM.
        prior: Of the CTC labels or frames.
        recombination: Of CTC.
        top_labels: Of CTC: labels looked at in a frame; None: all that matter.
    """

    method: str = "label"
    policy: str = "every_n_frames"
    interval: int = 10
    llm: Optional[str] = None
    llm_dtype: str = "float32"
    end: Optional[str] = None
    temperature: float = 1.0
    lowercase: bool = False
    ngram: Any = field(default=None, compare=False)
    prior: Any = field(default=None, compare=False)
    recombination: str = "sum"
    top_labels: Optional[int] = None

    @property
    def has_lm(self) -> bool:
        """Whether there is one here."""
        return self.llm is not None or self.ngram is not None


LABEL_WISE = FusionOptions()


def add_fusion_options(parser: argparse.ArgumentParser, weights: bool = True) -> None:
    """Add them; ``weights``: also that of the prior, which is tuned otherwise."""
    from espnet2.utils.types import str2bool

    group = parser.add_argument_group("Language model and prior of a CTC model or transducer")
    group.add_argument(
        "--fusion",
        choices=METHODS,
        default="label",
        help="When the LM is asked: at every label, now and then (--fusion_policy), or for the "
        "hypotheses that are left at the end",
    )
    group.add_argument(
        "--fusion_llm",
        help="LLM (directory or hub id) that scores whole words in its own vocabulary, with "
        "--lm_weight, instead of an LM over the ASR tokens; for --fusion delayed or rescore, and "
        "for --search espnet",
    )
    group.add_argument(
        "--fusion_llm_dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="Of --fusion_llm",
    )
    group.add_argument(
        "--fusion_policy",
        choices=[policy for policy in POLICIES if policy != "never"],
        default="every_n_frames",
        help="When --fusion delayed asks the LM: every --fusion_interval encoder frames, when the "
        "shortest hypothesis has a new word, or when any has",
    )
    group.add_argument("--fusion_interval", type=int, default=10, help="Encoder frames")
    group.add_argument(
        "--lm_eos",
        choices=ENDS,
        help="End of a sentence that the LM scores: its own symbol, a newline (--fusion_llm), or "
        "none (default: eos; none in label-wise fusion with a transducer)",
    )
    group.add_argument(
        "--lm_temperature",
        type=float,
        default=1.0,
        help="Flattens (above 1) or sharpens the LM's probabilities",
    )
    group.add_argument(
        "--lm_lowercase",
        type=str2bool,
        default=False,
        help="Lower the case of the words that --fusion_llm reads",
    )
    group.add_argument(
        "--fusion_ngram",
        help="N-gram over the ASR tokens (of estimate_ngram, ARPA, or kenlm's): stands in for "
        "--fusion_llm, with its weight, until that has read a word; without --fusion_llm it is the "
        "LM",
    )
    group.add_argument(
        "--prior_file", help="Prior of a CTC model, as estimate_prior writes it; it is subtracted"
    )
    if weights:
        group.add_argument("--prior_weight", type=float, default=0.0, help="Weight of --prior_file")
    group.add_argument(
        "--recombination",
        choices=sorted(RECOMBINATIONS),
        default="sum",
        help="How the probabilities of the alignments of one hypothesis of CTC are combined",
    )
    group.add_argument(
        "--top_labels",
        type=int,
        default=0,
        help="Look only at so many of the best labels of a CTC frame; 0: at all that may survive",
    )


def fusion_options(args: argparse.Namespace, asr: "LoadedASR") -> FusionOptions:
    """What the options of a command ask for.

    Raises:
        UserError: Options without a meaning for the model or for each other.
    """
    has_lm = has_external_lm(args)
    delayed = args.fusion == "delayed"
    given = {
        "fusion_llm": (not args.lm_train_config, "--lm_train_config is another LM: give one"),
        "fusion_llm_dtype": (args.fusion_llm, "it needs --fusion_llm"),
        "fusion": (
            has_lm,
            "it needs an LM: add --fusion_llm, --fusion_ngram, or --lm_train_config and --lm_file",
        ),
        "fusion_policy": (delayed, "it needs --fusion delayed"),
        "fusion_interval": (
            delayed and args.fusion_policy == "every_n_frames",
            "it needs --fusion delayed and --fusion_policy every_n_frames",
        ),
        "lm_eos": (has_lm, "it needs an LM"),
        "lm_temperature": (has_lm, "it needs an LM"),
        "fusion_ngram": (
            not (args.lm_train_config or getattr(args, "ngram_file", None)),
            "there is another LM over the ASR tokens: give one",
        ),
        "lm_lowercase": (args.fusion_llm, "it needs --fusion_llm: other LMs read ASR tokens"),
        "prior_file": (asr.is_ctc, "priors are those of CTC models; of a transducer subtract the "
                       "internal LM by --ilm_weight"),
        "recombination": (asr.is_ctc, "it belongs to CTC, and this model is a transducer"),
        "top_labels": (asr.is_ctc, "it belongs to CTC, and this model is a transducer"),
    }  # fmt: skip
    for name in used_options(args):
        meant, why = given[name]
        if not meant:
            raise UserError(f"--{name} {getattr(args, name)}: {why}")
    if args.fusion_llm and args.fusion == "label":
        raise UserError(
            f"--fusion_llm {args.fusion_llm}: an LLM with its own vocabulary cannot score single "
            "labels; add --fusion delayed or --fusion rescore"
        )
    if args.lm_eos == "newline" and not args.fusion_llm:
        raise UserError("--lm_eos newline: an LM over ASR tokens knows no newline; use eos or none")
    if getattr(args, "prior_weight", 0.0) and not args.prior_file:
        raise UserError(f"--prior_weight {args.prior_weight}: it needs --prior_file")
    if args.lm_temperature <= 0:
        raise UserError(f"--lm_temperature {args.lm_temperature}: it must be above 0")
    if args.top_labels < 0:
        raise UserError(f"--top_labels {args.top_labels}: expected a number of labels, or 0")
    prior = ngram = None
    if args.fusion_ngram:
        from espnet_llm_plugin.fusion.ngram import load_ngram
        from espnet_llm_plugin.inference.loading import require_file

        require_file(args.fusion_ngram, "--fusion_ngram", "n-gram LM over the model's tokens")
        ngram = load_ngram(args.fusion_ngram, asr.model.token_list)
    if args.prior_file:
        from espnet_llm_plugin.fusion.prior import load_prior

        prior = load_prior(args.prior_file, asr.model.token_list)
    return FusionOptions(
        method=args.fusion,
        policy=args.fusion_policy,
        interval=args.fusion_interval,
        llm=args.fusion_llm,
        llm_dtype=args.fusion_llm_dtype,
        end=args.lm_eos,
        temperature=args.lm_temperature,
        lowercase=args.lm_lowercase,
        ngram=ngram,
        prior=prior,
        recombination=args.recombination,
        top_labels=args.top_labels or None,
    )


def has_external_lm(args: argparse.Namespace) -> bool:
    """Whether options of a tuning or decoding command name an LM beside the model's own."""
    return bool(args.lm_train_config or args.fusion_llm or args.fusion_ngram)


def used_options(args: argparse.Namespace) -> list[str]:
    """Those with another value than their default, the weight of the prior aside."""
    parser = argparse.ArgumentParser()
    add_fusion_options(parser, weights=False)
    names = [action.dest for action in parser._actions if action.dest != "help"]
    return [name for name in names if getattr(args, name) != parser.get_default(name)]


def build_fusion(
    asr: "LoadedASR", options: FusionOptions, has_external: bool, device: Any
) -> Optional[Fusion]:
    """The fusion of a search; None: label-wise, without the end of the sentence.

    Args:
        asr: The model.
        options: See there.
        has_external: Whether there is an LM over the ASR tokens.
        device: Where an LLM runs.
    """
    has_external = has_external or options.ngram is not None
    if options.method == "label":
        default = "eos" if asr.is_ctc else "none"
        ends = has_external and (options.end or default) != "none"
        if asr.is_ctc or ends:
            return Fusion(options.prior, end=ends)
        return None
    policy = "never" if options.method == "rescore" else options.policy
    delayed = dict(policy=policy, interval=options.interval, prior=options.prior)
    token_type = asr.text.token_type
    if options.llm is None:
        words = policy in ("shortest", "every_word")
        spelling = Spelling(asr.model.token_list, token_type, asr.text.text) if words else None
        ends = options.end != "none"
        whole = policy == "every_word"
        return DelayedFusion(lambda tree: LabelPrefixes(tree, spelling, whole, ends), **delayed)
    from espnet_llm_plugin.fusion.word_lm import WordLM

    spelling = Spelling(asr.model.token_list, token_type, asr.text.text)
    llm = WordLM(
        options.llm,
        end=options.end or "eos",
        lowercase=options.lowercase,
        temperature=options.temperature,
        device=device,
        dtype=options.llm_dtype,
    )
    return DelayedFusion(
        lambda tree: WordPrefixes(tree, spelling, llm),
        llm=llm,
        stand_in=options.ngram is not None,
        **delayed,
    )
