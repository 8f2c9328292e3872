"""A synthetic corpus in FLEURS's layout: ten Indic languages, sentences from one template each.

A sentence is subject + place + object + verb. The lists are made so that every combination is
grammatical: where verbs agree with the subject's gender, all subjects are masculine singular.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Union

from espnet_llm_plugin.data.corpora.fleurs import NAMES, SPLITS
from espnet_llm_plugin.data.corpora.mini import Spoken, build
from espnet_llm_plugin.data.indic_text import LANGUAGES
from espnet_llm_plugin.data.synthetic.speech import SAMPLE_RATE, Speaker

VARIANTS = {"train": ("m1", "f1", "m3", "f2"), "dev": ("m2",), "test": ("f3",)}
STOPS = {"ur": "۔", "ta": ".", "te": ".", "ml": ".", "kn": ".", "gu": ".", "mr": "."}  # else danda

# Subjects, places, objects, verbs; separated by commas.
GRAMMAR = {
    "hi": (
        "बूढ़ा आदमी, मेरा भाई, डॉक्टर, छोटा लड़का, उसका दोस्त, राजा",
        "बगीचे में, बाज़ार में, नदी के पास, घर के पीछे, मंदिर के सामने",
        "सफ़ेद घोड़ा, लाल किताब, छोटी नाव, लंबी चिट्ठी, मीठा आम, हरा दरवाज़ा",
        "देखता है, बेचता है, खरीदता है, ढूँढता है, लाता है",
    ),
    "bn": (
        "বুড়ো লোকটি, আমার ভাই, কৃষক, ছোট মেয়েটি, তার বন্ধু, রাজা",
        "বাগানে, বাজারে, নদীর পাশে, বাড়ির পেছনে, স্কুলের সামনে",
        "সাদা ঘোড়া, লাল বই, ছোট নৌকা, লম্বা চিঠি, মিষ্টি আম, সবুজ দরজা",
        "দেখে, কেনে, আনে, খোঁজে, আঁকে",
    ),
    "ta": (
        "என் அண்ணன், அந்த மனிதன், சிறிய பையன், அவன் நண்பன், அரசன், தம்பி",
        "தோட்டத்தில், சந்தையில், ஆற்றங்கரையில், வீட்டின் பின்னால், கோவிலின் முன்னால்",
        "வெள்ளைக் குதிரையை, சிவப்பு புத்தகத்தை, சிறிய படகை, நீண்ட கடிதத்தை, மாம்பழத்தை, பச்சைக் கதவை",
        "பார்க்கிறான், வாங்குகிறான், விற்கிறான், தேடுகிறான், வரைகிறான்",
    ),
    "te": (
        "మా అన్న, ఆ మనిషి, చిన్న బాలుడు, అతని స్నేహితుడు, రాజు, తమ్ముడు",
        "తోటలో, బజారులో, నది పక్కన, ఇంటి వెనుక, గుడి ముందు",
        "తెల్ల గుర్రాన్ని, ఎర్ర పుస్తకాన్ని, చిన్న పడవను, పొడవైన ఉత్తరాన్ని, మామిడిపండును, పచ్చ తలుపును",
        "చూస్తున్నాడు, కొంటున్నాడు, అమ్ముతున్నాడు, వెతుకుతున్నాడు, గీస్తున్నాడు",
    ),
    "ml": (
        "എന്റെ ചേട്ടൻ, ആ മനുഷ്യൻ, ചെറിയ കുട്ടി, അവന്റെ സുഹൃത്ത്, രാജാവ്, അധ്യാപകൻ",
        "തോട്ടത്തിൽ, ചന്തയിൽ, പുഴയുടെ അരികിൽ, വീടിന്റെ പിന്നിൽ, അമ്പലത്തിന്റെ മുന്നിൽ",
        "വെളുത്ത കുതിരയെ, ചുവന്ന പുസ്തകം, ചെറിയ വള്ളം, നീണ്ട കത്ത്, മധുരമുള്ള മാമ്പഴം, പച്ച വാതിൽ",
        "കാണുന്നു, വാങ്ങുന്നു, വിൽക്കുന്നു, തിരയുന്നു, വരയ്ക്കുന്നു",
    ),
    "kn": (
        "ನನ್ನ ಅಣ್ಣ, ಆ ಮನುಷ್ಯ, ಚಿಕ್ಕ ಹುಡುಗ, ಅವನ ಗೆಳೆಯ, ರಾಜ, ತಮ್ಮ",
        "ತೋಟದಲ್ಲಿ, ಮಾರುಕಟ್ಟೆಯಲ್ಲಿ, ನದಿಯ ಬಳಿ, ಮನೆಯ ಹಿಂದೆ, ದೇವಸ್ಥಾನದ ಮುಂದೆ",
        "ಬಿಳಿ ಕುದುರೆಯನ್ನು, ಕೆಂಪು ಪುಸ್ತಕವನ್ನು, ಚಿಕ್ಕ ದೋಣಿಯನ್ನು, ಉದ್ದ ಪತ್ರವನ್ನು, ಮಾವಿನ ಹಣ್ಣನ್ನು, ಹಸಿರು ಬಾಗಿಲನ್ನು",
        "ನೋಡುತ್ತಾನೆ, ಕೊಳ್ಳುತ್ತಾನೆ, ಮಾರುತ್ತಾನೆ, ಹುಡುಕುತ್ತಾನೆ, ತರುತ್ತಾನೆ",
    ),
    "gu": (
        "ઘરડો માણસ, મારો ભાઈ, ડૉક્ટર, નાની છોકરી, તેનો મિત્ર, શિક્ષક",
        "બગીચામાં, બજારમાં, નદી પાસે, ઘરની પાછળ, મંદિરની સામે",
        "સફેદ ઘોડો, લાલ ચોપડી, નાની હોડી, લાંબો પત્ર, મીઠી કેરી, લીલો દરવાજો",
        "જુએ છે, ખરીદે છે, વેચે છે, શોધે છે, લાવે છે",
    ),
    "mr": (
        "म्हातारा माणूस, माझा भाऊ, डॉक्टर, लहान मुलगा, त्याचा मित्र, राजा",
        "बागेत, बाजारात, नदीजवळ, दुसऱ्या घरामागे, देवळासमोर",
        "पांढरा घोडा, लाल पुस्तक, लहान होडी, लांब पत्र, गोड आंबा, हिरवे दार",
        "पाहतो, विकतो, आणतो, शोधतो, घेतो",
    ),
    "pa": (
        "ਬੁੱਢਾ ਆਦਮੀ, ਮੇਰਾ ਭਰਾ, ਡਾਕਟਰ, ਛੋਟਾ ਮੁੰਡਾ, ਉਸਦਾ ਦੋਸਤ, ਰਾਜਾ",
        "ਬਾਗ਼ ਵਿੱਚ, ਬਾਜ਼ਾਰ ਵਿੱਚ, ਨਦੀ ਦੇ ਕੋਲ, ਘਰ ਦੇ ਪਿੱਛੇ, ਸਕੂਲ ਦੇ ਸਾਹਮਣੇ",
        "ਚਿੱਟਾ ਘੋੜਾ, ਲਾਲ ਕਿਤਾਬ, ਛੋਟੀ ਕਿਸ਼ਤੀ, ਲੰਮੀ ਚਿੱਠੀ, ਮਿੱਠਾ ਅੰਬ, ਹਰਾ ਦਰਵਾਜ਼ਾ",
        "ਵੇਖਦਾ ਹੈ, ਖਰੀਦਦਾ ਹੈ, ਵੇਚਦਾ ਹੈ, ਲੱਭਦਾ ਹੈ, ਲਿਆਉਂਦਾ ਹੈ",
    ),
    "ur": (
        "بوڑھا آدمی, میرا بھائی, ڈاکٹر, چھوٹا لڑکا, اس کا دوست, بادشاہ",
        "باغ میں, بازار میں, دریا کے پاس, گھر کے پیچھے, مسجد کے سامنے",
        "سفید گھوڑا, سرخ کتاب, چھوٹی کشتی, لمبا خط, میٹھا آم, سبز دروازہ",
        "دیکھتا ہے, خریدتا ہے, بیچتا ہے, ڈھونڈتا ہے, لاتا ہے",
    ),
}


@dataclass(frozen=True)
class Sizes:
    """Utterances of the largest languages' train, and of every language's dev and test.

    Train is as large for the first four languages, half of it for the next four, a third for the
    last two: unequal, as in the true corpus, though more so.
    """

    train: int = 60
    dev: int = 3
    test: int = 8

    def of(self, split: str, rank: int) -> int:
        """Utterances of the language number ``rank`` (from 0)."""
        return -(-self.train // (1 + rank // 4)) if split == "train" else getattr(self, split)


def sentences(lang: str) -> list[str]:
    """All sentences of a language's template (900)."""
    slots = ([entry.strip() for entry in slot.split(",")] for slot in GRAMMAR[lang])
    return [" ".join(words) for words in product(*slots)]


def make_mini_fleurs(
    root: Union[str, Path],
    sizes: Sizes,
    *,
    langs: Collection[str] = LANGUAGES,
    seed: int = 0,
    nj: int = 1,
) -> bool:
    """Write ``root/<language>/{audio/<split>/*.wav,<split>.tsv}``, if they are not there.

    No sentence of one split occurs in another. Raw transcripts end with a full stop. Codes that are
    not of the ten languages are passed over.

    Returns:
        Whether anything was made.
    """
    files: list[Spoken] = []
    rows: dict[str, tuple[str, str]] = {}  # of each audio file: number of the sentence, gender
    for rank, lang in enumerate(lang for lang in LANGUAGES if lang in langs):
        pool = sentences(lang)
        random.Random(f"{seed} {lang}").shuffle(pool)
        for split in reversed(SPLITS):  # test and dev do not change with the size of train
            for index in range(sizes.of(split, rank)):
                variant = VARIANTS[split][index % len(VARIANTS[split])]
                number = 1000 * SPLITS.index(split) + index
                name = random.Random(f"{lang} {number}").randrange(10**19, 10**20)
                path = f"{NAMES[lang]}/audio/{split}/{name}.wav"
                files.append(Spoken(path, pool.pop(), Speaker(lang, variant, 50, 50)))
                rows[path] = (str(number), "MALE" if variant[0] == "m" else "FEMALE")

    def write_tables(directory: Path, durations: dict[str, float]) -> None:
        tables: dict[str, list[str]] = {}
        for spoken in files:
            name, _, split, file = spoken.path.split("/")
            number, gender = rows[spoken.path]
            characters = " ".join("|".join(spoken.text.split())) + " |"
            raw = spoken.text + STOPS.get(name[:2], "।")
            samples = round(durations[spoken.path] * SAMPLE_RATE)
            row = (number, file, raw, spoken.text, characters, str(samples), gender)
            tables.setdefault(f"{name}/{split}.tsv", []).append("\t".join(row) + "\n")
        for path, lines in tables.items():
            (directory / path).write_text("".join(lines), encoding="utf-8")

    return build(root, files, write_tables, nj)
