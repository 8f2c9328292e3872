"""Normalised text of the ten languages: nothing audible is lost, and twice is once."""

import builtins
import unicodedata

import pytest

from espnet_llm_plugin.data import indic_text
from espnet_llm_plugin.data.indic_text import (
    DIGITS,
    JOINERS,
    LANGUAGES,
    LATIN,
    TextOptions,
    normalize,
)
from espnet_llm_plugin.errors import UserError
from tests.contracts.sentences import SENTENCES

pytest.importorskip("indicnlp", reason="indic-nlp-library (extra `indic`) is not installed")

# Raw transcripts with punctuation, and what is spoken.
RAW = {
    "hi": ("क्या यह ज़रूरी है? हाँ, पढ़ना ज़रूरी है।", "क्या यह ज़रूरी है हाँ पढ़ना ज़रूरी है"),
    "bn": ("“বাড়ি যাও”, সে বলল—এখনই।", "বাড়ি যাও সে বলল এখনই"),
    "ta": ("அவர் கூறினார்: ‘நான் வருகிறேன்.’", "அவர் கூறினார் நான் வருகிறேன்"),
    "te": ("ఆయన అన్నాడు: నేను వస్తాను!", "ఆయన అన్నాడు నేను వస్తాను"),
    "ml": ("അവൻ പറഞ്ഞു: ഞാൻ വരും; പൗരൻ.", "അവൻ പറഞ്ഞു ഞാൻ വരും പൗരൻ"),
    "kn": ("ಅವನು ಹೇಳಿದ: ನಾನು ಬರುತ್ತೇನೆ…", "ಅವನು ಹೇಳಿದ ನಾನು ಬರುತ್ತೇನೆ"),
    "gu": ('તેણે કહ્યું: "હું આવું છું."', "તેણે કહ્યું હું આવું છું"),
    "mr": ("तो म्हणाला: मी येतो; दुसऱ्या दिवशी ॲप आले.", "तो म्हणाला मी येतो दुसऱ्या दिवशी ॲप आले"),
    "pa": ("ਉਸਨੇ ਕਿਹਾ: ਮੈਂ ਸ਼ਾਮ ਨੂੰ ਆਵਾਂਗਾ।", "ਉਸਨੇ ਕਿਹਾ ਮੈਂ ਸ਼ਾਮ ਨੂੰ ਆਵਾਂਗਾ"),
    "ur": ("کیا آپ آئیں گے؟ جی، آج شام۔", "کیا آپ آئیں گے جی آج شام"),
}
EVERY_OPTION = [TextOptions(d, j, c) for d in DIGITS for j in JOINERS for c in LATIN]


@pytest.mark.parametrize("lang", LANGUAGES)
class TestEveryLanguage:
    def test_punctuation_goes_and_nothing_else(self, lang):
        raw, spoken = RAW[lang]
        assert normalize(raw, lang) == unicodedata.normalize("NFC", spoken)

    def test_plain_sentences_do_not_change(self, lang):
        for sentence in SENTENCES[lang]:
            assert normalize(sentence, lang) == unicodedata.normalize("NFC", sentence)

    @pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
    def test_every_unicode_form_gives_the_same(self, lang, form):
        for sentence in (RAW[lang][1], *SENTENCES[lang]):
            assert normalize(unicodedata.normalize(form, sentence), lang) == normalize(
                sentence, lang
            )

    @pytest.mark.parametrize("options", EVERY_OPTION)
    def test_twice_is_once(self, lang, options):
        mixed = " ".join(s for pair in RAW.values() for s in pair)  # any script in any language
        odd = "दर्\u200dया র\u200d্যাব ఇన్\u200cస్టా 1,234.5 ½ A’b’C अ:अ अ\u200c ﷲ ﻼ \ue000\u202bх"
        for text in (*RAW[lang], *SENTENCES[lang], mixed, odd):
            once = normalize(text, lang, options)
            assert normalize(once, lang, options) == once
            assert unicodedata.is_normalized("NFC", once) and once == " ".join(once.split())

    def test_marks_are_kept(self, lang):
        """Vowel signs, viramas and nuktas: as many after as before."""
        if lang == "ur":
            pytest.skip("Urdu has no such marks")
        for sentence in SENTENCES[lang]:
            marks = [c for c in sentence if unicodedata.category(c)[0] == "M"]
            after = [c for c in normalize(sentence, lang) if unicodedata.category(c)[0] == "M"]
            assert len(marks) > 2 and after == marks

    def test_digits(self, lang):
        zero = indic_text.ZEROS[indic_text.SCRIPT_OF_LANGUAGE[lang]]
        native = chr(zero + 1) + chr(zero + 2)
        assert native.isdecimal() and int(native) == 12
        text = f"{native} 34"
        assert normalize(text, lang) == "12 34"
        assert normalize(text, lang, TextOptions(digits="keep")) == text
        in_native = normalize(text, lang, TextOptions(digits="native"))
        assert in_native.split()[0] == native and not any(c.isascii() for c in in_native[3:])
        assert normalize(in_native, lang) == "12 34"

    def test_latin_words(self, lang):
        raw = f"{SENTENCES[lang][0]} Don’t COVID-19 Wi-Fi"
        assert normalize(raw, lang).endswith(" don't covid 19 wi fi")
        assert normalize(raw, lang, TextOptions(latin="keep")).endswith(" Don't COVID 19 Wi Fi")

    @pytest.mark.parametrize("text", ["", " ", "।", "…?!", "\u200c", "۔", "“”", "\u0301", "₹"])
    def test_nothing_left(self, lang, text):
        assert normalize(text, lang) == ""


@pytest.mark.parametrize(
    ("lang", "text", "expected"),
    [
        ("hi", "समय: १०:३० बजे", "समय 10 30 बजे"),  # the library would write visargas
        ("hi", "दु:ख अत:", "दुःख अत"),
        ("hi", "राम|श्याम॥", "राम श्याम"),
        ("hi", "१,२३,४५६.७ और 5,000 1,234,567", "123456.7 और 5000 1234567"),
        ("hi", "2,3 या 10,20", "2 3 या 10 20"),
        ("hi", "\u0958लम", "\u0915\u093cलम"),
        ("mr", "अॅप", "ॲप"),
        ("bn", "\u09c7\u09be \u09afাই\u09f7", "\u09cb যাই"),
        ("ml", "അവന്\u200d", "അവൻ"),  # chillu as written before Unicode 5.1
        ("ml", "പൌരൻ", "പൗരൻ"),
        ("kn", "ಕ\u0cc6\u0cd5", "ಕ\u0cc7"),
        ("pa", "\u0a05\u0a3e", "\u0a06"),
        ("ur", "\u0643\u062a\u0627\u0628 \u064a\u0647", "کتاب یہ"),  # typed on an Arabic keyboard
        ("ur", "ﻛﺘﺎﺏ", "کتاب"),  # presentation forms
        ("ur", "فوراً عِلم اعلیٰ کــتاب", "فورا علم اعلی کتاب"),
        ("ur", "\u06cc\u0654 مسئلہ جرأت", "\u0626 مسئلہ جرأت"),
        ("ur", "\u200f\u202bآج\u202c", "آج"),
    ],
)
def test_cases(lang, text, expected):
    assert normalize(text, lang) == unicodedata.normalize("NFC", expected)


def test_urdu_stays_in_logical_order():
    assert [unicodedata.name(c) for c in normalize("آج", "ur")][-1] == "ARABIC LETTER JEEM"


@pytest.mark.parametrize(
    ("lang", "text", "distinctive", "keep"),
    [
        ("mr", "दर्\u200dया", True, True),  # eyelash ra: valleys, not oceans
        ("bn", "র\u200d্যাব", True, True),
        ("hi", "क्\u200dया", False, True),
        ("te", "ఇన్\u200cస్టా", False, True),
        ("kn", "ಇನ್\u200cಸ್ಟಾ", False, True),
        ("ur", "می\u200cروم", False, True),
        ("te", "వాడిన్\u200c కు", False, False),  # at the end of a word
        ("ta", "க\u200d", False, False),
    ],
)
def test_joiners(lang, text, distinctive, keep):
    without = text.replace("\u200c", "").replace("\u200d", "")
    assert normalize(text, lang, TextOptions(joiners="remove")) == without
    assert normalize(text, lang) == (text if distinctive else without)
    assert normalize(text, lang, TextOptions(joiners="keep")) == (text if keep else without)


def test_older_ya_phala_is_the_same_letter():
    assert normalize("র\u200c্যাব", "bn") == "র\u200d্যাব"


def test_mistakes():
    with pytest.raises(UserError, match="unknown language code 'xx'; expected one of hi, bn"):
        normalize("a", "xx")
    for name in ("digits", "joiners", "latin"):
        with pytest.raises(UserError, match=f"{name} is 'odd'; expected one of"):
            TextOptions(**{name: "odd"})


def test_without_the_library(monkeypatch):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.startswith("indicnlp"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    indic_text._indic_normalizer.cache_clear()
    with pytest.raises(UserError, match="pip install indic-nlp-library .* extra 'indic'"):
        normalize("अब", "hi")
    assert normalize("اب", "ur") == "اب"


def test_real_text(shared_data):
    """News in all ten languages: not one letter is lost."""
    for lang in LANGUAGES:
        lines = (shared_data / "text/ntrex" / f"{lang}.txt").read_text("utf-8").splitlines()[:300]
        for line in lines:
            after = normalize(line, lang)
            assert normalize(after, lang) == after
            before = [
                c for c in unicodedata.normalize("NFC", line) if unicodedata.category(c) == "Lo"
            ]
            kept = [c for c in after if unicodedata.category(c) == "Lo"]
            assert len(kept) == len(before)
