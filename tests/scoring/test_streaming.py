"""Table and plot of streaming results."""

import json
import sys

import numpy as np
import pytest

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.scoring.streaming import (
    EXPLANATION,
    StreamingResult,
    plot_streaming,
    streaming_table,
)
from espnet_llm_plugin.scoring.wer import score


def result(test="test", chunk_ms=80.0, **changed):
    references = {"a": ["one", "two", "three", "four"], "b": ["five"]}
    hypotheses = {"a": ["one", "too", "three"], "b": ["five", "six"]}
    values = dict(
        test=test,
        chunk_ms=chunk_ms,
        latency_ms=chunk_ms + 47.5625,
        wer=score(references, hypotheses, {"a": "a", "b": "b"}).summary(),
        audio_seconds=2.0,
        compute_ms=np.array([10.0, 20.0, 30.0, 40.0]),
        shown_ms=np.arange(101.0),
        stable_ms=np.arange(101.0) + 200,
        unaligned=1,
    )
    return StreamingResult(**{**values, **changed})


def test_table():
    table = streaming_table([result(), result(shown_ms=np.array([]), stable_ms=np.array([]))])
    lines = table.splitlines()
    assert lines[2] == (
        "|test|80|127.56|60.00|1 / 1 / 1|0.0500|25.0 / 38.5 / 40.0|50 / 95|250 / 295|"
    )
    assert lines[3].endswith("|-|-|") and table.endswith(EXPLANATION)
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_numbers():
    found = json.loads(json.dumps(result().as_dict()))
    assert found["wer"] == pytest.approx(60) and found["words"] == 5
    assert found["rtf"] == pytest.approx(0.05)
    assert found["compute_ms"] == {"median": 25.0, "p95": 38.5, "max": 40.0}
    assert found["aligned_tokens"] == 101 and found["unaligned_utterances"] == 1


def test_plot(tmp_path):
    results = [result(test, chunk) for test in ("a", "b") for chunk in (160.0, 80.0)]
    plot_streaming(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot_streaming([result()], tmp_path / "plot.png")
