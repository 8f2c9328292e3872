"""The whole job of ``adapt_vocabulary``: load, adapt, measure, report, write."""

import json
from pathlib import Path
from typing import Any, Optional, Union

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import perplexity
from espnet_llm_plugin.llm.backbone import load_causal_lm, quiet_transformers, resolve_llm
from espnet_llm_plugin.llm.directory import check_output_dir, save_llm, write_directory
from espnet_llm_plugin.llm.tokenizer import check_bpemodel, load_sentencepiece
from espnet_llm_plugin.llm.vocabulary import (
    Mapping,
    SubwordVocabulary,
    adapt,
    map_tokens,
    special_rows,
)
from espnet_llm_plugin.token_list import (
    BLANK,
    SOS_EOS,
    UNK,
    guess_token_type,
    read_token_list,
)

REPORT = "vocabulary_report"


def adapt_llm(
    llm: str,
    token_list: Union[str, Path],
    output_dir: Union[str, Path],
    *,
    bpemodel: Optional[Union[str, Path]] = None,
    token_type: Optional[str] = None,
    oov_init: str = "mean",
    exact_match: bool = True,
    seed: int = 0,
    text: Optional[Union[str, Path]] = None,
    text_has_ids: bool = False,
    max_text_lines: Optional[int] = None,
) -> str:
    """Write ``output_dir``, an LLM over ``token_list``; it appears complete or not at all.

    Args: as the options of ``python -m espnet_llm_plugin.bin.adapt_vocabulary``.

    Returns:
        The report as text; also saved with its figures as JSON.

    Raises:
        UserError: Whatever is wrong with the LLM, the token list, the sentencepiece model, the
            text or the output directory.
    """
    # 1. Everything that can be wrong without loading the LLM
    check_output_dir(output_dir)
    tokens = read_token_list(token_list)
    if bpemodel is not None:
        check_bpemodel(load_sentencepiece(bpemodel), tokens, str(bpemodel))
    kind = token_type or guess_token_type(tokens)
    sentences = None
    if text is not None:
        sentences = perplexity.read_text(text, has_ids=text_has_ids, max_lines=max_text_lines)
        encode = perplexity.asr_tokenizer(tokens, kind, bpemodel)
    directory = resolve_llm(llm)
    tokenizer = load_tokenizer(directory)
    model = load_causal_lm(directory, dtype="auto")

    # 2. Adapt, and measure the same sentences before and after
    report: dict[str, Any] = {
        "llm": str(llm),
        "token_list": str(token_list),
        "token_type": kind,
        "oov_init": oov_init,
        "exact_match": exact_match,
        "vocab_size": len(tokens),
    }
    bos, _, _ = special_rows(tokenizer, model.config)
    if sentences is not None:
        with quiet_transformers():  # it warns of sentences longer than the model
            native = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in sentences]
        adapted = [encode(s) for s in sentences]
        kept = _within_positions(model.config, native, adapted)
        words = sum(len(sentences[i].split()) for i in kept)
        report["sentences"] = len(kept)
        report["sentences_too_long"] = len(sentences) - len(kept)
        before = perplexity.score_text(model, [native[i] for i in kept], words, bos=bos)
    mapping = adapt(
        model,
        tokenizer,
        tokens,
        oov_init=oov_init,
        exact_match=exact_match,
        token_type=kind,
        seed=seed,
    )
    report.update(mapping.statistics())
    report["exact_match_share_lower_case"] = _lower_case_share(tokenizer, mapping, kind)
    if sentences is not None:
        ids = [adapted[i] for i in kept]
        sos = tokens.index(SOS_EOS)
        after = perplexity.score_text(model, ids, words, bos=sos, blank=0)
        unk = tokens.index(UNK)
        report.update(
            words=words,
            tokens_before=before.tokens,
            tokens_after=after.tokens,
            unknown_tokens=sum(row.count(unk) for row in ids),
            word_perplexity_before=before.word_perplexity,
            word_perplexity_after=after.word_perplexity,
        )

    # 3. Write
    lines = _as_text(report)

    def write(partial: Path) -> None:
        report["tokenizer"] = save_llm(model, partial, tokens, bpemodel, final_dir=output_dir)
        lines.append(report["tokenizer"])
        (partial / f"{REPORT}.json").write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (partial / f"{REPORT}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    with quiet_transformers():
        write_directory(output_dir, write)
    return "\n".join([*lines, f"wrote {output_dir}"]) + "\n"


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of an LLM directory.

    Raises:
        UserError: None there, or unreadable.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"LLM {directory} has no usable tokenizer ({type(error).__name__}: {reason}); expected "
            "tokenizer.json or tokenizer.model with tokenizer_config.json."
        ) from None


def _within_positions(config: Any, native: list, adapted: list) -> list[int]:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9
    both = enumerate(zip(native, adapted))
    return [i for i, (a, b) in both if max(len(a), len(b)) < limit]


def _lower_case_share(tokenizer: Any, mapping: Mapping, kind: str) -> float:
    lowered = [t if t in (BLANK, UNK, SOS_EOS) else t.lower() for t in mapping.tokens]
    again = map_tokens(lowered, SubwordVocabulary(tokenizer), token_type=kind)
    return again.statistics()["exact_match_share"]


def _as_text(report: dict[str, Any]) -> list[str]:
    lines = [
        f"LLM {report['llm']} over the {report['vocab_size']} tokens of {report['token_list']} "
        f"({report['token_type']}, oov_init {report['oov_init']})",
        f"exact matches: {report['exact_matches']} of {report['text_tokens']} text tokens "
        f"({100 * report['exact_match_share']:.1f} %)",
        f"sub-tokens per piece: {report['mean_subtokens_per_piece']:.2f} (pieces without exact "
        f"match: {report['mean_subtokens_per_unmatched_piece']:.2f})",
        f"pieces that found nothing: {len(report['not_found'])}"
        + "".join(f" {piece}" for piece in report["not_found"]),
    ]
    if report["pieces_in_bytes"]:
        lines.append(
            "pieces that the LLM writes in bytes, at least in part: "
            f"{report['pieces_in_bytes']} of {report['text_tokens']}"
        )
    if report["alike"] and report["oov_init"].endswith("mean"):
        shown = " ".join(report["alike"][:10]) + (" ..." if len(report["alike"]) > 10 else "")
        lines.append(
            f"warning: {len(report['alike'])} pieces have the row of another, since their "
            f"sub-tokens differ in order only: {shown}. Fine-tune the LLM, or give another oov_init"
        )
    if report["exact_match_share_lower_case"] > report["exact_match_share"] + 0.1:
        lines.append(
            "warning: in lower case "
            f"{100 * report['exact_match_share_lower_case']:.1f} % would match; LLMs know text in "
            "ordinary or lower case better than in capitals"
        )
    if "words" in report:
        lines += [
            f"word-level perplexity on {report['words']} words, {report['sentences']} sentences "
            f"(ends of sentences not counted, {report['sentences_too_long']} too long): before "
            f"{report['word_perplexity_before']:.1f}, after {report['word_perplexity_after']:.1f}",
            f"tokens of that text: before {report['tokens_before']}, after "
            f"{report['tokens_after']} ({report['unknown_tokens']} unknown)",
        ]
    return lines
