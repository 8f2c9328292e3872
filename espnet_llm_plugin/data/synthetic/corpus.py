"""Make the synthetic corpus: sentences, speech with noise, Kaldi data directories, statistics."""

import hashlib
import io
import json
import math
import random
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Optional, Sequence, Union

import numpy as np
import soundfile

from espnet_llm_plugin.data.atomic import atomic_write
from espnet_llm_plugin.data.disk import writing
from espnet_llm_plugin.data.kaldi import DataDir, read_clean_table, write_data_dir, write_table
from espnet_llm_plugin.data.synthetic import noise, text
from espnet_llm_plugin.data.synthetic.jobs import in_fresh_processes
from espnet_llm_plugin.data.synthetic.speech import (
    FASTEST,
    SAMPLE_RATE,
    SLOWEST,
    Speaker,
    Synthesizer,
    espeak_library,
    speakers,
)
from espnet_llm_plugin.errors import UserError

VERSION = 1  # to be raised when the same plans (text, speaker, rate) give other audio
BATCH = 50  # utterances synthesised by one process, in a fixed order
BABBLE_VOICES = 24
SPLITS = ("train", "dev", "test")
_REPORT = "corpus.json"
_PART = ".part."  # prefix of directories that are being filled


@dataclass(frozen=True)
class Sizes:
    """Number of utterances of each set (``lm``: text only)."""

    train: int
    dev: int
    test: int
    lm: int

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            if count < 1:
                raise UserError(f"the set {name!r} must have at least 1 utterance, not {count}")


PRESETS = {"tiny": Sizes(120, 20, 20, 2000), "mini": Sizes(3000, 150, 400, 55000)}


class Utterance(NamedTuple):
    """What is spoken, by whom and how fast; ``seed`` names its noise."""

    name: str
    text: str
    speaker: Speaker
    rate: int
    seed: tuple[int, int, int]


def make_texts(sizes: Sizes, seed: int) -> dict[str, list[text.Sentence]]:
    """Sentences of ``train``, ``dev``, ``test`` and ``lm``; no sentence occurs twice in them.

    Test and dev come first, so that they do not change with the sizes of the other sets.
    """
    seen: set = set()
    return {
        split: text.generate(f"{seed} {split}", getattr(sizes, split), seen)
        for split in ("test", "dev", "train", "lm")
    }


def read_texts(directory: Union[str, Path], sizes: Sizes) -> dict[str, list[text.Sentence]]:
    """The first sentences of ``<directory>/{test,dev,train,lm}/text`` (`id words ...` a line).

    Raises:
        UserError: A missing or malformed file, one with fewer sentences than asked for, or with
            characters other than ``[a-z' ]``.
    """
    texts = {}
    for split in ("test", "dev", "train", "lm"):
        path, count = Path(directory) / split / "text", getattr(sizes, split)
        lines = list(read_clean_table(path).items())
        if len(lines) < count:
            raise UserError(f"{path} has {len(lines)} sentences; {count} are asked for")
        for utterance, sentence in lines[:count]:
            if not re.fullmatch(r"[a-z' ]+", sentence):
                raise UserError(
                    f"{path}: {utterance} has characters other than a-z, apostrophe and space: "
                    f"{sentence!r}"
                )
        texts[split] = [text.Sentence(sentence, None, "") for _, sentence in lines[:count]]
    return texts


def plan_utterances(sentences: Sequence[text.Sentence], split: str, seed: int) -> list[Utterance]:
    """Give every sentence a speaker (in turn), a rate and a name that starts with the speaker."""
    voices = speakers(split)
    rng = random.Random(f"{seed} {split} voices")
    rng.shuffle(voices)
    utterances = []
    for index, sentence in enumerate(sentences):
        speaker = voices[index % len(voices)]
        rate = SLOWEST + int(rng.random() * (FASTEST - SLOWEST + 1))
        name = f"{speaker.name}_{split}{index:05d}"
        utterances.append(
            Utterance(name, sentence.text, speaker, rate, (seed, SPLITS.index(split), index))
        )
    return utterances


def _speak_clean(utterances: Sequence[Utterance], path: Path) -> None:
    """Speech without noise, as the voices of the babble."""
    synthesizer = Synthesizer()
    waves = [synthesizer.speak(u.text, u.speaker, u.rate) for u in utterances]
    with atomic_write(path, "wb") as stream:
        np.savez(stream, *waves)


def _speak_batch(utterances: Sequence[Utterance], directory: Path, voices: Path) -> None:
    """Write ``directory/<name>.wav`` of all ``utterances``; the directory appears when complete."""
    with np.load(voices) as stored:
        talkers = [stored[name] for name in stored.files]
    directory.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=_PART, dir=directory.parent))
    part.chmod(directory.parent.stat().st_mode)  # mkdtemp makes private directories
    try:
        synthesizer = Synthesizer()
        for utterance in utterances:
            rng = np.random.default_rng(utterance.seed)
            clean = synthesizer.speak(utterance.text, utterance.speaker, utterance.rate)
            margins = rng.integers(SAMPLE_RATE // 20, SAMPLE_RATE // 8, size=2)
            wave = noise.degrade(np.pad(clean, margins), talkers, rng)
            contents = io.BytesIO()  # soundfile's own writing does not notice a full disk
            soundfile.write(contents, wave, SAMPLE_RATE, format="WAV", subtype="PCM_16")
            (part / f"{utterance.name}.wav").write_bytes(contents.getbuffer())
        part.rename(directory)
    except BaseException:
        shutil.rmtree(part)
        raise


def _key(plans: dict[str, list[Utterance]], lm: list[text.Sentence]) -> str:
    digest = hashlib.sha256(f"version {VERSION}\n".encode())
    for split in SPLITS:
        for utterance in plans[split]:
            digest.update(f"{split} {utterance}\n".encode())
    for sentence in lm:
        digest.update(f"{sentence.text}\n".encode())
    return digest.hexdigest()[:16]


def _existing(output: Path, key: str) -> Optional[dict]:
    """The report of a complete corpus made with the same key."""
    try:
        report = json.loads((output / "synthetic" / _REPORT).read_text(encoding="utf-8"))
        if report["key"] != key:
            return None
        for split in SPLITS:
            for line in (output / split / "wav.scp").read_text(encoding="utf-8").splitlines():
                if not Path(line.split(maxsplit=1)[1]).is_file():
                    return None
            for name in ("text", "utt2spk", "spk2utt"):
                if not (output / split / name).is_file():
                    return None
        if not ((output / "lm_train" / "text").is_file() and (output / "lm_train.txt").is_file()):
            return None
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return report


def make_corpus(
    output_dir: Union[str, Path],
    sizes: Sizes,
    seed: int = 0,
    nj: int = 1,
    text_dir: Optional[Union[str, Path]] = None,
) -> tuple[dict, bool]:
    """Make the corpus in ``output_dir``, unless the same one is already there.

    Writes ``<set>/{wav.scp,text,utt2spk,spk2utt}`` for train, dev and test, ``lm_train/text``
    (with ids), ``lm_train.txt`` (one sentence a line), audio and ``synthetic/corpus.json`` (the
    report). The same arguments (``nj`` apart) give the same bytes. A run that was interrupted
    continues with the batches of audio that are missing. Paths in ``wav.scp`` start with
    ``output_dir`` as given.

    Args:
        output_dir: Usually ``data``. Audio of other seeds or sizes in it is removed.
        sizes: Utterances of each set.
        seed: Any integer >= 0.
        nj: Number of processes.
        text_dir: Speak these sentences (see :func:`read_texts`) instead of the grammar's.

    Returns:
        The report (see :func:`describe`), and whether anything was made.

    Raises:
        UserError: espeakng-loader is missing, a size or ``nj`` is not positive, a seed is negative,
            the sentences cannot be used, or a file cannot be written (full disk, no permission).
    """
    if nj < 1:
        raise UserError(f"nj must be at least 1, not {nj}")
    if seed < 0:
        raise UserError(f"the seed must not be negative: {seed}")
    output = Path(output_dir)
    texts = make_texts(sizes, seed) if text_dir is None else read_texts(text_dir, sizes)
    plans = {split: plan_utterances(texts[split], split, seed) for split in SPLITS}
    key = _key(plans, texts["lm"])
    report = _existing(output, key)
    if report is not None:
        return report, False
    espeak_library()
    with writing(output):
        paths = _speak(plans, output / "synthetic", key, nj)
        _write_tables(output, texts["lm"], plans, paths)
        report = {"key": key, "seed": seed, "sizes": asdict(sizes)}
        report["sets"] = describe(texts, plans, paths)
        with atomic_write(output / "synthetic" / _REPORT) as stream:  # last: it is all there
            json.dump(report, stream, indent=2)
            stream.write("\n")
    return report, True


def _speak(plans: dict[str, list[Utterance]], own: Path, key: str, nj: int) -> dict[str, Path]:
    """Make the audio that is missing; returns the file of every utterance."""
    # 1. Clear what another seed or size has left, the sign of completeness first.
    (own / _REPORT).unlink(missing_ok=True)
    audio = own / key
    if own.is_dir():
        for stale in own.iterdir():
            if stale != audio and re.fullmatch(r"[0-9a-f]{16}", stale.name):
                shutil.rmtree(stale)
    for stale in audio.glob(f"*/{_PART}*"):  # of a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    audio.mkdir(parents=True, exist_ok=True)

    # 2. Speak the missing batches. The babble's voices come from sentences of train.
    voices = audio / "babble.npz"
    module = _speak_batch.__module__
    if not voices.exists():
        clean = (plans["train"][:BABBLE_VOICES], voices)
        list(in_fresh_processes(_speak_clean, [clean], 1, module))
    paths: dict[str, Path] = {}
    calls = []
    for split, plan in plans.items():
        for start in range(0, len(plan), BATCH):
            batch = plan[start : start + BATCH]
            directory = audio / split / f"{start // BATCH:03d}"
            paths.update({u.name: directory / f"{u.name}.wav" for u in batch})
            if not all(paths[u.name].is_file() for u in batch):
                shutil.rmtree(directory, ignore_errors=True)
                calls.append((batch, directory, voices))
    for _ in in_fresh_processes(_speak_batch, calls, nj, module):
        pass
    return paths


def _write_tables(
    output: Path,
    lm: list[text.Sentence],
    plans: dict[str, list[Utterance]],
    paths: dict[str, Path],
) -> None:
    for split, plan in plans.items():
        data = DataDir(
            path=output / split,
            wav={u.name: str(paths[u.name]) for u in plan},
            utt2spk={u.name: u.speaker.name for u in plan},
            text={u.name: u.text for u in plan},
        )
        write_data_dir(data, output / split)
    lm_text = {f"lm_{i:06d}": s.text for i, s in enumerate(lm)}
    write_table(output / "lm_train" / "text", lm_text)
    with atomic_write(output / "lm_train.txt") as stream:
        stream.writelines(f"{s.text}\n" for s in lm)


def describe(
    texts: dict[str, list[text.Sentence]],
    plans: dict[str, list[Utterance]],
    paths: dict[str, Path],
) -> dict:
    """Statistics by set.

    ``grammar_ppl`` is the word perplexity of the generator's own derivations: an upper bound of
    what an ideal LM reaches (absent for other sentences). ``homophones`` is the share of running
    words that sound like a word of another topic, ``oov_train`` and ``oov_lm`` the shares that the
    transcripts of train and the LM text lack.
    """
    ambiguous = text.spellings()
    known = {
        split: {word for s in texts[split] for word in s.text.split()} for split in ("train", "lm")
    }
    sets = {}
    for split, sentences in texts.items():
        words = [word for s in sentences for word in s.text.split()]
        row = {
            "utterances": len(sentences),
            "words": len(words),
            "vocabulary": len(set(words)),
            "homophones": sum(word in ambiguous for word in words) / len(words),
            "oov_train": sum(word not in known["train"] for word in words) / len(words),
            "oov_lm": sum(word not in known["lm"] for word in words) / len(words),
        }
        if sentences[0].log_prob is not None:
            row["grammar_ppl"] = math.exp(-sum(s.log_prob for s in sentences) / len(words))
        if split in plans:
            seconds = sum(soundfile.info(paths[u.name]).frames / SAMPLE_RATE for u in plans[split])
            row["hours"] = seconds / 3600.0
            row["words_per_second"] = len(words) / seconds
            row["speakers"] = len({u.speaker.name for u in plans[split]})
        sets[split] = row
    return sets
