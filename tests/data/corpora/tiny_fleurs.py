"""FLEURS of two languages in either of its layouts: tones with three transcripts."""

from espnet_llm_plugin.data.corpora.fleurs import NAMES, SPLITS
from tests.data.corpora.conftest import write_audio

TEXTS = {"hi": ("यह किताब है।", "मेरा Phone"), "ur": ("یہ کتاب ہے۔", "دن")}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def row(number, name, text, samples=3200, gender="FEMALE"):
    return [str(number), name, text, text.rstrip("।۔"), "x |", str(samples), gender]


def make_fleurs(root, layout):
    """Hindi and Urdu; sentence 7 is read twice, once by a man."""
    for lang, texts in TEXTS.items():
        name = NAMES[lang]
        audio, tables = (
            (root / name, root / "metadata" / name)
            if layout == "lhotse"
            else (root / "data" / name / "audio", root / "data" / name)
        )
        for split in SPLITS:
            rows = [
                row(7, f"{split}{lang}1.wav", texts[0]),
                row(7, f"{split}{lang}2.wav", texts[0], gender="MALE"),
                row(9, f"{split}{lang}3.wav", texts[1], gender="OTHER"),
            ]
            write_rows(tables / f"{split}.tsv", rows)
            for _, file, *_ in rows:
                write_audio(audio / split / file, 0.2)
    return root
