"""The plots of a speech LLM's diagnosis."""

from typing import Any

from espnet_llm_plugin.scoring.diagnosis_plots import Panel, bars
from espnet_llm_plugin.scoring.speech_signatures import FULL_GAP, MIN_GAP, SpeechEvidence


def speech_panels(evidence: SpeechEvidence) -> list[Panel]:
    """Panels of what was measured, to be drawn with the same evidence."""
    panels: list[Panel] = []
    audio = evidence.audio
    if audio is not None and audio.gap is not None:
        panels.append(shuffled_audio)
    if audio is not None and audio.attention:
        panels.append(attention)
    if audio is not None and audio.ctc is not None and audio.ctc.disagreement is not None:
        panels.append(agreement)
    if evidence.alone is not None:
        panels.append(alone_and_joint)
    return panels


def shuffled_audio(axes: Any, evidence: SpeechEvidence) -> None:
    """What a transcript costs with its own audio and with another's."""
    audio = evidence.audio
    bars(axes, ["its own\naudio", "another's\naudio"], [audio.nll, audio.other_nll], "{:.2f}")
    for gap, style in ((MIN_GAP, ":"), (FULL_GAP, "--")):
        axes.axhline(audio.nll + gap, color="gray", linestyle=style, label=f"own + {gap:g}")
    axes.set_ylim(0, 1.3 * max(audio.nll + FULL_GAP, audio.other_nll))  # room for the legend
    axes.set_ylabel("nats per token")
    axes.set_title("Transcripts with shuffled audio", loc="left")
    axes.legend(frameon=False, ncols=2, loc="upper left")


def attention(axes: Any, evidence: SpeechEvidence) -> None:
    """Share of the text's attention that the audio gets, by layer."""
    audio = evidence.audio
    layers = range(1, len(audio.attention) + 1)
    axes.plot(layers, [100 * share for share in audio.attention], marker=".", label="measured")
    axes.axhline(
        100 * audio.uniform_attention, color="gray", linestyle=":", label="all positions equal"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0, 105)
    axes.set_xlabel("layer of the LLM")
    axes.set_ylabel("% of the attention")
    axes.set_title("Attention of the text to the audio", loc="left")
    axes.legend(frameon=False)


def agreement(axes: Any, evidence: SpeechEvidence) -> None:
    """Word errors of greedy CTC and of the hypotheses, and between the two."""
    ctc = evidence.audio.ctc
    names = ["greedy CTC", "hypotheses", "between\nthe two"]
    bars(axes, names, [ctc.greedy_wer, ctc.hypothesis_wer, ctc.disagreement], "{:.1f}")
    axes.set_ylabel("% of the words")
    axes.set_title("Agreement with CTC", loc="left")


def alone_and_joint(axes: Any, evidence: SpeechEvidence) -> None:
    """Kinds of errors of the LLM alone and of this decoding, on top of each other."""
    totals = (evidence.alone.total.counts, evidence.total.counts)
    below = [0.0, 0.0]
    for kind in ("deletions", "insertions", "substitutions"):
        rates = [100 * getattr(counts, kind) / counts.words for counts in totals]
        axes.bar(range(2), rates, 0.6, bottom=below, label=kind)
        below = [first + second for first, second in zip(below, rates)]
    axes.set_xticks(range(2), ["LLM alone", "this decoding"])
    axes.set_xlim(-0.6, 2.6)  # room for the legend
    axes.set_ylabel("% of the words")
    axes.set_title("The LLM alone", loc="left")
    axes.legend(frameon=False, loc="upper right")
