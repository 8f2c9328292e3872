#!/usr/bin/env python3
"""Long recordings and a speech LLM: left whole, and cut in silence or in CTC blanks.

Recordings are utterances of one speaker, one after the other with a pause, so that the error rate
of the utterances themselves is what the cutting could reach at best. Each row is a run of
`bin.asr_inference` in a process of its own: error rate, errors by kind, time per second of audio,
and the process's peak memory.

    cd egs2/stories/asr1
    model=exp/full_stories260K/offline_e10_s1/asr_sl_lora8
    python ../../../benchmarks/long_form.py --asr ${model} --data dump/full_stories260K/raw/test \\
        --config ${model}/decode_joint/tune/best.yaml
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple

import jiwer
import numpy as np
import soundfile

from espnet_llm_plugin.data.kaldi import read_clean_table
from espnet_llm_plugin.errors import UserError, run_cli


class Recording(NamedTuple):
    """Some utterances of a speaker."""

    name: str
    samples: np.ndarray
    rate: int
    text: str
    utterances: list[str]


@dataclass
class Row:
    """A line of the table."""

    method: str
    words: jiwer.WordOutput
    rtf: float | None
    peak_bytes: float
    failed: int

    def line(self) -> str:
        """As Markdown."""
        words = self.words
        total = words.hits + words.substitutions + words.deletions
        errors = (words.insertions, words.deletions, words.substitutions)
        kinds = " / ".join(f"{100 * number / total:.2f}" for number in errors)
        rtf = "-" if self.rtf is None else f"{self.rtf:.3f}"
        return (
            f"| {self.method} | {100 * sum(errors) / total:.2f} | {kinds} | {self.failed} | "
            f"{rtf} | {self.peak_bytes / 1e6:.0f} |"
        )


def main(cmd: list[str] | None = None) -> None:
    args = get_parser().parse_args(cmd)
    data = Path(args.data)
    if args.join < 2:
        raise UserError(f"--join {args.join}: expected at least 2 utterances")
    with tempfile.TemporaryDirectory() as place:
        recordings = list(itertools.islice(joined(data, args.join, args.pause), args.recordings))
        if not recordings:
            raise UserError(f"--join {args.join}: no speaker of {data} has so many utterances")
        seconds = [len(one.samples) / one.rate for one in recordings]
        print(
            f"{len(recordings)} recordings of {args.join} utterances, {min(seconds):.0f} to "
            f"{max(seconds):.0f} s\n"
        )
        print("| method | WER | ins / del / sub | failed | time / audio | peak MB |")
        print("| --- | --- | --- | --- | --- | --- |")
        long = Path(place) / "long"
        write(long, recordings)
        alone = Path(place) / "alone"
        alone.mkdir()
        table = read_clean_table(data / "wav.scp")
        keys = [utterance for one in recordings for utterance in one.utterances]
        alone.joinpath("wav.scp").write_text("".join(f"{key} {table[key]}\n" for key in keys))
        for method in args.methods:
            runs = [method] if method in ("alone", "whole") else []
            runs = runs or [f"{method} {longest:g}" for longest in args.max_segment_seconds]
            for run in runs:
                source = alone if run == "alone" else long
                print(measure(args, run, source, Path(place) / run, recordings).line(), flush=True)


def joined(data: Path, number: int, pause: float) -> Iterator[Recording]:
    """Recordings, by speaker in turns."""
    audio, text = read_clean_table(data / "wav.scp"), read_clean_table(data / "text")
    speakers = read_clean_table(data / "utt2spk")
    of_speaker: dict[str, list[str]] = {}
    for utterance in audio:
        of_speaker.setdefault(speakers[utterance], []).append(utterance)
    groups = [
        [list(group) for group in zip(*[iter(utterances)] * number)]
        for utterances in of_speaker.values()
    ]
    for turn in itertools.zip_longest(*groups):
        for utterances in filter(None, turn):
            parts = []
            for utterance in utterances:
                samples, rate = soundfile.read(audio[utterance], dtype="float32")
                parts += [samples, np.zeros(int(pause * rate), dtype="float32")]
            words = " ".join(text[utterance] for utterance in utterances)
            yield Recording(f"{utterances[0]}_long", np.concatenate(parts), rate, words, utterances)


def write(directory: Path, recordings: list[Recording]) -> None:
    """Audio files and wav.scp."""
    directory.mkdir()
    lines = []
    for one in recordings:
        path = directory / f"{one.name}.flac"
        soundfile.write(path, one.samples, one.rate)
        lines.append(f"{one.name} {path}\n")
    directory.joinpath("wav.scp").write_text("".join(lines))


def measure(
    args: argparse.Namespace, run: str, source: Path, out: Path, recordings: list[Recording]
) -> Row:
    """Decode ``source`` in a process of its own."""
    model = Path(args.asr)
    command = [sys.executable, "-m", "espnet_llm_plugin.bin.asr_inference"]
    command += ["--asr_train_config", str(model / "config.yaml"), "--num_workers", "0"]
    command += ["--asr_model_file", str(model / args.asr_model), "--output_dir", str(out)]
    command += ["--data_path_and_name_and_type", f"{source}/wav.scp,speech,sound"]
    command += [] if args.config is None else ["--config", args.config]
    if run not in ("alone", "whole"):
        method, longest = run.split()
        command += ["--long_form", method, "--max_segment_seconds", longest]
        command += ["--batch_size", str(args.batch_size)]
    with (out.parent / f"{run}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    # a failure of every recording is a result, too
    if status and not (out / "rtf.json").is_file():
        raise UserError(f"{run}: {(out.parent / f'{run}.log').read_text()[-2000:]}")
    summary = json.loads((out / "rtf.json").read_text())
    found = read_clean_table(out / "1best_recog/text", may_be_empty=True)
    hypotheses = [
        " ".join(found.get(utterance, "") for utterance in one.utterances)
        if run == "alone"
        else found.get(one.name, "")
        for one in recordings
    ]
    return Row(
        run if run in ("alone", "whole") else f"{run} s",
        jiwer.process_words([one.text for one in recordings], hypotheses),
        summary["rtf"],
        1024.0 * usage.ru_maxrss,
        len(summary["failed"]),
    )


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--asr", required=True, help="experiment of a speech LLM with a CTC")
    parser.add_argument("--asr_model", default="valid.loss.ave.pth")
    parser.add_argument("--data", required=True, help="wav.scp, text, utt2spk")
    parser.add_argument("--config", help="decoding options, e.g. a tuned best.yaml")
    parser.add_argument("--join", type=int, default=20, help="utterances of a recording")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between them")
    parser.add_argument("--recordings", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8, help="segments searched together")
    parser.add_argument(
        "--methods", nargs="+", default=["alone", "whole", "silence", "ctc"], metavar="METHOD"
    )
    parser.add_argument("--max_segment_seconds", nargs="+", type=float, default=[5.0, 10.0])
    return parser


if __name__ == "__main__":
    run_cli(main)
