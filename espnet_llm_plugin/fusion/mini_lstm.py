"""The internal LM of an attention decoder whose encoder output a small trained LSTM stands in for.

With zeros in place of the encoder output (``attention_ilm.py``) a decoder is asked something that
it never saw in training. The mini-LSTM [arXiv 2104.05544; used in 2607.05612] gives it
a plausible context for each label instead: it reads the labels so far, and is trained on the
training transcripts, by the cross-entropy of the decoder's own output, while the decoder is frozen.

The published decoders are LSTMs with one attention, whose context vector is replaced. A Transformer
decoder has one in each layer, and all of them read one memory, so here the memory is replaced:
before label u it is the single frame ``m_u = A h_u + a``, ``h_u = LSTM(embedding(y_u), h_{u-1})``.
Attention over one frame has the weight 1, so a layer's context is its own, trained
``W_o (W_v m_u + b_v) + b_o``, linear in ``m_u``. ``m_u = 0`` is the zero-context estimate exactly,
and with ``A = 0, a = 0`` training begins there.

B sequences, L tokens, N prefixes, V tokens of the list, D encoder width, E embedding, H LSTM.
"""

from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

import torch
from espnet.nets.pytorch_backend.transformer.mask import subsequent_mask
from espnet.nets.scorer_interface import BatchScorerInterface
from torch import Tensor

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.attention_ilm import attention_decoder

HIDDEN = 50  # H of arXiv 2104.05544
LSTMState = tuple[Tensor, Tensor]  # hidden and cell (1, N, H)


class MiniLSTM(torch.nn.Module):
    """Label embeddings to frames that stand in for an encoder's output.

    Args:
        embed_size: E.
        encoder_size: D.
        hidden_size: H.
    """

    def __init__(self, embed_size: int, encoder_size: int, hidden_size: int = HIDDEN):
        super().__init__()
        self.lstm = torch.nn.LSTM(embed_size, hidden_size, batch_first=True)
        self.output = torch.nn.Linear(hidden_size, encoder_size)
        torch.nn.init.zeros_(self.output.weight)
        torch.nn.init.zeros_(self.output.bias)

    def forward(
        self, embedded: Tensor, state: Optional[LSTMState] = None
    ) -> tuple[Tensor, LSTMState]:
        """Frames (B, L, D) of embeddings (B, L, E) that follow ``state``, and the new state."""
        hidden, state = self.lstm(embedded, state)
        return self.output(hidden), state


class MiniLSTMILM(BatchScorerInterface):
    """A Transformer decoder of ESPnet that reads a mini-LSTM instead of an encoder.

    Log-probs of all V tokens, as those of
    :class:`~espnet_llm_plugin.fusion.attention_ilm.ZeroContextILM`.

    Args:
        decoder: ``model.decoder`` of an attention model, in evaluation mode; it is not changed.
        mini_lstm: The same D and E.

    Raises:
        UserError: Another kind of decoder.
    """

    def __init__(self, decoder: torch.nn.Module, mini_lstm: MiniLSTM):
        _check_decoder(decoder)
        weight = next(decoder.parameters())
        self.decoder = decoder
        self.mini_lstm = mini_lstm.to(device=weight.device, dtype=weight.dtype)
        for layer in decoder.decoders:
            # takes the last row of a mask for all rows
            layer.src_attn.use_flash_attn = False

    @classmethod
    def new(cls, model: torch.nn.Module, hidden_size: int = HIDDEN) -> "MiniLSTMILM":
        """Untrained, for a trained ESPnet model: equal to the zero-context estimate.

        Raises:
            UserError: A model without attention decoder, or with another kind than Transformer.
        """
        decoder = attention_decoder(model, "mini_lstm")
        _check_decoder(decoder)
        embed_size = decoder.embed[0].embedding_dim
        return cls(decoder, MiniLSTM(embed_size, model.encoder.output_size(), hidden_size))

    @classmethod
    def load(cls, path: Union[str, Path], model: torch.nn.Module) -> "MiniLSTMILM":
        """What :meth:`save` has written for ``model``.

        Raises:
            UserError: The file is another one, or is of another model.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            weights, mark = content["mini_lstm"], content["decoder"]
            hidden_size = weights["lstm.weight_hh_l0"].size(1)
        except Exception as error:  # torch.load raises many kinds
            raise UserError(
                f"{path} is not a mini-LSTM as `python -m espnet_llm_plugin.bin.train_ilm` writes "
                f"it ({error})"
            ) from None
        ilm = cls.new(model, hidden_size)
        own = _mark(ilm.decoder)
        if mark.shape != own.shape or not torch.equal(mark.to(own.dtype), own):
            raise UserError(
                f"the mini-LSTM {path} was trained with another checkpoint or model than the "
                "given one: it fits one decoder only. Train it again by `python -m "
                "espnet_llm_plugin.bin.train_ilm`"
            )
        ilm.mini_lstm.load_state_dict(weights)
        ilm.mini_lstm.eval()
        return ilm

    def save(self, path: Union[str, Path], training: Optional[Mapping[str, Any]] = None) -> None:
        """Write the mini-LSTM's tensors, what recognises its decoder, and notes of the training."""
        weights = {name: tensor.cpu() for name, tensor in self.mini_lstm.state_dict().items()}
        content = {"mini_lstm": weights, "decoder": _mark(self.decoder), "training": training or {}}
        with atomic_write(path, "wb") as stream:
            torch.save(content, stream)

    def __call__(self, ids: Tensor, hidden: None = None) -> tuple[Tensor, None]:
        """Logits of whole sequences.

        Args:
            ids: Token ids (B, L) beginning with sos; padding is at the right.
            hidden: Unused.

        Returns:
            Logits (B, L, V) and None.
        """
        decoder = self.decoder
        memory, _ = self.mini_lstm(decoder.embed[0](ids))
        causal = subsequent_mask(ids.size(1), device=ids.device)[None]
        x, *_ = decoder.decoders(decoder.embed(ids), causal, memory, _own_frame(memory))
        return decoder.output_layer(decoder.after_norm(x) if decoder.normalize_before else x), None

    def init_state(self, x: Any) -> None:
        """State of the empty prefix."""
        return None

    def score(self, y: Tensor, state: Any, x: Any) -> tuple[Tensor, Any]:
        """Log-probs (V,) of the token after prefix ``y`` (L,), and its state; ``x`` is not used."""
        rows, states = self.batch_score(y[None], [state], None)
        return rows[0], states[0]

    @torch.no_grad()
    def batch_score(
        self, ys: Tensor, states: Sequence[Optional[Any]], xs: Any
    ) -> tuple[Tensor, list]:
        """As :meth:`score` for N prefixes (N, L).

        A state has the LSTM's hidden and cell (H each) and the decoder's caches (L, D) by layer.
        """
        before = caches = None
        if states[0] is not None:
            hiddens, cells, caches = zip(*states)
            before = torch.stack(hiddens)[None], torch.stack(cells)[None]
            caches = [torch.stack(layer) for layer in zip(*caches)]
        new = ys if before is None else ys[:, -1:]
        memory, (hidden, cell) = self.mini_lstm(self.decoder.embed[0](new), before)
        log_probs, caches = self.decoder.forward_one_step(
            ys,
            subsequent_mask(ys.size(1), device=ys.device)[None],
            memory,
            _own_frame(memory),
            cache=caches,
        )
        return log_probs, list(zip(hidden[0], cell[0], zip(*caches)))


def _own_frame(memory: Tensor) -> Tensor:
    """Mask (1, L, L): a query sees the frame of its own place."""
    return torch.eye(memory.size(1), dtype=torch.bool, device=memory.device)[None]


def _mark(decoder: torch.nn.Module) -> Tensor:
    """V numbers that no two checkpoints share: each step of training changes them all."""
    return decoder.output_layer.bias.detach().cpu().clone()


def _check_decoder(decoder: torch.nn.Module) -> None:
    from espnet2.asr.decoder.transformer_decoder import BaseTransformerDecoder

    if (
        not isinstance(decoder, BaseTransformerDecoder)
        or not isinstance(decoder.embed[0], torch.nn.Embedding)
        or decoder.output_layer is None
    ):
        raise UserError(
            f"--ilm mini_lstm is for the Transformer decoders of ESPnet (decoder: transformer, "
            f"lightweight_conv, ...); this model has a {type(decoder).__name__}: use --ilm "
            "zero_context"
        )
