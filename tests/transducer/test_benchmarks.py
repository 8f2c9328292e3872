"""The table of the search benchmark that compares at equal or better error rates."""

import importlib
import sys

import pytest


@pytest.fixture
def search(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    yield importlib.import_module("transducer_search")
    sys.modules.pop("transducer_search", None)


def row(search, beam, batch, wer, speed, model="RNN-T"):
    return dict(model=model, search=search, beam=beam, batch=batch, wer=wer, utt_per_s=speed)


def test_the_fastest_that_is_as_good_as_a_peer(search):
    table = search.show_equal_wer(
        [
            row("ours", 2, 1, 22.0, 60.0),
            row("ours", 4, 1, 20.0, 40.0),
            row("ours", 10, 1, 19.0, 30.0),
            row("ours", 4, 32, 20.0, 200.0),
            row("ours", 2, 1, 5.0, 999.0, model="FT + LLM"),
            row("ESPnet default", 10, 1, 20.0, 10.0),
            row("torchaudio", 10, 1, 18.0, 25.0),
        ]
    )
    assert table.splitlines()[2:] == [
        "|RNN-T|ESPnet default|10|20.00|10.00|1|4|20.00|40.00|4.0|",
        "|RNN-T|ESPnet default|10|20.00|10.00|32|4|20.00|200.00|20.0|",
        "|RNN-T|torchaudio|10|18.00|25.00|1|-|-|-|none as good|",
        "|RNN-T|torchaudio|10|18.00|25.00|32|-|-|-|none as good|",
    ]
