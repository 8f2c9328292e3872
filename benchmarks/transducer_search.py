#!/usr/bin/env python3
"""Transducer search: ours against ESPnet's and torchaudio's, same models and audio, one table.

An RNN-T (ESPnet's LSTM decoder and joint network) and a factorized transducer with an LLM
predictor, as the recipe egs2/mini trains them. Encoder outputs are computed once beforehand: time
is that of the search alone. Searches run in turns over blocks of the same utterances, so that all
meet the same load of the machine. The text is scored against the reference; all searches have the
same scales, and rank by the score per symbol as the peers do.

    cd egs2/mini/asr1
    python ../../../benchmarks/transducer_search.py --exp exp/mini --data dump/mini/raw/test
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import jiwer
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from espnet_llm_plugin import registry
from espnet_llm_plugin.errors import UserError, run_cli
from espnet_llm_plugin.inference.loading import LoadedASR, load_asr
from espnet_llm_plugin.inference.recognizer import build_search, default_scales, encode
from espnet_llm_plugin.inference.utterances import Utterances


class Row(NamedTuple):
    """A search of the table."""

    model: str
    search: str
    beam: int
    batch: int
    run: Callable[[list[torch.Tensor]], list[list[int]]]  # encoder outputs -> best token ids
    counts: dict  # filled by `run`


# ------------------------------------------------------------------------------------ searches


def ours(asr: LoadedASR, beam: int, batch: int, counts: dict) -> Callable:
    search = build_search(asr, beam_size=beam)
    scales = default_scales(asr)

    def run(encoded):
        found = {}
        # utterances of similar length together, as a batched recogniser would
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            lengths = torch.tensor([len(encoded[i]) for i in some])
            padded = pad_sequence([encoded[i] for i in some], batch_first=True)
            state = search.start([scales], utterances=len(some))
            state = search.step(state, padded, lengths)
            for i, hyps in zip(some, state.nbest(1, normalize_length=True)):
                found[i] = [label + 1 for label in hyps[0].labels]
            for name in ("num_created", "num_predictor"):
                counts[name] = counts.get(name, 0) + getattr(state.tree, name)
        return [found[i] for i in range(len(encoded))]

    return run


def espnet(asr: LoadedASR, beam: int, search_type: str, counts: dict) -> Callable:
    from espnet2.asr.transducer.beam_search_transducer import BeamSearchTransducer

    model = asr.model
    # 3 labels a frame and no length limit but the number of frames, as ours
    options = {"maes": dict(nstep=3), "alsd": dict(u_max=200), "default": {}}[search_type]
    search = BeamSearchTransducer(
        model.decoder, model.joint_network, beam, search_type=search_type, **options
    )

    def run(encoded):
        found = []
        for out in encoded:
            try:
                with torch.inference_mode():
                    yseq = search(out)[0].yseq
            except UserError:  # `default` can stay in a frame for ever; our decoder stops it
                counts["endless"] = counts.get("endless", 0) + 1
                yseq = []
            found.append([token for token in map(int, yseq) if token != 0])
        return found

    return run


class TorchaudioModel(torch.nn.Module):
    """ESPnet's decoder and joint network behind the interface of torchaudio's ``RNNT``.

    torchaudio wants the blank to be the last token.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.decoder, self.joint = model.decoder, model.joint_network
        self.blank = model.vocab_size - 1

    def predict(self, tokens, lengths, state):
        tokens = torch.where(tokens == self.blank, 0, tokens + 1)
        if state is None:
            state = self.decoder.init_state(len(tokens))
        else:
            hidden, cell = (part.transpose(0, 1).contiguous() for part in state[0])
            state = (hidden, cell)
        out, (hidden, cell) = self.decoder.rnn_forward(self.decoder.embed(tokens), state)
        return out, lengths, [[hidden.transpose(0, 1), cell.transpose(0, 1)]]

    def join(self, source, source_lengths, target, target_lengths):
        logits = self.joint(source[:, :, None], target[:, None])
        return logits.roll(-1, dims=-1), source_lengths, target_lengths


def torchaudio_search(asr: LoadedASR, beam: int) -> Callable:
    from torchaudio.models import RNNTBeamSearch

    model = TorchaudioModel(asr.model)
    search = RNNTBeamSearch(model, model.blank, step_max_tokens=3)

    def run(encoded):
        best = []
        with torch.inference_mode():
            for out in encoded:
                hyps = search._search(out[None], None, beam)
                best.append([token + 1 for token in hyps[0][0][1:]])
        return best

    return run


# ----------------------------------------------------------------------------------- measuring


def load_models(args: argparse.Namespace) -> dict[str, LoadedASR]:
    models = {}
    if "rnnt" in args.models:
        models["RNN-T"] = load(args.exp / "asr_rnnt")
    if "ft" in args.models:
        llm = str(args.llm or args.exp / "lm_llama_adapted" / "llm")
        models["FT + LLM"] = load(
            args.exp / "asr_ft_weak", predictor="llm", predictor_conf={"llm": llm}
        )
        # ESPnet's search takes the scales from the decoder, ours from the model's defaults
        decoder = models["FT + LLM"].model.decoder
        decoder.alpha, decoder.beta, decoder.label_bonus = args.alpha, args.beta, args.label_bonus
    return models


def load(directory: Path, **swap) -> LoadedASR:
    return load_asr(directory / "config.yaml", directory / "valid.loss.ave.pth", **swap)


def rows_of(args: argparse.Namespace, models: dict[str, LoadedASR]) -> list[Row]:
    rows = []
    for name, asr in models.items():
        for beam in sorted({*args.beams, *args.our_beams}):
            for batch in args.batches:
                counts: dict = {}
                rows.append(Row(name, "ours", beam, batch, ours(asr, beam, batch, counts), counts))
            if beam not in args.beams:
                continue
            if beam == 1:
                counts = {}
                run = espnet(asr, 1, "default", counts)
                rows.append(Row(name, "ESPnet greedy", 1, 1, run, counts))
                continue
            for kind in args.espnet if name == "RNN-T" else args.espnet[:1]:
                counts = {}
                run = espnet(asr, beam, kind, counts)
                rows.append(Row(name, f"ESPnet {kind}", beam, 1, run, counts))
            if name == "RNN-T":
                run = torchaudio_search(asr, beam)
                rows.append(Row(name, "torchaudio", beam, 1, run, {}))
    return rows


def measure(args: argparse.Namespace) -> list[dict]:
    models = load_models(args)
    texts = dict(line.split(maxsplit=1) for line in (args.data / "text").open(encoding="utf-8"))
    encoded, audio, keys = {}, 0.0, []
    for name, asr in models.items():
        wav = [(str(args.data / "wav.scp"), "speech", "sound")]
        data = Utterances(wav, asr.train_args, asr.sample_rate)
        keys = data.keys[: args.utterances]
        speech = [data[i][1] for i in range(len(keys))]
        audio = sum(len(samples) for samples in speech) / asr.sample_rate
        encoded[name] = [encode(asr.model, [samples])[0][0] for samples in speech]
    rows = rows_of(args, models)
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds, found = [0.0] * len(rows), [[] for _ in rows]
    blocks = range(0, len(keys), args.block)
    progress = tqdm(total=len(blocks) * len(rows), disable=not sys.stderr.isatty())
    for first in blocks:
        for i, row in enumerate(rows):
            some = encoded[row.model][first : first + args.block]
            if first == 0:
                row.run(some[:1])  # lazy set-ups are not the search's speed
                row.counts.clear()
            start = clock()
            found[i] += row.run(some)
            seconds[i] += clock() - start
            progress.update()
    progress.close()
    return [
        result(row, models[row.model], ids, spent, audio, [texts[key].strip() for key in keys])
        for row, ids, spent in zip(rows, found, seconds)
    ]


def result(row: Row, asr: LoadedASR, ids: list, spent: float, audio: float, refs: list) -> dict:
    texts = [asr.text.text(asr.text.tokens(tokens)) for tokens in ids]
    counts = {}
    if row.counts.get("num_created"):
        counts["predictor_runs"] = row.counts["num_predictor"]
        counts["prefixes"] = row.counts["num_created"]
    if row.counts.get("endless"):
        counts["endless"] = row.counts["endless"]
    return {
        "model": row.model,
        "search": row.search,
        "beam": row.beam,
        "batch": row.batch,
        "utt_per_s": len(ids) / spent,
        "rtf": spent / audio,
        "wer": 100 * jiwer.wer(refs, texts),
        **counts,
    }


def show(results: list[dict]) -> str:
    """A table; speed-up is against ESPnet's ``default`` (or greedy) of the same model and beam."""
    lines = [
        "|model|beam|search|batch|utt/s|RTF|speed-up|WER|predictor runs / prefixes|",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    peers = {
        (r["model"], r["beam"]): r["utt_per_s"]
        for r in results
        if r["search"] in ("ESPnet default", "ESPnet greedy")
    }
    for r in results:
        peer = peers.get((r["model"], r["beam"]))
        speed_up = "" if peer is None else f"{r['utt_per_s'] / peer:.1f}"
        runs = "" if "prefixes" not in r else f"{r['predictor_runs']} / {r['prefixes']}"
        if "endless" in r:
            runs = f"{r['endless']} utterances never ended"
        lines.append(
            f"|{r['model']}|{r['beam']}|{r['search']}|{r['batch']}|{r['utt_per_s']:.2f}"
            f"|{r['rtf']:.4f}|{speed_up}|{r['wer']:.2f}|{runs}|"
        )
    return "\n".join(lines)


def show_equal_wer(results: list[dict]) -> str:
    """Each peer against the fastest of our searches that is at least as good, one table."""
    lines = [
        "|model|peer|beam|WER|utt/s|ours: batch|beam|WER|utt/s|speed-up|",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for peer in results:
        if peer["search"] == "ours":
            continue
        for batch in sorted({r["batch"] for r in results if r["search"] == "ours"}):
            good = [
                r
                for r in results
                if r["search"] == "ours"
                and (r["model"], r["batch"]) == (peer["model"], batch)
                and r["wer"] <= peer["wer"]
            ]
            cells = "-|-|-|none as good"
            if good:
                best = max(good, key=lambda r: r["utt_per_s"])
                speed_up = best["utt_per_s"] / peer["utt_per_s"]
                cells = f"{best['beam']}|{best['wer']:.2f}|{best['utt_per_s']:.2f}|{speed_up:.1f}"
            lines.append(
                f"|{peer['model']}|{peer['search']}|{peer['beam']}|{peer['wer']:.2f}"
                f"|{peer['utt_per_s']:.2f}|{batch}|{cells}|"
            )
    return "\n".join(lines)


def main(cmd: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exp", type=Path, required=True, help="experiments of egs2/mini")
    parser.add_argument("--llm", type=Path, help="default: lm_llama_adapted/llm in --exp")
    parser.add_argument("--data", type=Path, required=True, help="formatted test set")
    parser.add_argument("--models", nargs="+", default=["rnnt", "ft"], choices=["rnnt", "ft"])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4, 10])
    parser.add_argument(
        "--our_beams",
        nargs="+",
        type=int,
        default=[],
        help="more beams of our search, to find the fastest that is as good as a peer's",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--espnet", nargs="+", default=["default", "alsd", "maes"])
    parser.add_argument("--utterances", type=int, default=64)
    parser.add_argument("--block", type=int, default=32, help="utterances of a turn")
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument("--beta", type=float, default=0.4)
    parser.add_argument("--label_bonus", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds: on a busy machine")
    parser.add_argument("--json", type=Path, help="also write the rows into this file")
    args = parser.parse_args(cmd)
    for path in (args.exp, args.data / "wav.scp"):
        if not path.exists():
            raise UserError(f"there is no {path}: run egs2/mini/asr1/run.sh (make demo) first")
    torch.set_num_threads(args.threads)
    registry.register()
    results = measure(args)
    print(f"{args.utterances} utterances, {args.threads} threads, torch {torch.__version__}\n")
    print(show(results))
    if args.our_beams:
        print(f"\n{show_equal_wer(results)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
