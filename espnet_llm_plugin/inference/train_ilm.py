"""Train a mini-LSTM, the internal LM of an attention decoder: the body of ``bin/train_ilm``."""

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from tqdm import tqdm

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.mini_lstm import MiniLSTM, MiniLSTMILM
from espnet_llm_plugin.inference.loading import load_model, require_file
from espnet_llm_plugin.inference.options import device_of
from espnet_llm_plugin.llm.perplexity import asr_tokenizer, read_text

_IGNORED = -1  # target of padding
# Logits of a batch, 4 bytes each; they, their softmax and its gradient are in memory.
_LOGITS = 40_000_000

Sentences = Sequence[Sequence[int]]


def train_ilm(args: argparse.Namespace) -> list[float]:
    """Train, write the mini-LSTM of the best epoch to ``args.output``.

    ``<output>.state`` has what a run needs to go on where it was killed, at the epoch.

    Returns:
        Perplexities of the validation text: of the zero-context estimate, then after each epoch.

    Raises:
        UserError: Bad options, model or text.
    """
    for name in ("epochs", "batch_size", "hidden_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1 is needed")
    device = device_of(args)
    for name, what in (("text", "training transcripts"), ("valid_text", "transcripts to measure")):
        require_file(getattr(args, name), f"--{name}", f"{what}, `utterance-id words ...` lines")
    model, train_args = load_model(args.asr_train_config, args.asr_model_file, device)
    torch.manual_seed(args.seed)
    ilm = MiniLSTMILM.new(model, args.hidden_size)
    ilm.decoder.requires_grad_(False)  # for good: this process does nothing else with it
    tokens = list(model.token_list)
    encode = asr_tokenizer(
        tokens, args.token_type or train_args.token_type, args.bpemodel or train_args.bpemodel
    )
    texts = [
        [encode(line) for line in read_text(path, has_ids=True)]
        for path in (args.text, args.valid_text)
    ]
    train, valid = texts
    trainer = Trainer(ilm, train, args.lr, args.batch_size, args.epochs, args.seed)
    state_file = Path(f"{args.output}.state")
    same = _identity(args)
    found = _read_state(state_file, same)
    if found is None:
        history, best = [perplexity(ilm, valid, args.batch_size)], _copy(ilm.mini_lstm)
        logging.info(
            f"{len(train)} sentences to train on, {len(valid)} to measure; perplexity of the "
            f"zero-context estimate {history[0]:.2f}"
        )
    else:
        trainer.load_state_dict(found["trainer"])
        history, best = found["history"], found["best"]
        logging.info(f"{state_file}: going on after epoch {trainer.epoch} of {args.epochs}")
    while trainer.epoch < args.epochs:
        loss = trainer.train_epoch()
        history.append(perplexity(ilm, valid, args.batch_size))
        if history[-1] <= min(history):
            best = _copy(ilm.mini_lstm)
        logging.info(
            f"epoch {trainer.epoch} of {args.epochs}: perplexity in training {math.exp(loss):.2f}, "
            f"valid {history[-1]:.2f} (zero context {history[0]:.2f})"
        )
        state = {"trainer": trainer.state_dict(), "history": history, "best": best, "same": same}
        with atomic_write(state_file, "wb") as stream:
            torch.save(state, stream)
    ilm.mini_lstm.load_state_dict(best)
    ilm.save(args.output, {"perplexities": history, "sentences": len(train), "seed": args.seed})
    state_file.unlink()
    logging.info(
        f"{args.output}: perplexity of {args.valid_text} {min(history):.2f}, of the zero-context "
        f"estimate {history[0]:.2f}"
    )
    if min(history) == history[0]:
        logging.warning(
            "no epoch was better than the zero-context estimate, which is what was written: try "
            "another --lr, or more --epochs"
        )
    return history


class Trainer:
    """Cross-entropy training of a mini-LSTM, with Adam and a linearly falling learning rate.

    Args:
        ilm: Its decoder's parameters must need no gradient; they and the decoder's dropout stay as
            they are.
        sentences: Token ids without sos and eos.
        lr: At the first step; 0 after the last.
        batch_size: Sentences, at most.
        epochs: Planned.
        seed: Of the order of batches, which depends on it and on the epoch alone.

    Attributes:
        epoch: Number of epochs done.
    """

    def __init__(
        self,
        ilm: MiniLSTMILM,
        sentences: Sentences,
        lr: float,
        batch_size: int,
        epochs: int,
        seed: int,
    ):
        self.ilm, self.sentences = ilm, sentences
        self.epoch, self._seed = 0, seed
        self._batches = list(batches(sentences, batch_size, vocab_size(ilm)))
        self._optimizer = torch.optim.Adam(ilm.mini_lstm.parameters(), lr=lr)
        steps = epochs * len(self._batches)
        self._schedule = torch.optim.lr_scheduler.LinearLR(
            self._optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps
        )

    def train_epoch(self) -> float:
        """One pass over the sentences; the mean loss of a token."""
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        order = torch.randperm(len(self._batches), generator=generator).tolist()
        total = number = 0
        self.ilm.mini_lstm.train()
        for batch in tqdm(order, unit="batch", disable=not sys.stderr.isatty(), leave=False):
            rows = [self.sentences[i] for i in self._batches[batch]]
            loss, tokens = sum_of_losses(self.ilm, rows)
            self._optimizer.zero_grad()
            (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(self.ilm.mini_lstm.parameters(), 1.0)
            self._optimizer.step()
            self._schedule.step()
            total, number = total + loss.item(), number + tokens
        self.epoch += 1
        return total / number

    def state_dict(self) -> dict[str, Any]:
        """All that the next epochs depend on."""
        return {
            "epoch": self.epoch,
            "mini_lstm": self.ilm.mini_lstm.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.epoch = state["epoch"]
        self.ilm.mini_lstm.load_state_dict(state["mini_lstm"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def sum_of_losses(ilm: MiniLSTMILM, sentences: Sentences) -> tuple[torch.Tensor, int]:
    """Negative log-probability of sentences with their ends, and the number of tokens.

    Args:
        ilm: Internal LM.
        sentences: Token ids without sos and eos.
    """
    end = vocab_size(ilm) - 1
    longest = max(map(len, sentences)) + 1
    padding = [longest - 1 - len(sentence) for sentence in sentences]
    inputs = [[end, *ids, *[end] * n] for ids, n in zip(sentences, padding)]
    targets = [[*ids, end, *[_IGNORED] * n] for ids, n in zip(sentences, padding)]
    device = next(ilm.decoder.parameters()).device
    logits, _ = ilm(torch.tensor(inputs, device=device))
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        torch.tensor(targets, device=device).flatten(),
        ignore_index=_IGNORED,
        reduction="sum",
    )
    return loss, sum(map(len, sentences)) + len(sentences)


@torch.no_grad()
def perplexity(ilm: MiniLSTMILM, sentences: Sentences, batch_size: int) -> float:
    """Of a token, ends of sentences included."""
    ilm.mini_lstm.eval()
    total = number = 0
    for batch in batches(sentences, batch_size, vocab_size(ilm)):
        loss, tokens = sum_of_losses(ilm, [sentences[i] for i in batch])
        total, number = total + loss.item(), number + tokens
    return math.exp(min(700.0, total / number))


def batches(sentences: Sentences, batch_size: int, num_tokens: int) -> Iterator[list[int]]:
    """Numbers of sentences of similar length; fewer where a batch's logits would be too many."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    batch: list[int] = []
    for i in order:
        fits = _LOGITS // ((len(sentences[i]) + 1) * num_tokens)
        if batch and len(batch) >= min(batch_size, fits):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def vocab_size(ilm: MiniLSTMILM) -> int:
    """V."""
    return ilm.decoder.output_layer.out_features


def _copy(module: MiniLSTM) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    names = ("epochs", "batch_size", "hidden_size", "lr", "seed", "token_type", "bpemodel")
    stats = {path: Path(path).stat() for path in (args.asr_model_file, args.text, args.valid_text)}
    return {
        **{name: getattr(args, name) for name in names},
        "files": {path: [stat.st_size, stat.st_mtime] for path, stat in stats.items()},
    }


def _read_state(path: Path, same: dict[str, Any]) -> Any:
    """What a run with the same options has left; None: nothing."""
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["same"] == same:
        return state
    logging.warning(f"{path} is of a run with other options or files: beginning anew")
    return None
