"""The label-synchronous search against transformers' ``generate`` on the same model and audio."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from espnet_llm_plugin.llm.tuning import TunedLLM
from espnet_llm_plugin.speech_llm.hypothesis import SearchWeights
from espnet_llm_plugin.speech_llm.interface import build_interface
from espnet_llm_plugin.speech_llm.scorers import LLMScorer
from espnet_llm_plugin.speech_llm.search import LabelSearch
from tests.llm.tiny import tiny_model

BOS, EOS = 1, 2
LONGEST = 14


class Recomputed:
    """A ``TokenScorer`` that runs a LLM over the audio and the whole prefix every time."""

    def __init__(self, model, prefixes):
        self.model, self.prefixes = model, prefixes
        self.rows = [(utterance, []) for utterance in range(len(prefixes))]

    def step(self, tokens, parents):
        self.rows = [
            (self.rows[parent][0], [*self.rows[parent][1], token])
            for parent, token in zip(parents.tolist(), tokens.tolist())
        ]
        out = []
        for utterance, ids in self.rows:
            text = self.model.get_input_embeddings()(torch.tensor(ids))
            embeddings = torch.cat([self.prefixes[utterance], text])[None]
            out.append(self.model(inputs_embeds=embeddings).logits[0, -1].float().log_softmax(-1))
        return torch.stack(out)


def generate(model, prefix, beam, length_norm, longest):
    """Token sequences and scores, best first, of one utterance (P, D)."""
    bos = model.get_input_embeddings()(torch.tensor([BOS]))
    embeddings = torch.cat([prefix, bos])[None]
    found = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        do_sample=False,
        num_beams=beam,
        num_return_sequences=beam,
        length_penalty=length_norm,
        max_new_tokens=longest,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = []
    for row in found.sequences.tolist():
        end = row.index(EOS) if EOS in row else longest
        sequences.append(tuple(row[:end]))
    scores = found.sequences_scores.tolist() if beam > 1 else None
    return sequences, scores


class Loaded:
    """What an interface needs of a ``TunedLLM``, around a model in memory."""

    context = 64

    def __init__(self, model):
        self._model, self.config = model, model.config

    def model(self, device):
        return self._model

    def embed(self, ids):
        return self._model.get_input_embeddings()(ids)


def interface_scorer(model, audio):
    """The prefix interface, which reads the audio once and shares keys among hypotheses."""
    interface = build_interface("prefix", Loaded(model), {}).eval()
    lengths = torch.tensor([len(one) for one in audio])
    return LLMScorer(interface, interface.start(pad_sequence(audio, batch_first=True), lengths))


SCORERS = {"recomputed": Recomputed, "prefix": interface_scorer}


@pytest.fixture(scope="module", params=[("llama", 3), ("llama", 7), ("qwen2", 4)], ids=str)
def case(request):
    """Models that end some texts early, some late, and some not at all."""
    family, seed = request.param
    model = tiny_model(family, vocab_size=17, seed=seed, tied=False)
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 5, 2, 4)
    audio = [torch.randn(length, 16, generator=generator) for length in lengths]
    return model, audio


def ours(case, scorer, beam, length_norm=0.0, longest=LONGEST):
    model, audio = case
    search = LabelSearch(
        sos=BOS,
        eos=EOS,
        vocab_size=17,
        beam_size=beam,
        nbest=beam,
        weights=SearchWeights(length_norm=length_norm),
        end_detection="generate",
    )
    return search({"decoder": SCORERS[scorer](model, audio)}, [longest] * len(audio))


@pytest.mark.parametrize("scorer", SCORERS)
def test_greedy_is_that_of_generate_token_by_token(case, scorer):
    sequences = []
    for hyps, prefix in zip(ours(case, scorer, 1), case[1]):
        (expected,), _ = generate(case[0], prefix, 1, 0.0, LONGEST)
        assert hyps[0].tokens == expected
        sequences.append(expected)
    assert len(set(sequences)) > 1


@pytest.mark.parametrize("longest", [4, LONGEST])
@pytest.mark.parametrize("length_norm", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("beam", [2, 4])
def test_beams_are_those_of_generate(case, beam, length_norm, longest):
    model, audio = case
    expected = [generate(model, prefix, beam, length_norm, longest) for prefix in audio]
    ended = set()
    for scorer in SCORERS:
        lists = ours(case, scorer, beam, length_norm, longest)
        for hyps, (sequences, scores) in zip(lists, expected):
            assert [hyp.tokens for hyp in hyps] == sequences
            assert [hyp.ranking for hyp in hyps] == pytest.approx(scores, abs=1e-4)
            ended.update(hyp.ended for hyp in hyps)
    assert True in ended or longest < LONGEST


@pytest.mark.parametrize("beam", [1, 4])
def test_a_real_llm_writes_what_generate_writes(shared_data, beam):
    llm = TunedLLM(str(shared_data / "llm" / "stories260K"), tuning="frozen")
    interface = build_interface("prefix", llm, {}).eval()
    nothing, length = torch.zeros(1, 0, llm.hidden_size), torch.zeros(1, dtype=torch.long)
    search = LabelSearch(
        sos=BOS,
        eos=EOS,
        vocab_size=llm.vocab_size,
        beam_size=beam,
        nbest=beam,
        end_detection="generate",
    )
    scorer = LLMScorer(interface, interface.start(nothing, length))
    (hyps,) = search({"decoder": scorer}, [30])
    model = llm.model()
    sequences, scores = generate(model, torch.zeros(0, llm.hidden_size), beam, 0.0, 30)
    assert [hyp.tokens for hyp in hyps] == sequences
    if beam > 1:
        assert [hyp.ranking for hyp in hyps] == pytest.approx(scores, abs=1e-3)
