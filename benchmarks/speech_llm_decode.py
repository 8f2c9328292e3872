#!/usr/bin/env python3
"""Decoding with an LLM that reads audio: ours against transformers' generate and ESPnet's path.

All have the same LLM (random weights of a --family, or --llm DIR), the same audio embeddings of
utterances of different lengths, and write the same number of tokens, so that the work is equal;
whether the tokens are the same is a column. With --ends together all utterances of a batch end at
once; with --ends apart (greedy only) each has as many tokens as fit its length, like transcripts.

* ours: the label-synchronous search over the `prefix` interface; the audio is read once.
* generate: transformers, same batch and beam, left-padded embeddings and a mask.
* ESPnet: `espnet2.bin.asr_inference --hugging_face_decoder true` with its
  `hugging_face_transformers` decoder (causal_lm): one utterance at a time, whose embeddings it
  repeats num_beams times before generate does so again.

    python benchmarks/speech_llm_decode.py --batches 1 8 --beams 1 4
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Callable, Optional

import torch
from measuring import compare, serve

from espnet_llm_plugin.errors import run_cli

BOS, EOS = 1, 2
ROWS = {
    "ours": "ours",
    "generate": "transformers generate",
    "espnet": "ESPnet, one by one",
}


def make_llm(directory: Path, args: argparse.Namespace) -> Path:
    """An LLM with random weights and a tokenizer that nobody needs here."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {
        "llama": dict(
            intermediate_size=4 * args.hidden * 2 // 3,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads or args.heads,
            max_position_embeddings=2048,
        ),
        "bloom": dict(n_layer=args.layers, n_head=args.heads),
    }
    config = AutoConfig.for_model(
        args.family,
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
        **sizes[args.family],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS}
    vocabulary.update({f"t{i}": i for i in range(3, args.vocab)})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    tokenizer.save_pretrained(directory)
    return directory


def make_audio(args: argparse.Namespace, size: int) -> list[torch.Tensor]:
    """Embeddings (P, D) of utterances, from 60 % of the longest length to all of it."""
    generator = torch.Generator().manual_seed(1)
    return [
        0.3 * torch.randn(int(share * args.audio), size, generator=generator)
        for share in audio_shares(args)
    ]


def audio_shares(args: argparse.Namespace) -> list[float]:
    """Lengths of the utterances, of the longest one's."""
    return torch.linspace(1.0, 0.6, args.batch).tolist()


def wanted_tokens(args: argparse.Namespace) -> list[int]:
    """Tokens of each utterance."""
    apart = args.ends == "apart"
    return [round(args.tokens * share) if apart else args.tokens for share in audio_shares(args)]


class EndAt:
    """A logits processor: the last token of each utterance is the end symbol, none before is."""

    def __init__(self, wanted: list[int], beam: int, device: str):
        self.last = torch.tensor(wanted, device=device).repeat_interleave(beam) - 1

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        over = (self.last <= ids.size(1))[:, None]
        end = torch.arange(scores.size(1), device=scores.device) == EOS
        return scores.masked_fill(end ^ over, -torch.inf)


# ------------------------------------------------------------------------------------ searches


def ours(llm: str, args: argparse.Namespace) -> Callable:
    from espnet_llm_plugin.llm.tuning import TunedLLM
    from espnet_llm_plugin.speech_llm.hypothesis import SearchWeights
    from espnet_llm_plugin.speech_llm.interface import build_interface
    from espnet_llm_plugin.speech_llm.scorers import LLMScorer
    from espnet_llm_plugin.speech_llm.search import LabelSearch

    tuned = TunedLLM(llm, tuning="frozen", dtype=args.dtype).to(args.device)
    interface = build_interface("prefix", tuned, {})
    audio = [one.to(args.device) for one in make_audio(args, tuned.hidden_size)]
    padded = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True)
    lengths = torch.tensor([len(one) for one in audio], device=args.device)
    search = LabelSearch(
        sos=BOS,
        eos=EOS,
        vocab_size=tuned.vocab_size,
        beam_size=args.beam,
        weights=SearchWeights(),
        end_detection="generate",
    )

    @torch.inference_mode()
    def run():
        state = interface.start(padded, lengths, (), ())
        wanted = wanted_tokens(args)
        scorers = {"decoder": LLMScorer(interface, state)}
        lists = search(scorers, wanted, min_tokens=wanted, device=args.device)
        return [list(hyps[0].tokens) for hyps in lists]

    return run


def generation(args: argparse.Namespace, wanted: list[int]) -> dict:
    """Options of generate for fixed numbers of tokens."""
    return dict(
        do_sample=False,
        num_beams=args.beam,
        length_penalty=0.0,
        logits_processor=[EndAt(wanted, args.beam, args.device)] if len(set(wanted)) > 1 else None,
        min_new_tokens=min(wanted) if len(set(wanted)) == 1 else None,
        max_new_tokens=max(wanted),
        eos_token_id=EOS,
        pad_token_id=0,
    )


def generate(llm: str, args: argparse.Namespace) -> Callable:
    from espnet_llm_plugin.llm.backbone import load_causal_lm

    model = load_causal_lm(Path(llm), dtype=args.dtype).to(args.device)
    table = model.get_input_embeddings()
    audio = [
        one.to(args.device, table.weight.dtype) for one in make_audio(args, table.weight.shape[1])
    ]
    bos = table(torch.tensor([BOS], device=args.device))
    rows = [torch.cat([one, bos]) for one in audio]
    longest = max(map(len, rows))
    embeddings = torch.stack(
        [torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows]
    )
    places = torch.arange(longest, device=args.device)
    mask = torch.stack([places >= longest - len(row) for row in rows]).long()
    options = generation(args, wanted_tokens(args))

    @torch.inference_mode()
    def run():
        found = model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
        return found.tolist()

    return run


def espnet(llm: str, args: argparse.Namespace) -> Callable:
    from espnet2.asr.decoder.hugging_face_transformers_decoder import (
        HuggingFaceTransformersDecoder,
    )

    from espnet_llm_plugin.llm.backbone import load_causal_lm

    model = load_causal_lm(Path(llm), dtype=args.dtype).to(args.device)
    table = model.get_input_embeddings().weight
    # ESPnet's asr_inference loads the LLM a second time for generate; the weights are the same.
    decoder = HuggingFaceTransformersDecoder(
        len(table), table.shape[1], llm, causal_lm=True, prefix="", postfix=""
    )
    decoder = decoder.to(args.device).eval()
    # An empty prompt encodes to an empty tensor; the start symbol takes the prompt's place.
    nothing = table.new_zeros(1, 0, table.shape[1])
    decoder.prefix, decoder.postfix = nothing, table[None, BOS : BOS + 1].detach()
    audio = [one.to(args.device, table.dtype) for one in make_audio(args, table.shape[1])]

    def one_utterance(embeddings: torch.Tensor, wanted: int) -> list[int]:
        # the lines of espnet2.bin.asr_inference.Speech2Text.__call__
        forward_args, _ = decoder.add_prefix_postfix(
            embeddings[None],
            torch.tensor([len(embeddings)], device=args.device),
            torch.ones([1, 1], dtype=int, device=args.device),
            torch.ones([1], dtype=int, device=args.device),
        )
        shape = [1, forward_args["inputs_embeds"].shape[1]]
        input_ids = torch.ones(shape, dtype=int, device=args.device)
        yseq = model.generate(
            input_ids.repeat(args.beam, 1),
            inputs_embeds=forward_args["inputs_embeds"].repeat(args.beam, 1, 1),
            attention_mask=input_ids.repeat(args.beam, 1),
            **generation(args, [wanted]),
        )
        return yseq[0, shape[1] :].tolist()

    @torch.inference_mode()
    def run():
        return [one_utterance(*one) for one in zip(audio, wanted_tokens(args))]

    return run


# ----------------------------------------------------------------------------------- measuring


def work(args: argparse.Namespace) -> None:
    """Serve one row; see :mod:`measuring`."""
    torch.set_num_threads(args.threads)
    make = {"ours": ours, "generate": generate, "espnet": espnet}[args.worker]
    serve(make(args.llm, args), args.device)


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    names = ("vocab", "hidden", "layers", "heads", "kv_heads", "audio", "tokens", "threads")
    shared = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    shared += ["--device", args.device, "--dtype", args.dtype, "--ends", args.ends]
    with tempfile.TemporaryDirectory() as directory:
        llm = args.llm or str(make_llm(Path(directory) / "llm", args))
        for batch in args.batches:
            for beam in args.beams:
                some = [dict(search=name, batch=batch, beam=beam) for name in args.searches]

                def options(row: dict) -> list[str]:
                    own = ["--batch", str(row["batch"]), "--beam", str(row["beam"])]
                    own += ["--beams", str(row["beam"])]
                    return ["--worker", row["search"], "--llm", llm, *own, *shared]

                compare(some, options, args.repeats)
                rows += some
    return rows


def show(rows: list[dict], args: argparse.Namespace) -> str:
    """A table; speed-ups of ours against each peer at the same batch and beam."""
    ours_of = {(r["batch"], r["beam"]): r for r in rows if r["search"] == "ours"}
    lines = [
        "|batch|beam|search|ms a token|utt/s|peak MB|ours is faster|needs less memory|same tokens|",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mine = ours_of.get((row["batch"], row["beam"]))
        faster = less = same = ""
        if mine is not None and mine is not row:
            faster = f"{row[args.time] / mine[args.time]:.2f}x"
            less = f"{row['memory_bytes'] / max(1.0, mine['memory_bytes']):.1f}x"
            # the last token may be the end symbol, and padding may follow
            lengths = [len(tokens) - 1 for tokens in mine["result"]]
            pairs = zip(row["result"], mine["result"], lengths)
            equal = sum(a[:length] == b[:length] for a, b, length in pairs)
            same = f"{equal} of {row['batch']}"
        lines.append(
            f"|{row['batch']}|{row['beam']}|{ROWS[row['search']]}"
            f"|{1e3 * row[args.time] / args.tokens:.1f}|{row['batch'] / row[args.time]:.2f}"
            f"|{row['memory_bytes'] / 1e6:.0f}|{faster}|{less}|{same}|"
        )
    return "\n".join(lines)


def main(cmd: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llm", help="directory of an LLM instead of random weights")
    parser.add_argument("--family", choices=["llama", "bloom"], default="llama")
    parser.add_argument("--vocab", type=int, default=5000)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv_heads", type=int, default=0, help="0: as many as heads")
    parser.add_argument("--audio", type=int, default=150, help="embeddings of the longest audio")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--searches", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--ends", default="together", choices=["together", "apart"])
    parser.add_argument(
        "--time",
        default="median_s",
        choices=["median_s", "best_s", "best_cpu_s"],
        help="of the runs; on a machine that does other things too the best processor time",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="also write the rows into this file")
    for name in ("worker", "batch", "beam"):  # of a worker process
        kind = str if name == "worker" else int
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(cmd)
    if args.ends == "apart" and args.beams != [1]:
        parser.error("--ends apart is for --beams 1: peers would weigh the end symbol")
    if args.worker:
        work(args)
        return
    rows = measure(args)
    print(f"{args.threads} threads, {args.device}, {args.dtype}, torch {torch.__version__}\n")
    print(show(rows, args))
    if args.json:
        for row in rows:
            row.pop("result")
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
