"""Tiny speech LLMs: a linear layer as encoder, a random LLaMA as LLM."""

import torch
from espnet2.asr.ctc import CTC

from espnet_llm_plugin.llm.native import native_token_list
from espnet_llm_plugin.speech_llm.decoder import SpeechLLMDecoder
from espnet_llm_plugin.speech_llm.model import SpeechLLMModel
from tests.speech_llm.tiny_llm import TOKENS
from tests.transducer.tiny import DIM, INPUT, LinearEncoder

__all__ = ["DIM", "INPUT"]


def token_list(llm: str, native: bool = False) -> list[str]:
    """The token list of an LLM directory of :mod:`tiny_llm`."""
    return native_token_list(llm) if native else list(TOKENS)


def decoder(llm: str, native: bool = False, seed: int = 0, **conf) -> SpeechLLMDecoder:
    """``conf`` is decoder_conf; the LLM is frozen if it does not say otherwise."""
    torch.manual_seed(seed)
    conf = {"tuning": "frozen", **conf}
    return SpeechLLMDecoder(len(token_list(llm, native)), DIM, llm=llm, **conf)


def model(
    llm: str, native: bool = False, seed: int = 0, model_conf: dict | None = None, **conf
) -> SpeechLLMModel:
    """``conf`` is decoder_conf. In training mode, as ESPnet builds it."""
    tokens = token_list(llm, native)
    made = decoder(llm, native, seed, **conf)
    names = ("frontend", "specaug", "normalize", "preencoder", "postencoder")
    return SpeechLLMModel(
        vocab_size=len(tokens),
        token_list=tokens,
        encoder=LinearEncoder(),
        decoder=made,
        ctc=CTC(len(tokens), DIM),
        joint_network=None,
        **dict.fromkeys(names),
        **(model_conf or {}),
    )


def batch(frames=(9, 5, 7), texts=((3, 4, 4, 5), (6, 3), (7,)), seed=0):
    """speech, speech_lengths, text, text_lengths; text padded with -1."""
    generator = torch.Generator().manual_seed(seed)
    speech = torch.randn(len(frames), max(frames), INPUT, generator=generator)
    longest = max(map(len, texts))
    rows = [[*row, *[-1] * (longest - len(row))] for row in texts]
    text = torch.tensor(rows).reshape(len(rows), longest).long()
    return speech, torch.tensor(frames), text, torch.tensor([len(row) for row in texts])


def single(data, i: int):
    """Utterance ``i`` of a batch, without padding."""
    speech, lengths, text, text_lengths = data
    return (
        speech[i : i + 1, : lengths[i]],
        lengths[i : i + 1],
        text[i : i + 1, : text_lengths[i]],
        text_lengths[i : i + 1],
    )


def reference_logits(llm_model, decoder, audio, text) -> torch.Tensor:
    """(U + 1, V) of one utterance: transformers on ``[before; audio; after; BOS; text]``."""
    embed = llm_model.get_input_embeddings()
    ids = [*decoder.prompt.after, decoder.prompt.sos, *text]
    parts = [embed(torch.tensor(decoder.prompt.before, dtype=torch.long)), audio]
    inputs = torch.cat([*parts, embed(torch.tensor(ids))])[None]
    logits = llm_model(inputs_embeds=inputs).logits[0, -len(text) - 1 :]
    return logits[:, : len(decoder.scored)]
