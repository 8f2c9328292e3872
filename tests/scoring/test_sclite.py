"""Our numbers against recorded output of NIST's sclite (see fixtures/make_fixtures.py)."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from espnet_llm_plugin.scoring.evaluate import evaluate
from espnet_llm_plugin.scoring.wer import score

FIXTURES = Path(__file__).parent / "fixtures"
SCLITE = shutil.which("sclite") or shutil.which("/usr/lib/sctk/bin/sclite")


@pytest.fixture(scope="module", params=[False, True], ids=["folded", "case_sensitive"])
def evaluated(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored")
    evaluation = evaluate(
        str(FIXTURES / "text"),
        str(FIXTURES / "hyp"),
        str(out),
        case_sensitive=request.param,
        resamples=10,
    )
    return evaluation, out, "sclite_case" if request.param else "sclite"


def utterance_counts(text):
    """``-o pralign``: utterance -> (C, S, D, I)."""
    found = re.findall(r"^id: \(\S+?-(utt\d+)\)\nScores: \(#C #S #D #I\) (.*)$", text, re.M)
    return {utterance: tuple(map(int, numbers.split())) for utterance, numbers in found}


def tables(text):
    """Rows of the tables: first cell -> the numbers as printed, one list for each table."""
    rows = {}
    for line in text.split("\n"):
        cells = [cell.split() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 3 and cells[0] and re.match(r"[\d.]+$", (cells[1] or ["-"])[0]):
            # sclite prints 100.0 against the bar before it.
            rows.setdefault(cells[0][0], []).append(cells[1] + cells[2])
    return rows


@pytest.mark.parametrize("unit", ["wer", "cer"])
class TestRecorded:
    def test_transcripts_are_those_sclite_read(self, evaluated, unit):
        _, out, _ = evaluated
        for name in ("ref.trn", "hyp.trn"):
            expected = (FIXTURES / f"{unit}.{name}").read_text(encoding="utf-8")
            assert (out / f"score_{unit}" / name).read_text(encoding="utf-8") == expected

    def test_every_utterance(self, evaluated, unit):
        evaluation, out, name = evaluated
        expected = utterance_counts((FIXTURES / f"{unit}.{name}.txt").read_text(encoding="utf-8"))
        scored = evaluation.scored[unit]
        assert len(expected) == 145
        assert dict(zip(scored.ids, map(tuple, scored.counts.tolist()))) == expected
        assert utterance_counts((out / f"score_{unit}" / "result.txt").read_text()) == expected

    def test_all_tables(self, evaluated, unit):
        """Per cents and numbers of each speaker, sum, mean, deviation, median, as printed."""
        _, out, name = evaluated
        expected = tables((FIXTURES / f"{unit}.{name}.txt").read_text(encoding="utf-8"))
        ours = tables((out / f"score_{unit}" / "result.txt").read_text(encoding="utf-8"))
        assert set(expected) == set(ours) and len(expected) == 10 + 2 + 3
        assert ours == expected

    def test_jiwer_is_the_lower_bound(self, evaluated, unit):
        evaluation, *_ = evaluated
        scored = evaluation.scored[unit]
        total = scored.summary().counts
        assert scored.jiwer.errors < total.errors  # the fixture is full of such cases
        assert scored.jiwer.words == total.words
        assert scored.jiwer.deletions - scored.jiwer.insertions == (
            total.deletions - total.insertions
        )

    def test_espnet_reads_our_table_as_it_reads_sclites(self, evaluated, unit):
        """The pipeline of ESPnet's show_asr_result.sh."""
        _, out, name = evaluated
        command = "grep -e Avg {} | sed -e 's#Sum/Avg##g' | tr '|' ' ' | tr -s ' ' '|'"
        rows = [
            subprocess.run(
                ["bash", "-c", command.format(f"'{path}'")], capture_output=True, check=True
            ).stdout
            for path in (FIXTURES / f"{unit}.{name}.txt", out / f"score_{unit}" / "result.txt")
        ]
        assert rows[0] == rows[1] and rows[0].count(b"|") == 9


@pytest.mark.skipif(SCLITE is None, reason="sclite is not installed (Debian: sctk)")
def test_fresh_random_cases(tmp_path):
    rng = random.Random(7)
    refs, hyps = {}, {}
    for number in range(300):
        vocabulary = [chr(97 + n) for n in range(rng.randint(1, 8))]
        refs[f"utt{number}"] = [rng.choice(vocabulary) for _ in range(rng.randint(1, 30))]
        hyps[f"utt{number}"] = [rng.choice(vocabulary) for _ in range(rng.randint(0, 30))]
    for name, table in (("ref", refs), ("hyp", hyps)):
        lines = (f"{' '.join(words)}\t(spk-{key})\n" for key, words in table.items())
        (tmp_path / name).write_text("".join(lines))
    command = [SCLITE, "-r", "ref", "trn", "-h", "hyp", "trn", "-i", "rm", "-o", "all", "stdout"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    scored = score(refs, hyps, dict.fromkeys(refs, "spk"))
    counts = dict(zip(scored.ids, map(tuple, scored.counts.tolist())))
    assert counts == utterance_counts(output.stdout)
