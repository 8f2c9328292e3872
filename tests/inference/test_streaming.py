"""The streaming recogniser: the offline result, stable prefixes, endpoints, bad input."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.inference.endpoint import endpoint_rules
from espnet_llm_plugin.inference.loading import load_asr
from espnet_llm_plugin.inference.recognizer import Recognition, Recognizer
from espnet_llm_plugin.inference.simulate import joined, simulate
from espnet_llm_plugin.inference.streaming import Segment, StreamingRecognizer, set_chunk_ms
from espnet_llm_plugin.transducer.hypothesis import Hypothesis
from tests.contracts.streaming_contract import random_split
from tests.inference.tiny_asr import KINDS, RATE, TOKENS, make_asr
from tests.inference.tiny_streaming import ENCODERS, make_streaming_asr
from tests.llm.tiny import save_adapted_dir


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("streaming")
    made = {}

    def load(encoder, kind):
        if (encoder, kind) not in made:
            files = make_streaming_asr(directory / encoder / kind, encoder, kind)
            made[encoder, kind] = load_asr(files.config, files.model, dtype="float64")
        made[encoder, kind].model.encoder.set_chunk_size(8)
        return made[encoder, kind]

    return load


@pytest.fixture
def ctc(models):
    return models("streaming_conformer", "ctc")


def speech(seconds, seed=0):
    """Tones that come and go, and noise."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    tones = np.sin(2 * np.pi * generator.uniform(200, 3000, 5)[:, None] * time)
    gates = np.sin(2 * np.pi * generator.uniform(1, 4, 5)[:, None] * time).clip(0)
    return 0.1 * (tones * gates).sum(0) + 0.01 * generator.normal(size=len(time))


def run(streaming, samples, pieces):
    """Segments, and what was partially known after every piece."""
    state, segments, partials = streaming.initial_state(), [], []
    for piece in torch.as_tensor(samples).split(pieces):
        ended, state = streaming.infer(piece, state)
        segments += ended
        partials.append(streaming.partial(state))
    return [*segments, *streaming.finish(state)], partials


def assert_same(actual, expected):
    assert [r.token_ids for r in actual] == [r.token_ids for r in expected]
    for one, other in zip(actual, expected):
        assert one.text == other.text
        assert one.hypothesis.frames == other.hypothesis.frames
        for name in ("total", "acoustic", "lm", "external_lm", "bonus"):
            mine, theirs = getattr(one.hypothesis, name), getattr(other.hypothesis, name)
            assert mine == pytest.approx(theirs, abs=1e-4)


class TestSameAsOffline:
    @pytest.mark.parametrize("beam", [1, 4])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_any_split_of_the_samples(self, models, encoder, kind, beam):
        recognizer = Recognizer(models(encoder, kind), beam_size=beam, nbest=beam)
        generator = torch.Generator().manual_seed(0)
        for chunk_ms, seconds in ((80, 1.53), (160, 0.5), (40, 0.9)):
            set_chunk_ms(recognizer.asr.model, chunk_ms)
            streaming = StreamingRecognizer(recognizer)
            samples = speech(seconds, seed=chunk_ms)
            expected = recognizer(samples)
            assert len(expected[0].token_ids) >= 2, "hypotheses of nothing test nothing"
            for longest in (100, 1500, 9000):
                pieces = random_split(len(samples), generator, longest)
                (segment,), _ = run(streaming, samples, pieces)
                assert_same(segment.nbest, expected)
                assert (segment.begin, segment.begin_seconds) == (0, 0)
                assert segment.end_seconds == pytest.approx(seconds, abs=1e-4)
            assert_same(joined(recognizer, [segment]), expected)

    def test_scales_lengths_and_chunk_sizes_matter(self, models):
        """The equality above is not that of constants."""
        asr = models("emformer", "factorized")
        samples, texts = speech(1.5), set()
        for chunk_ms in (40, 80, 160, 320):
            set_chunk_ms(asr.model, chunk_ms)
            streaming = StreamingRecognizer(Recognizer(asr, beam_size=4))
            texts.add(run(streaming, samples, [len(samples)])[0][0].nbest[0].hypothesis.total)
        assert len(texts) == 4

    def test_states_stay_valid(self, models):
        streaming = StreamingRecognizer(Recognizer(models("emformer", "transducer"), beam_size=4))
        samples = torch.as_tensor(speech(1.0))
        _, state = streaming.infer(samples[:9000], streaming.initial_state())
        before = streaming.partial(state)
        first = streaming.finish(streaming.infer(samples[9000:], state)[1])
        streaming.infer(-samples, state)
        assert streaming.partial(state) == before
        again = streaming.finish(streaming.infer(samples[9000:], state)[1])
        assert first == again

    def test_streams_share_nothing_but_the_networks(self, models):
        streaming = StreamingRecognizer(Recognizer(models("emformer", "factorized"), beam_size=4))
        samples = [torch.as_tensor(speech(1.0, seed)) for seed in (1, 2)]
        alone = [run(streaming, one, [len(one)])[0][0] for one in samples]
        states = [streaming.initial_state() for _ in samples]
        for begin in range(0, len(samples[0]), 2000):
            for n, one in enumerate(samples):
                _, states[n] = streaming.infer(one[begin : begin + 2000], states[n])
        for state, expected in zip(states, alone):
            assert_same(streaming.finish(state)[0].nbest, expected.nbest)


class TestPartialResults:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_stable_part_never_retracts(self, models, kind):
        recognizer = Recognizer(models("emformer", kind), beam_size=4)
        streaming = StreamingRecognizer(recognizer)
        samples = speech(3.0)
        (segment,), partials = run(streaming, samples, [800] * 60)
        final = segment.nbest[0]
        stable, text, tails = [], "", 0
        for partial in partials:
            found = partial.token_ids[: partial.num_stable]
            assert found[: len(stable)] == stable and partial.stable.startswith(text)
            assert partial.text == recognizer.asr.text.text(TOKENS[i] for i in partial.token_ids)
            stable, text = found, partial.stable
            tails += bool(partial.tail)
            assert final.token_ids[: len(stable)] == stable and final.text.startswith(text)
        assert stable and tails, "nothing was stable, or everything always"

    @pytest.mark.parametrize("kind", KINDS)
    def test_stable_is_what_all_hypotheses_begin_with(self, models, kind):
        recognizer = Recognizer(models("streaming_conformer", kind), beam_size=4, nbest=4)
        streaming = StreamingRecognizer(recognizer)
        state = streaming.initial_state()
        for piece in torch.as_tensor(speech(2.0)).split(1280):
            _, state = streaming.infer(piece, state)
            partial, live = streaming.partial(state), state.search.nbest(100)[0]
            assert partial.token_ids == [label + 1 for label in live[0].labels]
            common = 0
            while all(len(h.labels) > common for h in live) and (
                len({h.labels[common] for h in live}) == 1
            ):
                common += 1
            assert partial.num_stable == common

    def test_greedy_results_are_stable_at_once(self, models):
        streaming = StreamingRecognizer(Recognizer(models("emformer", "transducer"), beam_size=1))
        _, partials = run(streaming, speech(1.0), [1600] * 10)
        assert all(p.num_stable == len(p.token_ids) and not p.tail for p in partials)
        assert partials[-1].token_ids

    def test_bytes_of_an_unfinished_character_are_no_text_yet(self, models, monkeypatch):
        streaming = StreamingRecognizer(Recognizer(models("emformer", "ctc"), beam_size=4))
        raw = {3: b"a", 4: b"\xc3", 5: b"\xa9"}

        def text(tokens):
            return b"".join(raw[TOKENS.index(token)] for token in tokens).decode(errors="replace")

        monkeypatch.setattr(streaming.recognizer.asr.text, "text", text)
        state = streaming.initial_state()
        monkeypatch.setattr(type(state.search), "best", lambda *_: ((2, 3, 4), (0, 1, 2)))
        shown = []
        for stable in (1, 2, 3):
            monkeypatch.setattr(type(state.search), "num_stable", lambda _, n=stable: n)
            partial = streaming.partial(state)
            shown.append((partial.stable, partial.tail))
        assert shown == [("a", "é"), ("a", "é"), ("aé", "")]

    def test_without_tokenizer_tokens_are_shown(self, ctc):
        text = type(ctc.text)(TOKENS, None, None)
        streaming = StreamingRecognizer(Recognizer(dataclasses.replace(ctc, text=text)))
        assert streaming.text([3, 4]) == "a b"


class TestShortStreams:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("num_samples", [0, 1, 100, 200])
    def test_shorter_than_a_frame(self, models, kind, num_samples):
        """Offline this is an error of ESPnet's frontend; a stream may just be closed at once."""
        streaming = StreamingRecognizer(Recognizer(models("emformer", kind), beam_size=4, nbest=2))
        (segment,), _ = run(streaming, speech(1.0)[:num_samples], [num_samples])
        (best,) = segment.nbest
        assert (best.token_ids, best.text, best.hypothesis.total) == ([], "", 0)
        assert segment.num_frames == 0

    def test_one_frame(self, models):
        """Enough for a frame, though not for ESPnet's frontend."""
        streaming = StreamingRecognizer(Recognizer(models("emformer", "ctc"), beam_size=4))
        (segment,), _ = run(streaming, speech(1.0)[:256], [256])
        assert segment.num_frames == 1 and np.isfinite(segment.nbest[0].hypothesis.total)

    @pytest.mark.parametrize("num_samples", [257, 600, 1279, 1281, 5000])
    def test_ends_within_a_chunk(self, models, num_samples):
        recognizer = Recognizer(models("emformer", "factorized"), beam_size=4)
        samples = speech(1.0)[:num_samples]
        (segment,), _ = run(StreamingRecognizer(recognizer), samples, [num_samples])
        assert_same(segment.nbest, recognizer(samples))

    @pytest.mark.parametrize("kind", KINDS)
    def test_silence(self, models, kind):
        recognizer = Recognizer(models("streaming_conformer", kind), beam_size=4)
        streaming = StreamingRecognizer(recognizer)
        (segment,), _ = run(streaming, np.zeros(16000), [1600] * 10)
        assert_same(segment.nbest, recognizer(np.zeros(16000)))


class OneHot:
    """Encoder frames that a CTC model reads as given tokens; 0 is blank."""

    def __init__(self, asr):
        layer = asr.model.ctc.ctc_lo
        self.weight, self.bias = layer.weight.clone(), layer.bias.clone()
        self.layer = layer
        with torch.no_grad():
            layer.weight.copy_(20 * torch.eye(*layer.weight.shape))
            layer.bias.zero_()

    def restore(self):
        with torch.no_grad():
            self.layer.weight.copy_(self.weight)
            self.layer.bias.copy_(self.bias)

    def frames(self, tokens):
        return torch.eye(16, dtype=torch.float64)[torch.tensor(tokens)]


class TestEndpoints:
    """Frames of 40 ms in chunks of two."""

    @pytest.fixture
    def one_hot(self, ctc):
        made = OneHot(ctc)
        yield made
        made.restore()

    def segments(self, ctc, one_hot, tokens, beam=3, **rules):
        streaming = StreamingRecognizer(Recognizer(ctc, beam_size=beam), endpoint_rules(**rules))
        frames, found = one_hot.frames(tokens), []
        for split in (2, 4, len(tokens)):  # encoders give whole chunks
            state, ended = streaming.initial_state(), []
            for piece in frames.split(split):
                segments, state = streaming.search(piece, state)
                ended += segments
            ended.append(streaming.last_segment(state))
            found.append([(s.begin, s.num_frames, s.nbest[0].text) for s in ended])
        assert all(one == found[0] for one in found)
        return found[0]

    @pytest.mark.parametrize("beam", [1, 3])
    def test_silence_after_speech(self, ctc, one_hot, beam):
        tokens = [0, 3, 0, 4, *[0] * 8, 5, 0, 0, 0]
        found = self.segments(ctc, one_hot, tokens, beam, silence_after_speech=0.32)
        # the last label is at frame 3: 8 blank frames are full after frame 11
        assert found == [(0, 12, "ab"), (12, 4, "c")]
        found = self.segments(ctc, one_hot, tokens, beam, silence_after_speech=0.36)
        assert found == [(0, 16, "abc")]

    def test_silence_without_speech_is_dropped(self, ctc, one_hot):
        tokens = [*[0] * 7, 3, 0, 0]
        assert self.segments(ctc, one_hot, tokens, silence=0.24) == [(6, 4, "a")]
        assert self.segments(ctc, one_hot, tokens, silence=0.4) == [(0, 10, "a")]

    def test_longest_segment(self, ctc, one_hot):
        tokens = [3, 4, 5, 6] * 3
        found = self.segments(ctc, one_hot, tokens, max_length=0.16)
        assert found == [(0, 4, "abcd"), (4, 4, "abcd"), (8, 4, "abcd"), (12, 0, "")]

    def test_shortest_segment(self, ctc, one_hot):
        tokens = [3, 0, 0, 0, 0, 4, 0, 0, 0, 0]
        short = self.segments(ctc, one_hot, tokens, silence_after_speech=0.12)
        assert short == [(0, 4, "a"), (4, 6, "b"), (10, 0, "")]
        long = self.segments(ctc, one_hot, tokens, silence_after_speech=0.12, min_length=0.3)
        assert long == [(0, 10, "ab"), (10, 0, "")]

    def test_infinity_switches_a_rule_off(self, ctc, one_hot):
        off = dict(silence=np.inf, silence_after_speech=np.inf, max_length=np.inf)
        tokens = [3, *[0] * 200]
        assert self.segments(ctc, one_hot, tokens, **off) == [(0, 201, "a")]
        assert len(self.segments(ctc, one_hot, tokens)) > 1

    @pytest.mark.parametrize("kind", KINDS)
    def test_any_split_of_the_samples(self, models, kind):
        recognizer = Recognizer(models("emformer", kind), beam_size=4)
        rules = endpoint_rules(silence=0.3, silence_after_speech=0.12, max_length=0.6)
        streaming = StreamingRecognizer(recognizer, rules)
        samples, generator = speech(3.0), torch.Generator().manual_seed(3)
        expected, _ = run(streaming, samples, [len(samples)])
        assert len(expected) >= 4
        for before, after in zip(expected, expected[1:]):
            assert before.begin + before.num_frames <= after.begin
        for longest in (200, 5000):
            pieces = random_split(len(samples), generator, longest)
            segments, _ = run(streaming, samples, pieces)
            assert [(s.begin, s.num_frames) for s in segments] == [
                (s.begin, s.num_frames) for s in expected
            ]
            for one, other in zip(segments, expected):
                assert_same(one.nbest, other.nbest)

    def test_what_is_kept_does_not_grow(self, models):
        recognizer = Recognizer(models("emformer", "factorized"), beam_size=4)
        streaming = StreamingRecognizer(recognizer, endpoint_rules(max_length=0.5))
        state, sizes = streaming.initial_state(), []
        for _ in range(8):
            for piece in torch.as_tensor(speech(0.48)).split(1280):
                _, state = streaming.infer(piece, state)
            sizes.append(len(state.search.tree))
        assert max(sizes) < 200 and state.begin > 80

    def test_joined_parts_add_up_with_a_prior(self):
        def segment(begin, prior):
            parts = dict(acoustic=-3.0, lm=0.0, external_lm=0.0, bonus=0.5, prior=prior)
            hypothesis = Hypothesis((1,), total=-2.5 + prior, frames=(0,), **parts)
            return Segment(begin, 4, 0.0, 1.0, [Recognition("a", ["a"], [2], hypothesis)])

        recognizer = SimpleNamespace(
            recognition=lambda h: Recognition("a a", ["a", "a"], [2, 2], h)
        )
        (whole,) = joined(recognizer, [segment(0, 0.25), segment(4, 0.5)])
        assert whole.hypothesis.prior == 0.75
        parts = whole.hypothesis.acoustic + whole.hypothesis.bonus + whole.hypothesis.prior
        assert whole.hypothesis.total == pytest.approx(parts) == -4.25

    def test_joined_segments(self, models):
        recognizer = Recognizer(models("emformer", "factorized"), beam_size=2)
        streaming = StreamingRecognizer(recognizer, endpoint_rules(max_length=0.5))
        pieces = simulate(streaming, speech(2.0), 4000)
        segments = [segment for piece in pieces for segment in piece.segments]
        (whole,) = joined(recognizer, segments)
        best = [segment.nbest[0] for segment in segments]
        assert whole.text == " ".join(one.text for one in best if one.text)
        assert whole.token_ids == [i for one in best for i in one.token_ids]
        assert whole.hypothesis.total == pytest.approx(sum(r.hypothesis.total for r in best))
        assert list(whole.hypothesis.frames) == sorted(whole.hypothesis.frames)
        assert whole.hypothesis.frames[-1] > segments[-2].begin

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(silence=0), "must be above 0"),
            (dict(silence_after_speech=-1), "must be above 0"),
            (dict(min_length=-0.1), "must be above 0"),
            (dict(min_length=20), r"minimum length \(20 s\) must be below the maximum length"),
        ],
    )
    def test_bad_rules(self, options, message):
        with pytest.raises(UserError, match=message):
            endpoint_rules(**options)


class TestLongAudio:
    """More labels than the LLM has positions."""

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_the_llms_state_is_cut(self, tmp_path, caplog, family):
        limit = dict(n_positions=12) if family == "gpt2" else dict(max_position_embeddings=12)
        llm = save_adapted_dir(tmp_path / "llm", TOKENS, family, **limit)
        files = make_streaming_asr(tmp_path / "asr", "emformer", "factorized")
        asr = load_asr(
            files.config,
            files.model,
            dtype="float64",
            predictor="llm",
            predictor_conf={"llm": str(llm)},
        )
        recognizer = Recognizer(asr, beam_size=3)
        samples = speech(3.0)
        caplog.clear()
        (offline,) = recognizer(samples)
        assert len(offline.token_ids) > 30
        assert sum("fills the context" in message for message in caplog.messages) == 1
        (segment,), _ = run(StreamingRecognizer(recognizer), samples, [1600] * 30)
        assert_same(segment.nbest, [offline])
        assert sum("fills the context" in message for message in caplog.messages) == 1
        # the LM score is that of the teacher-forced predictor, cut likewise
        labels = torch.tensor([offline.hypothesis.labels])
        with torch.no_grad():
            rows = asr.model.decoder.predictor(labels)[0, :-1]
        lm = rows.gather(1, labels[0][:, None]).sum()
        beta = recognizer.scales.beta
        assert beta and offline.hypothesis.lm == pytest.approx(beta * float(lm), rel=1e-4)


class TestRefused:
    def test_encoder_that_is_no_streaming_encoder(self, tmp_path):
        files = make_asr(tmp_path / "asr", "transducer")
        recognizer = Recognizer(load_asr(files.config, files.model))
        with pytest.raises(
            UserError, match="TransformerEncoder .* one of emformer, streaming_conformer"
        ):
            StreamingRecognizer(recognizer)
        with pytest.raises(UserError, match="chunk_ms 80 is given, but TransformerEncoder"):
            set_chunk_ms(recognizer.asr.model, 80)
        set_chunk_ms(recognizer.asr.model, None)

    def test_parts_that_need_the_whole_utterance(self, ctc, monkeypatch):
        from espnet2.layers.utterance_mvn import UtteranceMVN

        recognizer = Recognizer(ctc)
        with monkeypatch.context() as patch:
            patch.setitem(ctc.model._modules, "normalize", UtteranceMVN())
            with pytest.raises(UserError, match="global_mvn"):
                StreamingRecognizer(recognizer)
        for part in ("preencoder", "postencoder"):
            with monkeypatch.context() as patch:
                patch.setattr(ctc.model, part, torch.nn.Identity())
                with pytest.raises(UserError, match=f"cannot stream with the {part} Identity"):
                    StreamingRecognizer(recognizer)

    def test_encoder_without_chunks(self, ctc):
        set_chunk_ms(ctc.model, float("inf"))
        assert ctc.model.encoder.chunk_size is None
        with pytest.raises(UserError, match="whole utterances.*give chunk_ms"):
            StreamingRecognizer(Recognizer(ctc))

    @pytest.mark.parametrize("chunk_ms", [85.0, 0.0, -80.0, float("nan"), 3.0])
    def test_chunk_of_no_whole_number_of_frames(self, ctc, chunk_ms):
        with pytest.raises(UserError, match="must be a multiple of 40 ms"):
            set_chunk_ms(ctc.model, chunk_ms)

    def test_chunk_of_another_length(self, ctc):
        with pytest.raises(UserError, match=r"chunk_size \(9 input frames\) must be a multiple"):
            set_chunk_ms(ctc.model, 90)
        set_chunk_ms(ctc.model, 120)
        assert ctc.model.encoder.chunk_size == 12

    def test_samples(self, ctc):
        streaming = StreamingRecognizer(Recognizer(ctc))
        state = streaming.initial_state()
        with pytest.raises(UserError, match="divide 16-bit samples by 32768"):
            streaming.infer(np.zeros(100, dtype=np.int16), state)
        with pytest.raises(UserError, match=r"shape \(100, 2\)"):
            streaming.infer(np.zeros((100, 2)), state)
        with pytest.raises(UserError, match=r"shape \(100, 2\): a stream is one channel"):
            simulate(streaming, np.zeros((100, 2)))


class TestSimulate:
    @pytest.mark.parametrize("length", [0, 700, 1600, 16000, 99999])
    def test_pieces(self, ctc, length):
        recognizer = Recognizer(ctc, beam_size=4)
        samples = speech(1.0)
        pieces = simulate(StreamingRecognizer(recognizer), samples, length)
        assert len(pieces) == 1 + -(-16000 // (length or 16000))
        given = [min(n * (length or 16000), 16000) / RATE for n in range(1, len(pieces))]
        assert [piece.given_seconds for piece in pieces] == [*given, 1.0]
        assert [len(piece.segments) for piece in pieces] == [0] * len(given) + [1]
        assert_same(pieces[-1].segments[0].nbest, recognizer(samples))
        assert all(piece.compute_seconds > 0 for piece in pieces)
