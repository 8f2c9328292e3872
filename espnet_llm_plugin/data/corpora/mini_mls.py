"""A synthetic corpus in MLS's layout: eight languages, short sentences from one template each.

A sentence is subject + verb + object + place. The lists are made so that every combination is
grammatical (third person singular; articles and cases are part of the entries).
"""

import random
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.corpora.mini import Spoken, build
from espnet_llm_plugin.data.corpora.mls import LANGUAGES, SPLITS
from espnet_llm_plugin.data.synthetic.speech import Speaker

VOICES = {"en": "en-us"}  # espeak-ng's name where it is not the code
VARIANTS = {"train": ("m1", "f1", "m3", "f2"), "dev": ("m2",), "test": ("f3",)}
FLAC = ("pl",)  # languages that come as flac; the others as opus

# Subjects, verbs, objects, places; separated by commas.
GRAMMAR = {
    "en": (
        "the old man, a young woman, the doctor, my brother, the little girl, her friend",
        "sees, finds, sells, paints, forgets",
        "a white horse, the red book, a small boat, the long letter, an apple, the green door",
        "in the garden, at the market, by the river, behind the house, near the church",
    ),
    "de": (
        "der alte mann, eine junge frau, der arzt, mein bruder, das kleine mädchen, ihr freund",
        "sieht, findet, verkauft, malt, vergisst",
        "ein weißes pferd, das rote buch, ein kleines boot, den langen brief, einen apfel, "
        "die grüne tür",
        "im garten, auf dem markt, am fluss, hinter dem haus, neben der kirche",
    ),
    "nl": (
        "de oude man, een jonge vrouw, de dokter, mijn broer, het kleine meisje, haar vriend",
        "ziet, vindt, verkoopt, schildert, vergeet",
        "een wit paard, het rode boek, een kleine boot, de lange brief, een appel, de groene deur",
        "in de tuin, op de markt, bij de rivier, achter het huis, naast de kerk",
    ),
    "fr": (
        "le vieil homme, une jeune femme, le médecin, mon frère, la petite fille, son ami",
        "voit, trouve, vend, peint, oublie",
        "un cheval blanc, le livre rouge, un petit bateau, la longue lettre, une pomme, "
        "la porte verte",
        "dans le jardin, au marché, près de la rivière, derrière la maison, à côté de l'église",
    ),
    "es": (
        "el hombre viejo, una mujer joven, el médico, mi hermano, la niña pequeña, su amigo",
        "ve, encuentra, vende, pinta, olvida",
        "un caballo blanco, el libro rojo, un barco pequeño, la carta larga, una manzana, "
        "la puerta verde",
        "en el jardín, en el mercado, junto al río, detrás de la casa, cerca de la iglesia",
    ),
    "it": (
        "il vecchio uomo, una giovane donna, il medico, mio fratello, la bambina, il suo amico",
        "vede, trova, vende, dipinge, dimentica",
        "un cavallo bianco, il libro rosso, una piccola barca, la lunga lettera, una mela, "
        "la porta verde",
        "nel giardino, al mercato, vicino al fiume, dietro la casa, accanto alla chiesa",
    ),
    "pt": (
        "o homem velho, uma mulher jovem, o médico, meu irmão, a menina pequena, seu amigo",
        "vê, encontra, vende, pinta, esquece",
        "um cavalo branco, o livro vermelho, um barco pequeno, a carta longa, uma maçã, "
        "a porta verde",
        "no jardim, no mercado, perto do rio, atrás da casa, junto à igreja",
    ),
    "pl": (
        "stary człowiek, młoda kobieta, lekarz, mój brat, mała dziewczynka, jej przyjaciel",
        "widzi, znajduje, sprzedaje, maluje, kupuje",
        "białego konia, czerwoną książkę, małą łódź, długi list, jabłko, zielone drzwi",
        "w ogrodzie, na rynku, nad rzeką, za domem, obok kościoła",
    ),
}


@dataclass(frozen=True)
class Sizes:
    """Utterances of the largest language's train, and of every language's dev and test.

    The other languages' train shrink as 1, 1/2, 1/3, ... in the order of ``LANGUAGES``: languages
    of unequal size, as in the true corpus.
    """

    train: int = 160
    dev: int = 3
    test: int = 8

    def of(self, split: str, rank: int) -> int:
        """Utterances of the language number ``rank`` (from 0)."""
        return -(-self.train // (rank + 1)) if split == "train" else getattr(self, split)


def sentences(lang: str) -> list[str]:
    """All sentences of a language's template (900)."""
    slots = ([entry.strip() for entry in slot.split(",")] for slot in GRAMMAR[lang])
    return [" ".join(words) for words in product(*slots)]


def make_mini_mls(
    root: Union[str, Path],
    sizes: Sizes,
    *,
    langs: Collection[str] = tuple(LANGUAGES),
    seed: int = 0,
    nj: int = 1,
) -> bool:
    """Write ``root/mls_<language>[_opus]`` of the languages ``langs``, if they are not there.

    No sentence of one split occurs in another. Codes that MLS does not have are passed over.

    Returns:
        Whether anything was made.
    """
    files: list[Spoken] = []
    tables: dict[str, list[str]] = {}
    for rank, lang in enumerate(lang for lang in LANGUAGES if lang in langs):
        suffix = "flac" if lang in FLAC else "opus"
        top = f"mls_{LANGUAGES[lang]}" + ("" if lang in FLAC else "_opus")
        pool = sentences(lang)
        random.Random(f"{seed} {lang}").shuffle(pool)
        info = tables.setdefault(f"{top}/metainfo.txt", ["SPEAKER | GENDER | PARTITION | MINUTES"])
        reader = 0
        for split in reversed(SPLITS):  # test and dev do not change with the size of train
            readers = {}
            for variant in VARIANTS[split]:
                reader += 1
                name = str(10000 + 100 * rank + reader)
                readers[name] = Speaker(VOICES.get(lang, lang), variant, 50, 50)
                info.append(f"{name} | {variant[0].upper()} | {split} | 1.0")
            for index in range(sizes.of(split, rank)):
                name = list(readers)[index % len(readers)]
                utterance = f"{name}_{20000 + rank}_{index:06d}"
                path = f"{top}/{split}/audio/{name}/{20000 + rank}/{utterance}.{suffix}"
                sentence = pool.pop()
                files.append(Spoken(path, sentence, readers[name]))
                rows = tables.setdefault(f"{top}/{split}/transcripts.txt", [])
                rows.append(f"{utterance}\t{sentence}")

    def write_tables(directory: Path, durations: dict[str, float]) -> None:
        rows = {path: list(lines) for path, lines in tables.items()}
        for path, seconds in durations.items():
            utterance = Path(path).stem
            split = "/".join(path.split("/")[:2])
            source = f"synthetic/{utterance.rpartition('_')[0]}"
            lines = rows.setdefault(f"{split}/segments.txt", [])
            lines.append(f"{utterance}\t{source}\t0.00\t{seconds:.2f}")
        for path, lines in rows.items():
            (directory / path).write_text("".join(f"{s}\n" for s in lines), encoding="utf-8")

    return build(root, files, write_tables, nj)
