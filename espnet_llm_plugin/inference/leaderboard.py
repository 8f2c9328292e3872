"""Decode and score the leaderboard's test sets with one model: the body of ``bin/leaderboard``.

Layout of the output directory::

    <set>/{org,data,archives}     the test set as data directories (where it is decoded)
    <set>/decode                  of bin.asr_inference
    <set>/decoded.json            what was decoded, so that another normaliser does not do it again
    <set>/scores.json             written last: a set that has it is finished
    leaderboard.{md,json,png}     all sets
"""

import argparse
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional, Union

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.leaderboard_sets import (
    Source,
    find_source,
    given_source,
    prepare_audio,
    read_references,
)
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.leaderboard import (
    SPLITS,
    Leaderboard,
    SplitScore,
    is_scored,
    score_split,
)
from espnet_llm_plugin.scoring.leaderboard_plot import plot_leaderboard
from espnet_llm_plugin.scoring.normalizers import build_normalizer
from espnet_llm_plugin.scoring.trn import read_keyed

SCORES = "scores.json"
DECODED = "decoded.json"
RTF = "rtf.json"

# From wav.scp and an output directory to the options of bin.asr_inference.
Options = Callable[[Path, Path], argparse.Namespace]


@dataclass
class Hypotheses:
    """Texts by utterance; seconds of audio and of recognising it (None: not known)."""

    texts: dict[str, str]
    audio_seconds: Optional[float] = None
    seconds: Optional[float] = None


@dataclass
class Decoder:
    """Decodes test sets one after the other; the model is loaded once.

    Args:
        options: Makes the options of a decoding.
        fs: Sampling rate of the model in Hz.
        nj: Processes that prepare the audio.
    """

    options: Options
    fs: int = 16000
    nj: int = 1
    _recognizer: Any = field(default=None, init=False)

    def has(self, name: str, source: Source) -> bool:
        """Whether there are, or will be, hypotheses of a test set."""
        return True

    def identity(self, name: str, source: Source) -> dict[str, Any]:
        """What the hypotheses depend on besides the test set."""
        from espnet_llm_plugin.inference.options import identity

        args = self.options(Path("wav.scp"), Path("out"))
        files = [args.asr_train_config, args.asr_model_file, args.lm_file, args.predictor_file]
        return {"fs": self.fs, **identity(args, files)}

    def __call__(
        self, name: str, source: Source, keys: Collection[str], directory: Path
    ) -> Hypotheses:
        """Decode into ``directory/decode``, going on where an earlier run stopped."""
        text = directory / "decode" / "1best_recog" / "text"
        made_from = {**self.identity(name, source), "source": source.identity()}
        made_from = json.loads(json.dumps({**made_from, "keys": sorted(keys)}))
        mark = directory / DECODED
        if mark.is_file() and text.is_file():
            known = json.loads(mark.read_text(encoding="utf-8"))
            if known.pop("made_from") == made_from:
                return Hypotheses(read_hypotheses(text), **known)
        mark.unlink(missing_ok=True)
        data, audio_seconds = prepare_audio(source, keys, directory, fs=self.fs, nj=self.nj)
        args = self.options(data / "wav.scp", directory / "decode")
        seconds = self._decode(args)
        with atomic_write(mark) as stream:
            known = {"audio_seconds": audio_seconds, "seconds": seconds}
            json.dump({"made_from": made_from, **known}, stream)
        return Hypotheses(read_hypotheses(text), **known)

    def _decode(self, args: argparse.Namespace) -> float:
        """Seconds that it took."""
        from espnet_llm_plugin.inference import decode as module
        from espnet_llm_plugin.inference.espnet_search import decode_with_espnet

        if args.search == "espnet":  # loads the model for every test set, which counts as its time
            start = time.perf_counter()
            decode_with_espnet(args)
            return time.perf_counter() - start
        if self._recognizer is None:
            self._recognizer = module.build_recognizer(args)
        return _seconds(module.decode(args, self._recognizer))


@dataclass
class Existing:
    """Hypotheses of an earlier decoding: ``<hyp_dir>/<set>/text``, or ``.../1best_recog/text``.

    ``<set>`` is the name of the test set, or that of its data directory.
    """

    hyp_dir: Path

    def find(self, name: str, source: Source) -> Optional[Path]:
        """The file with the hypotheses of a set."""
        for place in (name, source.path.name):
            for file in ("text", "1best_recog/text"):
                if (self.hyp_dir / place / file).is_file():
                    return self.hyp_dir / place / file
        return None

    def has(self, name: str, source: Source) -> bool:
        """Whether there are hypotheses of a test set."""
        return self.find(name, source) is not None

    def identity(self, name: str, source: Source) -> dict[str, Any]:
        """File, size and time."""
        stat = self.find(name, source).stat()
        return {str(self.find(name, source)): [stat.st_size, stat.st_mtime]}

    def __call__(
        self, name: str, source: Source, keys: Collection[str], directory: Path
    ) -> Hypotheses:
        """Read them, and the time they took where the decoding noted it."""
        file = self.find(name, source)
        texts = read_hypotheses(file)
        place = file.parent.parent if file.parent.name == "1best_recog" else file.parent
        noted = [place / RTF] if (place / RTF).is_file() else place.glob(f"logdir/output.*/{RTF}")
        jobs = [json.loads(path.read_text(encoding="utf-8")) for path in noted]
        if not jobs:
            return Hypotheses(texts)
        audio_seconds = sum(job["audio_seconds"] for job in jobs)
        return Hypotheses(texts, audio_seconds, sum(map(_seconds, jobs)))


def _seconds(summary: Mapping[str, Any]) -> float:
    """Of computing, by a decoding's ``rtf.json``."""
    return summary["encoder_seconds"] + summary["search_seconds"]


def read_hypotheses(path: Path) -> dict[str, str]:
    """A Kaldi ``text`` file; an error that says what is missing if it is not there."""
    if not path.is_file():
        raise UserError(f"there is no {path}: the model has no token_type, hence no text")
    return read_keyed(path)


def find_sets(
    root: Optional[Path], given: Mapping[str, Path], names: Sequence[str]
) -> tuple[dict[str, Source], tuple[str, ...]]:
    """The test sets that are there, and the names of those that are not.

    Raises:
        UserError: An unknown name, no such directory, or not one test set.
    """
    for name in [*given, *names]:
        if name not in SPLITS:
            raise UserError(f"there is no test set '{name}'; expected some of {', '.join(SPLITS)}")
    if root is not None and not root.is_dir():
        raise UserError(f"--test_sets {root} is not a directory")
    sources, skipped = {}, []
    for name, split in SPLITS.items():
        if names and name not in names and name not in given:
            continue
        if name in given:
            source = given_source(given[name])
        else:
            source = find_source(root, name, split.config, split.split)
        if source is None:
            skipped.append(name)
        else:
            sources[name] = source
    if not sources:
        raise UserError(
            f"not one of the test sets {', '.join(skipped)} is in {root}: expected a copy of "
            "hf-audio/esb-datasets-test-only-sorted (<config>/<split>-*.parquet), Kaldi data "
            "directories of these names, or --set NAME=DIR"
        )
    return sources, tuple(skipped)


def run(
    sources: Mapping[str, Source],
    skipped: tuple[str, ...],
    output_dir: Path,
    hypotheses: Union[Decoder, Existing],
    *,
    normalizer: str = "leaderboard",
    leaderboard_repo: Optional[str] = None,
    title: str = "Open ASR Leaderboard",
) -> Leaderboard:
    """Decode and score every test set, and write the table, the JSON file and the plot.

    Args:
        sources, skipped: Of :func:`find_sets`.
        output_dir: See above.
        hypotheses: A :class:`Decoder` or :class:`Existing`.
        normalizer, leaderboard_repo: See :func:`~.scoring.normalizers.build_normalizer`.
        title: Of the table and the plot.

    Raises:
        UserError: Bad test sets, options or models. What is finished is kept for the next run.
    """
    normalize = build_normalizer(normalizer, leaderboard_repo)
    without = tuple(name for name, source in sources.items() if not hypotheses.has(name, source))
    if len(without) == len(sources):
        raise UserError(
            f"{hypotheses.hyp_dir} has hypotheses of no test set; expected "
            f"{hypotheses.hyp_dir}/{without[0]}/text and the like"
        )
    skipped += without
    scores = {}
    for name in (name for name in sources if name not in without):
        source, directory = sources[name], output_dir / name
        depends = {
            "normalizer": [normalizer, leaderboard_repo],
            "source": source.identity(),
            "hypotheses": hypotheses.identity(name, source),
        }
        identity = json.loads(json.dumps(depends))
        score = _finished(directory / SCORES, identity)
        if score is not None:
            logging.info(f"{SPLITS[name].title}: finished before")
        else:
            logging.info(f"{SPLITS[name].title}: {source.path}")
            references, dropped = read_references(source, lambda text: is_scored(normalize(text)))
            found = hypotheses(name, source, references, directory)
            score = score_split(
                references,
                found.texts,
                normalize,
                dropped=dropped,
                audio_seconds=found.audio_seconds,
                seconds=found.seconds,
            )
            with atomic_write(directory / SCORES) as stream:
                json.dump({"identity": identity, "score": score.as_dict()}, stream, indent=1)
        scores[name] = score
    order = {name: number for number, name in enumerate(SPLITS)}
    board = Leaderboard(title, normalizer, scores, tuple(sorted(skipped, key=order.__getitem__)))
    with atomic_write(output_dir / "leaderboard.json") as stream:
        json.dump(board.as_dict(), stream, indent=1)
        stream.write("\n")
    with atomic_write(output_dir / "leaderboard.md") as stream:
        stream.write(board.page())
    plot_leaderboard(board, output_dir / "leaderboard.png")
    return board


def _finished(path: Path, identity: Mapping[str, Any]) -> Optional[SplitScore]:
    """The score of an earlier run that depended on the same."""
    if not path.is_file():
        return None
    noted = json.loads(path.read_text(encoding="utf-8"))
    if noted["identity"] != identity:
        return None
    rates = ("wer", "wer_merged", "rtfx")
    return SplitScore(**{key: value for key, value in noted["score"].items() if key not in rates})
