#!/usr/bin/env python3
"""Streaming encoders against ESPnet's: time of whole utterances, and of chunks of a long stream.

All encoders have the same number of layers and the same widths, random weights and random input.
Whole utterances: forward (evaluation) and forward + backward (training), taken in turns, one
encoder after the other, so that all of them meet the same load. Stream: the compute time of a chunk
as the stream gets longer; it must not grow. Times are CPU times of the process, all threads, and so
do not depend on what else the machine does.
"""

import argparse
import statistics
import time

import torch

from espnet_llm_plugin.compat import quiet_imports

FEATURES = 80
FRAMES_PER_SECOND = 100


def build(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """Encoders by name; those of this package with chunks of 160 and 640 ms."""
    with quiet_imports():
        from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
        from espnet2.asr.encoder.contextual_block_conformer_encoder import (
            ContextualBlockConformerEncoder,
        )

        from espnet_llm_plugin.encoder.emformer import EmformerEncoder
        from espnet_llm_plugin.encoder.streaming_conformer import StreamingConformerEncoder
    size = dict(
        output_size=args.width,
        attention_heads=args.heads,
        linear_units=args.linear_units,
        num_blocks=args.layers,
    )
    espnet = dict(
        macaron_style=True, use_cnn_module=True, cnn_module_kernel=15, activation_type="swish"
    )
    return {
        "espnet conformer": ConformerEncoder(
            FEATURES,
            **size,
            **espnet,
            pos_enc_layer_type="rel_pos",
            selfattention_layer_type="rel_selfattn",
            rel_pos_type="latest",
        ),
        # blocks that advance by 640 ms, with as much look-ahead
        "espnet contextual_block_conformer": ContextualBlockConformerEncoder(
            FEATURES, **size, **espnet, block_size=40, hop_size=16, look_ahead=16
        ),
        "streaming_conformer 160 ms": StreamingConformerEncoder(FEATURES, **size),
        "streaming_conformer 160 + 40 ms": StreamingConformerEncoder(
            FEATURES, **size, right_context=4
        ),
        "streaming_conformer 640 ms": StreamingConformerEncoder(FEATURES, **size, chunk_size=64),
        "emformer 160 + 40 ms": EmformerEncoder(FEATURES, **size),
    }


def measure_utterances(encoders: dict[str, torch.nn.Module], args: argparse.Namespace) -> None:
    frames = int(args.seconds * FRAMES_PER_SECOND)
    x = torch.randn(args.batch, frames, FEATURES)
    lengths = torch.full((args.batch,), frames)
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(args.turns + 1):
        for name, encoder in encoders.items():
            for what in ("forward", "training"):
                encoder.train(what == "training")
                begin = time.process_time()
                with torch.set_grad_enabled(what == "training"):
                    output = encoder(x, lengths)[0]
                if what == "training":
                    output.sum().backward()
                    encoder.zero_grad()
                if turn:  # the first warms up
                    times.setdefault((name, what), []).append(time.process_time() - begin)
    print(
        f"\n{args.batch} utterances of {args.seconds:g} s, {args.threads} thread(s), CPU seconds:\n"
    )
    print("| encoder | M parameters | forward: median (fastest) | + backward: median (fastest) |")
    print("| --- | --- | --- | --- |")
    for name, encoder in encoders.items():
        millions = sum(p.numel() for p in encoder.parameters()) / 1e6
        cells = [
            f"{statistics.median(times[name, what]):.3f} ({min(times[name, what]):.3f})"
            for what in ("forward", "training")
        ]
        print(f"| {name} | {millions:.1f} | {' | '.join(cells)} |")


def measure_stream(encoders: dict[str, torch.nn.Module], args: argparse.Namespace) -> None:
    checkpoints = [10.0, 60.0, args.stream_seconds]
    print("\nOne stream, CPU milliseconds a chunk: median of 50 chunks\n")
    print("| encoder | " + " | ".join(f"after {seconds:g} s" for seconds in checkpoints) + " |")
    print("| --- |" + " --- |" * len(checkpoints))
    for name, encoder in encoders.items():
        if not hasattr(encoder, "infer"):
            continue
        encoder.eval()
        chunk = torch.randn(1, encoder.chunk_size, FEATURES)
        state, cells, done = encoder.initial_state(), [], 0
        for seconds in checkpoints:
            # up to here at once, chunk after chunk from here
            ahead = int(seconds * FRAMES_PER_SECOND) - done
            for piece in torch.randn(1, ahead, FEATURES).split(1000, dim=1):
                _, state = encoder.infer(piece, state)
            times = []
            for _ in range(50):
                begin = time.process_time()
                _, state = encoder.infer(chunk, state)
                times.append(time.process_time() - begin)
            done += ahead + 50 * encoder.chunk_size
            cells.append(f"{1000 * statistics.median(times):.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--linear_units", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2, help="utterances")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of an utterance")
    parser.add_argument("--stream_seconds", type=float, default=600.0, help="length of the stream")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.stream_seconds < 100:
        parser.error("--stream_seconds must be at least 100: after a minute comes a second part")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    encoders = build(args)
    measure_utterances(encoders, args)
    measure_stream(encoders, args)


if __name__ == "__main__":
    main()
