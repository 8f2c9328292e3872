"""Exact likelihood of a corpus under a transducer, a CTC model or a speech LLM.

A half-trained transducer can have a low training loss and useless search results, or the reverse;
the negative log-likelihood per label of the development set tells which.
B utterances, T frames, V tokens.
"""

import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence

import torch
from espnet.nets.pytorch_backend.transformer.subsampling import TooShortUttError
from torch import Tensor

from espnet_llm_plugin.data.language_codes import NAME
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.transducer.alignment import AlignmentSums, transitions
from espnet_llm_plugin.transducer.base_model import AbsTransducerModel, trim
from espnet_llm_plugin.transducer.lattice import lattice_nll
from espnet_llm_plugin.transducer.word_errors import WordErrors


@dataclass(frozen=True)
class CorpusNLL:
    """Sums over the utterances that the model can produce at all.

    Attributes:
        nll_per_label: nats; total_nll / num_labels.
        nll_per_utterance: nats.
        total_nll: nats.
        num_labels: tokens of the transcripts; under a speech LLM also their ends, which it
            predicts.
        num_utterances: utterances counted.
        num_impossible: utterances of probability zero (CTC: more labels, repetitions counted
            twice, than frames; no frames at all; a speech LLM: more than its context holds),
            left out of all else.
        alignment: of a transducer: means along the best alignments, see
            :class:`~espnet_llm_plugin.transducer.alignment.AlignmentSums`.
        internal_lm: of a transducer: word_perplexity of the texts, and their number of words.
    """

    nll_per_label: float
    nll_per_utterance: float
    total_nll: float
    num_labels: int
    num_utterances: int
    num_impossible: int
    alignment: dict[str, Optional[float]] = field(default_factory=dict)
    internal_lm: dict[str, Optional[float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def corpus_nll(
    model: torch.nn.Module, batches: Iterable[tuple[Sequence[str], Mapping[str, Tensor]]]
) -> CorpusNLL:
    """Exact -log P(text | speech), summed over all alignments, of a corpus.

    Args:
        model: a transducer of this package, with its own predictor at its training scale, a
            speech LLM of this package, or an ESPnet model with a CTC branch (whose likelihood it
            is then). Put in evaluation mode.
        batches: utterance names and ``speech, speech_lengths, text, text_lengths``; for a speech
            LLM ``lang`` and ``lang_lengths`` if the languages are given.

    Raises:
        UserError: no utterances, no labels, or a model that has neither.
    """
    is_transducer = isinstance(model, AbsTransducerModel)
    is_speech_llm = not is_transducer and hasattr(model, "utterance_nll")
    if not (is_transducer or is_speech_llm or getattr(model, "ctc", None)):
        raise UserError(
            f"cannot evaluate a {type(model).__name__}: expected model transducer, "
            "factorized_transducer or speech_llm, or an ESPnet model with a CTC branch "
            "(ctc_weight > 0)"
        )
    model.eval()
    device = next(model.parameters()).device
    total, labels, utterances, impossible = 0.0, 0, 0, 0
    sums = AlignmentSums()
    for names, batch in batches:
        inputs = [
            batch[key].to(device) for key in ("speech", "speech_lengths", "text", "text_lengths")
        ]
        if is_transducer:
            values = _nll_along(model, sums, *inputs)
        elif is_speech_llm:
            languages = {key: batch[key] for key in (NAME, f"{NAME}_lengths") if key in batch}
            values = _speech_llm_nll(model, *inputs, **languages)
        else:
            values = _ctc_nll(model, *inputs)
        counts = (batch["text_lengths"] + int(is_speech_llm)).tolist()
        for name, value, count in zip(names, values.tolist(), counts):
            if math.isfinite(value):
                total, labels, utterances = total + value, labels + count, utterances + 1
            else:
                impossible += 1
                logging.warning(f"{name}: the model cannot produce its {count} labels; left out")
    if labels == 0:
        raise UserError(
            f"nothing to evaluate: {utterances} utterances with {labels} labels, and {impossible} "
            "that the model cannot produce"
        )
    further = sums.report() if is_transducer else {}
    return CorpusNLL(
        total / labels, total / utterances, total, labels, utterances, impossible, **further
    )


@torch.no_grad()
def _nll_along(
    model: AbsTransducerModel,
    sums: AlignmentSums,
    speech: Tensor,
    speech_lengths: Tensor,
    text: Tensor,
    text_lengths: Tensor,
) -> Tensor:
    """-log P(text | speech) (B,), infinite without a frame; adds best alignments to ``sums``."""
    encoder_out, frame_lengths = model.encode_frames(speech, speech_lengths)
    long_enough = frame_lengths.cpu() > 0
    values = torch.full((len(speech),), math.inf, dtype=torch.float64)
    if not long_enough.any():
        return values
    batch = trim(encoder_out, frame_lengths, text, text_lengths, long_enough)
    found = transitions(model, batch)
    nll = lattice_nll(found.blank, found.label, batch.frame_lengths, batch.text_lengths)
    values[long_enough] = nll.to(values)
    words = WordErrors(model.token_list).words
    for i, value in enumerate(nll.tolist()):
        num_frames, num_labels = int(batch.frame_lengths[i]), int(batch.text_lengths[i])
        if math.isfinite(value):
            sums.add(
                found.blank[i, :num_frames, : num_labels + 1].double().cpu().numpy(),
                found.label[i, :num_frames, :num_labels].double().cpu().numpy(),
                float(found.lm[i]),
                len(words(batch.text[i, :num_labels].tolist())),
            )
    return values


@torch.no_grad()
def _ctc_nll(
    model: Any, speech: Tensor, speech_lengths: Tensor, text: Tensor, text_lengths: Tensor
) -> Tensor:
    try:
        encoder_out, frame_lengths = model.encode(speech, speech_lengths)
    except TooShortUttError as error:  # of the longest
        logging.warning("%s", error)
        return torch.full((len(speech),), math.inf)
    if isinstance(encoder_out, tuple):
        encoder_out = encoder_out[0]
    return torch.nn.functional.ctc_loss(
        model.ctc.log_softmax(encoder_out).float().transpose(0, 1),
        text.clamp(min=0),
        frame_lengths,
        text_lengths,
        blank=0,
        reduction="none",
    )


def _speech_llm_nll(model: Any, *inputs: Tensor, **languages: Tensor) -> Tensor:
    try:
        return model.utterance_nll(*inputs, **languages)
    except UserError as error:
        logging.warning("%s", error)
        return torch.full((len(inputs[0]),), math.inf)


def read_batches(
    train_args: Any,
    data: Sequence[tuple[str, str, str]],
    key_file: Optional[str] = None,
    batch_size: int = 1,
    num_workers: int = 1,
) -> Iterable[tuple[list[str], dict[str, Tensor]]]:
    """Batches of a data set, preprocessed as in training but without augmentation.

    Args:
        train_args: the model's training configuration.
        data: ESPnet's ``path,name,type`` triples, with the names ``speech`` and ``text``.
        key_file: utterances to take; default: all.
        batch_size: with more than 1, ESPnet's features of an utterance's last frames (and what
            normalisation makes of them) depend slightly on the others' lengths.

    Raises:
        UserError: a name or a file is missing.
    """
    from espnet2.tasks.asr import ASRTask

    names = [name for _, name, _ in data]
    if sorted(names) != ["speech", "text"]:
        raise UserError(
            f"--data_path_and_name_and_type gives {', '.join(names) or 'nothing'}; expected "
            "speech and text, e.g. dump/raw/dev/wav.scp,speech,sound dump/raw/dev/text,text,text"
        )
    for path in [path for path, _, _ in data] + ([key_file] if key_file else []):
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}")
    return ASRTask.build_streaming_iterator(
        data,
        preprocess_fn=ASRTask.build_preprocess_fn(train_args, False),
        collate_fn=ASRTask.build_collate_fn(train_args, False),
        key_file=key_file,
        dtype="float32",
        batch_size=batch_size,
        num_workers=num_workers,
    )
