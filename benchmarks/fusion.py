#!/usr/bin/env python3
"""CTC with a language model: our searches against ESPnet's, same posteriors and LM, one table.

Either a CTC model and an LM over its tokens as the recipes train them:

    cd egs2/mini/asr1
    python ../../../benchmarks/fusion.py --asr exp/mini/asr_ctc --data dump/mini/raw/test \\
        --lm exp/mini/lm_llama_adapted/llm [--llm DIR [--ngram FILE]]

or made posteriors: sentences, whose tokens (those of the LLM) come out of a confusion model. The
LLM is then also the LM over the ASR tokens, exactly, so that all methods know the same:

    python benchmarks/fusion.py --llm DIR --text sentences.txt

Encoder outputs are there beforehand: time is that of the search alone, in CPU seconds with
--cpu_time. Methods run in turns over blocks of the same utterances.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Optional

import jiwer
import torch
from measuring import peak_memory
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from espnet_llm_plugin import registry
from espnet_llm_plugin.errors import UserError, run_cli
from espnet_llm_plugin.fusion.ngram import load_ngram
from espnet_llm_plugin.inference.fusion_options import FusionOptions
from espnet_llm_plugin.inference.loading import load_asr, load_lm
from espnet_llm_plugin.inference.recognizer import build_search, encode, lm_use
from espnet_llm_plugin.inference.utterances import Utterances
from espnet_llm_plugin.transducer.hypothesis import Scales

Run = Callable[[list[torch.Tensor]], list[list[int]]]  # encoder outputs -> best token ids


@dataclass
class Task:
    """What is decoded, and with what."""

    ctc: torch.nn.Module
    tokens: list[str]
    token_type: str
    to_text: Callable[[list[str]], str]
    lm: Optional[torch.nn.Module]
    encoded: list[torch.Tensor]
    references: list[str]
    seconds: float


@dataclass
class Row:
    """A line of the table."""

    method: str
    beam: int
    batch: int
    run: Run
    lm_use: Callable[[], tuple[int, int]]
    spent: float = 0.0
    found: list = field(default_factory=list)


# ------------------------------------------------------------------------- models and posteriors


class Posteriors(torch.nn.Module):
    """A CTC module whose encoder outputs are log-probabilities."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.ctc_lo = torch.nn.Linear(1, vocab_size)

    def log_softmax(self, encoder_out: torch.Tensor) -> torch.Tensor:
        return encoder_out


def trained_task(args: argparse.Namespace) -> Task:
    asr = load_asr(args.asr / "config.yaml", args.asr / args.asr_file)
    tokens = asr.model.token_list
    lm = load_lm(args.lm / "espnet_lm.yaml", args.lm / "espnet_lm.pth", tokens)
    texts = dict(line.split(maxsplit=1) for line in (args.data / "text").open(encoding="utf-8"))
    wav = [(str(args.data / "wav.scp"), "speech", "sound")]
    data = Utterances(wav, asr.train_args, asr.sample_rate)
    keys = data.keys[: args.utterances]
    speech = [data[i][1] for i in range(len(keys))]
    return Task(
        asr.model.ctc,
        tokens,
        asr.text.token_type,
        asr.text.text,
        lm,
        [encode(asr.model, [samples])[0][0] for samples in speech],
        [texts[key].strip() for key in keys],
        sum(len(samples) for samples in speech) / asr.sample_rate,
    )


def made_task(args: argparse.Namespace, directory: Path) -> Task:
    """Posteriors of sentences in an LLM's own tokens."""
    from espnet_llm_plugin.llm.adaptation import adapt_llm, load_tokenizer
    from espnet_llm_plugin.llm.backbone import resolve_llm

    tokenizer = load_tokenizer(resolve_llm(args.llm))
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    text = [
        piece
        for i, piece in enumerate(pieces)
        if i not in special and not piece.startswith("<") and piece.strip()
    ]
    if not any(piece.startswith("\u2581") for piece in text):
        raise UserError(f"LLM {args.llm}: made posteriors need a tokenizer of sentencepiece's kind")
    tokens = ["<blank>", "<unk>", *dict.fromkeys(text), "<sos/eos>"]
    (directory / "tokens.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    adapt_llm(args.llm, directory / "tokens.txt", directory / "llm", token_type="bpe")
    lm = load_lm(directory / "llm/espnet_lm.yaml", directory / "llm/espnet_lm.pth", tokens)

    lines = args.text.read_text(encoding="utf-8").split("\n")
    references, encoded = [], []
    index = {token: i for i, token in enumerate(tokens)}
    random = torch.Generator().manual_seed(0)
    confused = confusions(tokens, random)
    for line in lines:
        words = " ".join(line.split())
        ids = [index.get(t, 1) for t in tokenizer.tokenize(words)] if words else []
        if not ids or 1 in ids or to_text([tokens[i] for i in ids]) != words:
            continue
        references.append(words)
        encoded.append(made_posteriors(ids, len(tokens), confused, random, args.difficulty))
        if len(references) == args.utterances:
            break
    if not references:
        raise UserError(f"--text {args.text}: no sentence is made of the LLM's tokens alone")
    seconds = sum(map(len, encoded)) * args.frame_ms / 1000
    ctc = Posteriors(len(tokens)).eval()
    return Task(ctc, tokens, "bpe", to_text, lm, encoded, references, seconds)


def to_text(tokens: list[str]) -> str:
    return "".join(tokens).replace("\u2581", " ").strip()


def confusions(tokens: list[str], random: torch.Generator, number: int = 8) -> torch.Tensor:
    """Tokens (V, K) that each token is taken for: of those that begin a word, or of the others."""
    begins = torch.tensor([token.startswith("\u2581") for token in tokens])
    begins[[0, 1, -1]] = False
    inner = ~begins
    inner[[0, 1, -1]] = False
    of = [torch.nonzero(kind)[:, 0] for kind in (inner, begins)]
    rows = [
        of[int(begin)][torch.randint(len(of[int(begin)]), (number,), generator=random)]
        for begin in begins
    ]
    return torch.stack(rows)


def made_posteriors(
    ids: list[int],
    vocab_size: int,
    confused: torch.Tensor,
    random: torch.Generator,
    difficulty: float,
) -> torch.Tensor:
    """Log-probs (T, V): peaks of one or two frames, blanks between them."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random)

    frames = []
    for i in ids:
        gap, width = (int(torch.randint(1, top, (1,), generator=random)) for top in (4, 3))
        silence = normal(gap, vocab_size) - 4.0
        silence[:, 0] += 14.0
        peak = normal(1, vocab_size) - 4.0
        peak[0, 0] = 1.0 + 1.5 * normal(1)
        peak[0, confused[i]] = 3.0 + difficulty * normal(confused.size(1))
        peak[0, i] = 6.0 + difficulty * normal(1)
        frames += [silence, peak + 0.1 * normal(width, vocab_size)]
    logits = torch.cat([*frames, normal(2, vocab_size) + torch.eye(vocab_size)[[0, 0]] * 14.0])
    return logits.log_softmax(-1)


# ------------------------------------------------------------------------------------- searches


def ours(args: argparse.Namespace, task: Task, method: str, beam: int, batch: int) -> Row:
    model = SimpleNamespace(
        ctc=task.ctc, token_list=task.tokens, parameters=task.ctc.parameters, decoder=None
    )
    text = SimpleNamespace(text=task.to_text, token_type=task.token_type)
    asr = SimpleNamespace(model=model, text=text, is_ctc=True)
    kind, _, policy = method.partition(" ")
    options = {"recombination": args.recombination, "top_labels": args.top_labels or None}
    lm = None if kind in ("none", "LLM", "LLM+ngram") else task.lm
    if kind.startswith("LLM"):
        options["llm"] = str(args.llm)
    if kind == "LLM+ngram":
        options["ngram"] = load_ngram(args.ngram, task.tokens)
    if policy == "never":
        options["method"] = "rescore"
    elif policy:
        options["method"] = "delayed"
        options["policy"] = "shortest" if policy == "shortest" else "every_n_frames"
        if policy != "shortest":
            options["interval"] = int(policy)
    search = build_search(asr, lm, beam_size=beam, fusion=FusionOptions(**options))
    weight = 0.0 if kind == "none" else args.lm_weight
    bonus = 0.0 if kind == "none" else args.label_bonus
    scales = Scales(lm_weight=weight, label_bonus=bonus)

    def run(encoded: list[torch.Tensor]) -> list[list[int]]:
        found = {}
        # utterances of similar length together, as a batched recogniser would
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            lengths = torch.tensor([len(encoded[i]) for i in some])
            padded = pad_sequence([encoded[i] for i in some], batch_first=True)
            for i, hyps in zip(some, search.batch(padded, lengths, scales)):
                found[i] = [label + 1 for label in hyps[0].labels]
        return [found[i] for i in range(len(encoded))]

    return Row(named(method), beam, batch, run, lambda: lm_use(search))


def named(method: str) -> str:
    kind, _, policy = method.partition(" ")
    if kind == "none":
        return "no LM"
    if kind == "label-wise":
        return "label-wise"
    vocabulary = "own vocabulary" if kind.startswith("LLM") else "ASR vocabulary"
    if kind == "LLM+ngram":
        vocabulary += ", n-gram in between"
    if policy == "never":
        return f"rescoring ({vocabulary})"
    when = "shortest" if policy == "shortest" else f"n = {policy}"
    return f"delayed, {when} ({vocabulary})"


class Counted:
    """An LM that counts its calls and the prefixes in them; everything else is the LM's."""

    def __init__(self, lm: torch.nn.Module):
        self._lm, self.calls, self.tokens = lm, 0, 0

    def __getattr__(self, name: str):
        return getattr(self._lm, name)

    def score(self, y, state, x):
        self.calls, self.tokens = self.calls + 1, self.tokens + 1
        return self._lm.score(y, state, x)

    def batch_score(self, ys, states, xs):
        self.calls, self.tokens = self.calls + 1, self.tokens + len(ys)
        return self._lm.batch_score(ys, states, xs)


def espnet_time_sync(args: argparse.Namespace, task: Task, beam: int) -> Row:
    from espnet.nets.beam_search_timesync import BeamSearchTimeSync

    lm = Counted(task.lm)
    search = BeamSearchTimeSync(
        sos=len(task.tokens) - 1,
        beam_size=beam,
        scorers={"ctc": task.ctc, "decoder": None, "lm": lm},
        weights={
            "ctc": 1.0,
            "decoder": 0.0,
            "lm": args.lm_weight,
            "length_bonus": args.label_bonus,
        },
        token_list=task.tokens,
    )
    return espnet_row("ESPnet BeamSearchTimeSync", search, beam, lm)


def espnet_label_sync(args: argparse.Namespace, task: Task, beam: int) -> Row:
    """As ``asr_inference`` of ESPnet builds it for ``ctc_weight`` 1."""
    from espnet.nets.batch_beam_search import BatchBeamSearch
    from espnet.nets.scorer_interface import BatchScorerInterface
    from espnet.nets.scorers.ctc import CTCPrefixScorer
    from espnet.nets.scorers.length_bonus import LengthBonus

    eos = len(task.tokens) - 1

    class CountedScorer(Counted, BatchScorerInterface):
        init_state = batch_init_state = None

    CountedScorer.init_state = lambda self, x: self._lm.init_state(x)
    CountedScorer.batch_init_state = lambda self, x: self._lm.batch_init_state(x)
    lm = CountedScorer(task.lm)
    search = BatchBeamSearch(
        beam_size=beam,
        vocab_size=len(task.tokens),
        weights={"ctc": 1.0, "lm": args.lm_weight, "length_bonus": args.label_bonus},
        scorers={
            "ctc": CTCPrefixScorer(task.ctc, eos),
            "lm": lm,
            "length_bonus": LengthBonus(len(task.tokens)),
        },
        sos=eos,
        eos=eos,
        token_list=task.tokens,
        pre_beam_score_key=None,
    )
    return espnet_row("ESPnet BatchBeamSearch", search, beam, lm)


def espnet_row(name: str, search: torch.nn.Module, beam: int, lm: Counted) -> Row:
    search.eval()

    def run(encoded: list[torch.Tensor]) -> list[list[int]]:
        with torch.inference_mode():
            return [list(map(int, search(out)[0].yseq[1:-1])) for out in encoded]

    return Row(name, beam, 1, run, lambda: (lm.calls, lm.tokens))


def rows_of(args: argparse.Namespace, task: Task) -> list[Row]:
    delayed = [str(n) for n in args.intervals] + ["shortest", "never"]
    methods = ["none", "label-wise", *(f"LM {policy}" for policy in delayed)]
    if args.llm:
        methods += [f"LLM {policy}" for policy in delayed]
    if args.ngram:
        methods += [f"LLM+ngram {policy}" for policy in delayed]
    rows = []
    for beam in args.beams:
        rows += [ours(args, task, method, beam, args.batch) for method in methods]
        if "time_sync" in args.espnet:
            rows.append(espnet_time_sync(args, task, beam))
        if "label_sync" in args.espnet:
            rows.append(espnet_label_sync(args, task, beam))
    return rows


# ------------------------------------------------------------------------------------ measuring


def measure(args: argparse.Namespace, task: Task) -> list[dict]:
    clock = time.process_time if args.cpu_time else time.perf_counter
    blocks = range(0, len(task.encoded), args.block)
    memory = []
    for row in rows_of(args, task):  # libraries load
        row.run(task.encoded[:1])
        memory.append(peak_memory(lambda row=row: row.run(task.encoded[: args.batch]), "cpu"))
    rows = rows_of(args, task)  # new ones: LMs may remember what they have read
    before = [row.lm_use() for row in rows]
    progress = tqdm(total=len(blocks) * len(rows), disable=not sys.stderr.isatty())
    for first in blocks:
        some = task.encoded[first : first + args.block]
        for row in rows:
            start = clock()
            row.found += row.run(some)
            row.spent += clock() - start
            progress.update()
    progress.close()
    results = []
    for row, peak, (calls, tokens) in zip(rows, memory, before):
        texts = [task.to_text([task.tokens[i] for i in ids]) for ids in row.found]
        now = row.lm_use()
        results.append(
            {
                "method": row.method,
                "beam": row.beam,
                "batch": row.batch,
                "wer": 100 * jiwer.wer(task.references, texts),
                "seconds": row.spent,
                "rtf": row.spent / task.seconds,
                "lm_calls": (now[0] - calls) / len(texts),
                "lm_tokens": (now[1] - tokens) / len(texts),
                "memory_bytes": peak,
            }
        )
    return results


def show(results: list[dict]) -> str:
    """A table; speed-ups are against ESPnet's time-synchronous search, and label-wise fusion."""
    lines = [
        "|beam|method|batch|WER|RTF|times faster than TimeSync|than label-wise|LM calls/utt|"
        "LM tokens/utt|peak MB|",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        same = {other["method"]: other["rtf"] for other in results if other["beam"] == r["beam"]}
        peers = (same.get("ESPnet BeamSearchTimeSync"), same["label-wise"])
        faster = ["" if peer is None else f"{peer / r['rtf']:.1f}" for peer in peers]
        lines.append(
            f"|{r['beam']}|{r['method']}|{r['batch']}|{r['wer']:.2f}|{r['rtf']:.5f}|{faster[0]}"
            f"|{faster[1]}|{r['lm_calls']:.1f}|{r['lm_tokens']:.1f}|{r['memory_bytes'] / 1e6:.0f}|"
        )
    return "\n".join(lines)


def main(cmd: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("a trained model")
    group.add_argument("--asr", type=Path, help="directory of a CTC model")
    group.add_argument("--asr_file", default="valid.loss.ave.pth", help="its checkpoint")
    group.add_argument("--lm", type=Path, help="LLM directory over its tokens (espnet_lm.yaml)")
    group.add_argument("--data", type=Path, help="formatted test set")
    group = parser.add_argument_group("made posteriors")
    group.add_argument("--text", type=Path, help="sentences, one a line")
    group.add_argument("--difficulty", type=float, default=2.2, help="deviation of the scores")
    group.add_argument("--frame_ms", type=float, default=60.0, help="for the real-time factor")
    parser.add_argument("--llm", help="LLM that scores words in its own vocabulary")
    parser.add_argument("--ngram", help="of estimate_ngram: stands in for --llm between its calls")
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--batch", type=int, default=16, help="utterances searched together by us")
    parser.add_argument("--intervals", nargs="+", type=int, default=[1, 5, 10, 20])
    parser.add_argument(
        "--espnet", nargs="*", default=["time_sync", "label_sync"], help="peers to run"
    )
    parser.add_argument("--utterances", type=int, default=64)
    parser.add_argument("--block", type=int, default=16, help="utterances of a turn")
    parser.add_argument("--lm_weight", type=float, default=0.5)
    parser.add_argument("--label_bonus", type=float, default=0.5)
    parser.add_argument("--recombination", default="sum", choices=["sum", "max"])
    parser.add_argument("--top_labels", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds: on a busy machine")
    parser.add_argument("--json", type=Path, help="also write the rows into this file")
    args = parser.parse_args(cmd)
    if (args.asr is None) == (args.text is None):
        raise UserError("give either --asr, --lm and --data, or --llm and --text")
    needed = ["lm", "data"] if args.asr else ["llm"]
    missing = [name for name in needed if getattr(args, name) is None]
    if missing:
        raise UserError(f"--{missing[0]} is missing")
    torch.set_num_threads(args.threads)
    registry.register()
    logging.getLogger().setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        task = trained_task(args) if args.asr else made_task(args, Path(directory))
        results = measure(args, task)
    print(
        f"{len(task.references)} utterances, {task.seconds:.0f} s, {args.threads} threads, "
        f"lm_weight {args.lm_weight:g}, label_bonus {args.label_bonus:g}, "
        f"{'CPU time' if args.cpu_time else 'wall time'}, torch {torch.__version__}\n"
    )
    print(show(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
