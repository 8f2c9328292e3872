"""CausalLLM: training forward, cached scoring, checkpoints."""

import copy

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import load_causal_lm, load_config
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from tests.contracts.checkpoint_contract import CheckpointContract
from tests.contracts.scorer_contract import ScorerContract
from tests.llm.tiny import (
    FAMILIES,
    char_tokens,
    save_adapted_dir,
    save_llm_dir,
    tiny_config,
)

V = len(char_tokens())
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def from_scratch(**extra) -> CausalLLM:
    """Random weights, large enough for predictions to depend on the context."""
    torch.manual_seed(0)
    lm = CausalLLM(V, config={**SMALL, "initializer_range": 0.5, **extra})
    return lm.eval()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return save_adapted_dir(tmp_path_factory.mktemp("llm") / "adapted", char_tokens())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_adapted_dir(tmp_path_factory.mktemp("llm") / "other", char_tokens(), seed=5)


class TestScorerFromScratch(ScorerContract):
    vocab_size = V

    def make_scorer(self):
        return from_scratch()


class TestScorerFrozen(ScorerContract):
    vocab_size = V

    @pytest.fixture(autouse=True)
    def _llm(self, adapted):
        self.directory = adapted

    def make_scorer(self):
        return CausalLLM(V, llm=str(self.directory), frozen=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_score_as_their_forward(family):
    config = tiny_config(family).to_dict()
    for key in ("vocab_size", "architectures", "transformers_version", "dtype"):
        config.pop(key, None)
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    config["init_std" if family == "opt" else "initializer_range"] = 0.5
    lm = CausalLLM(V, config=config).eval()
    tokens = torch.tensor([V - 1, 4, 5, 3, 8, 2])
    with torch.no_grad():
        expected = lm(tokens[None], None)[0][0].log_softmax(-1)
    state = None
    for end in range(1, 7):
        row, state = lm.score(tokens[:end], state, None)
        torch.testing.assert_close(row, expected[end - 1], atol=1e-5, rtol=1e-5)
    assert lm._prefix_lm.uses_cache


class TestForward:
    def test_padding_on_the_right_changes_nothing(self):
        lm = from_scratch()
        alone, hidden = lm(torch.tensor([[V - 1, 4, 5]]), None)
        padded, _ = lm(torch.tensor([[V - 1, 4, 5, 0, 0], [V - 1, 4, 5, 6, 7]]), None)
        assert hidden is None and alone.shape == (1, 3, V)
        torch.testing.assert_close(padded[0, :3], alone[0])
        torch.testing.assert_close(padded[1, :3], alone[0])

    def test_blank_has_no_probability_and_no_nan_gradient(self):
        from espnet2.lm.espnet_model import ESPnetLanguageModel

        model = ESPnetLanguageModel(from_scratch().train(), V)
        text = torch.tensor([[4, 5, 6], [7, 0, 0]])
        loss, _, _ = model(text, torch.tensor([3, 1]))
        loss.backward()
        assert torch.isfinite(loss)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
        logits, _ = model.lm(torch.tensor([[V - 1, 4]]), None)
        assert logits.softmax(-1)[..., 0].max() == 0

    def test_loss_is_that_of_a_reference(self):
        """Sum over tokens and end of sentence, blank left out of the softmax."""
        from espnet2.lm.espnet_model import ESPnetLanguageModel

        lm = from_scratch()
        loss, _, weight = ESPnetLanguageModel(lm, V)(
            torch.tensor([[4, 5], [7, 0]]), torch.tensor([2, 1])
        )
        total = 0.0
        for sentence in ([4, 5], [7]):
            for end, target in enumerate([*sentence, V - 1]):
                ids = torch.tensor([[V - 1, *sentence[:end]]])
                row = lm.llm(input_ids=ids).logits[0, -1, 1:].log_softmax(-1)
                total -= float(row[target - 1])
        assert int(weight) == 5
        assert float(loss) == pytest.approx(total / 5, rel=1e-5)

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        plain = from_scratch().train()
        saving = CausalLLM(V, config=SMALL, gradient_checkpointing=True)
        saving.load_state_dict(plain.state_dict())
        saving.train()
        assert saving.llm.is_gradient_checkpointing and not plain.llm.is_gradient_checkpointing
        ids = torch.tensor([[V - 1, 4, 5, 6]])
        for lm in (plain, saving):
            lm(ids, None)[0][..., 3].sum().backward()
        for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
            torch.testing.assert_close(a.grad, b.grad, msg=name)

    def test_attention_implementation(self):
        lm = CausalLLM(V, config=SMALL, attn_implementation="eager")
        assert lm.llm.config._attn_implementation == "eager"
        assert from_scratch().llm.config._attn_implementation == "sdpa"


class TestSearchUse:
    """The ways in which ESPnet's and our searches call a language model."""

    def expected(self, lm, tokens):
        with torch.no_grad():
            return lm(torch.tensor([[V - 1, *tokens]]), None)[0][0, -1].log_softmax(-1)

    def test_one_token_is_computed_per_step(self):
        lm = from_scratch()
        _, state = lm.score(torch.tensor([V - 1]), None, None)
        for end in range(1, 5):
            _, state = lm.score(torch.tensor([V - 1, 4, 5, 6, 7][: end + 1]), state, None)
        assert lm._prefix_lm.num_token_forwards == 5

    def test_state_of_another_prefix_is_not_trusted(self):
        lm = from_scratch()
        _, state = lm.score(torch.tensor([V - 1, 4, 5]), None, None)
        for tokens in ([4, 6, 7], [4], [4, 5]):
            row, _ = lm.score(torch.tensor([V - 1, *tokens]), state, None)
            torch.testing.assert_close(row, self.expected(lm, tokens), atol=1e-5, rtol=1e-5)

    def test_prefix_without_states(self):
        lm = from_scratch()
        ys = torch.tensor([[V - 1, 4, 5], [V - 1, 7, 8]])
        rows, _ = lm.batch_score(ys, [None, None], None)
        for row, tokens in zip(rows, ([4, 5], [7, 8])):
            torch.testing.assert_close(row, self.expected(lm, tokens), atol=1e-5, rtol=1e-5)

    def test_last_tokens_only(self):
        """time_sync_decoding and align_length_sync_decoding give (B, 1), blank at the start."""
        lm = from_scratch()
        assert lm.zero_state() is None
        rows, states = lm.batch_score(torch.tensor([[0]]), [lm.zero_state()], None)
        torch.testing.assert_close(rows[0], self.expected(lm, []), atol=1e-5, rtol=1e-5)
        rows, _ = lm.batch_score(torch.tensor([[4], [0]]), [states[0], None], None)
        for row, tokens in zip(rows, ([4], [])):
            torch.testing.assert_close(row, self.expected(lm, tokens), atol=1e-5, rtol=1e-5)

    def test_ragged_prefixes_padded_on_the_left(self):
        lm = from_scratch()
        assert lm.batch_any_length
        _, state = lm.score(torch.tensor([V - 1, 4]), None, None)
        ys = torch.tensor([[V - 1, 4, 5], [0, 0, V - 1]])
        rows, _ = lm.batch_score(ys, [state, None], None)
        for row, tokens in zip(rows, ([4, 5], [])):
            torch.testing.assert_close(row, self.expected(lm, tokens), atol=1e-5, rtol=1e-5)

    def test_serves_in_espnets_transducer_search(self):
        """``default`` search of BeamSearchTransducer: score = transducer + weight * LM."""
        from types import SimpleNamespace

        from espnet2.asr.transducer.beam_search_transducer import BeamSearchTransducer

        # A transducer that emits about one label a frame, so that the search ends.
        table = 2 * torch.randn(4, V, generator=torch.Generator().manual_seed(1))
        decoder = SimpleNamespace(
            odim=V,
            dunits=1,
            blank_id=0,
            device="cpu",
            set_device=lambda device: None,
            init_state=lambda batch: None,
            score=lambda hyp, cache: (len(hyp.yseq) - 1, None, hyp.yseq[-1]),
        )

        def joint(frame, labels):
            logits = table[int(frame)].clone()
            logits[0] = -2.0 if labels <= int(frame) else 6.0
            return logits

        def search(weight):
            run = BeamSearchTransducer(
                decoder, joint, 4, lm=lm, lm_weight=weight, score_norm=False, nbest=4
            )
            with torch.no_grad():
                return run(torch.arange(4))

        lm = from_scratch()
        best = search(0.1)[0]
        assert len(best.yseq) > 3
        assert lm._prefix_lm.num_token_forwards < 60  # cached, not recomputed
        # the same labels by hand; they can be emitted at one frame each only
        score = 0.0
        for end in range(1, len(best.yseq)):
            score += 0.1 * float(self.expected(lm, best.yseq[1:end])[best.yseq[end]])
        labels = 0
        for frame in range(4):
            row = joint(frame, labels).log_softmax(-1)
            if labels + 1 < len(best.yseq):
                score += float(row[best.yseq[labels + 1]])
                labels += 1
                row = joint(frame, labels).log_softmax(-1)
            score += float(row[0])
        assert float(best.score) == pytest.approx(score, abs=1e-3)

    def test_copies_have_their_own_weights_and_no_running_states(self):
        lm = from_scratch()
        lm.score(torch.tensor([V - 1]), None, None)
        again = copy.deepcopy(lm)
        assert again._prefix_lm is None and lm._prefix_lm is not None
        row, _ = again.score(torch.tensor([V - 1]), None, None)
        assert again._prefix_lm.model is again.llm is not lm.llm
        torch.testing.assert_close(row, self.expected(lm, []))


class TestCheckpointFromScratch(CheckpointContract):
    def make(self):
        return CausalLLM(V, config={**SMALL, "initializer_range": 0.5}).eval()

    def run(self, model):
        with torch.no_grad():
            return model(torch.tensor([[V - 1, 4, 5]]), None)[0]


class TestCheckpointUntied(TestCheckpointFromScratch):
    def make(self):
        return CausalLLM(V, config={**SMALL, "tie_word_embeddings": False}).eval()


class TestCheckpointFineTuned(TestCheckpointFromScratch):
    @pytest.fixture(autouse=True)
    def _llm(self, adapted):
        self.directory = adapted

    def make(self):
        return CausalLLM(V, llm=str(self.directory)).eval()

    def test_starts_from_the_pretrained_weights(self):
        frozen = CausalLLM(V, llm=str(self.directory), frozen=True)
        assert torch.equal(self.run(self.make()), self.run(frozen))

    def test_all_weights_are_trained(self):
        model = CausalLLM(V, llm=str(self.directory))
        assert model.training and model.llm.training
        assert all(p.requires_grad for p in model.parameters())
        model(torch.tensor([[V - 1, 4, 5]]), None)[0][..., 1:].sum().backward()
        assert all(p.grad is not None for p in model.parameters())


class TestCheckpointFrozen(TestCheckpointFromScratch):
    @pytest.fixture(autouse=True)
    def _llm(self, adapted, other):
        self.directory, self.other = adapted, other

    def make(self):
        return CausalLLM(V, llm=str(self.directory), frozen=True)

    def frozen_tensors(self, model):
        return list(model.model().parameters())

    def make_with_other_llm(self):
        return CausalLLM(V, llm=str(self.other), frozen=True)

    def test_nothing_is_trained_and_the_checkpoint_is_the_record(self):
        model = self.make()
        assert not list(model.parameters())
        assert set(model.state_dict()) == {"identity.fingerprint"}

    def test_weights_load_at_first_use(self):
        model = self.make()
        assert not model._frozen_llm.is_loaded
        self.run(model)
        assert model._frozen_llm.is_loaded

    def test_dtype(self):
        model = CausalLLM(V, llm=str(self.directory), frozen=True, dtype="bfloat16")
        assert model.model().dtype == torch.bfloat16
        assert self.run(model).dtype == torch.float32


def test_checkpoint_of_another_shape():
    saved = from_scratch().state_dict()
    with pytest.raises(UserError, match=r"embed_tokens.weight is of shape \(12, 16\), .*\(12, 8\)"):
        from_scratch(hidden_size=8).load_state_dict(saved, strict=False)


class TestOptions:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({}, "got neither"),
            ({"llm": "x", "config": SMALL}, "got both"),
            ({"config": SMALL, "frozen": True}, "`frozen: true` needs `llm`"),
            ({"llm": "x", "frozen": True, "gradient_checkpointing": True}, "nothing is trained"),
            ({"config": SMALL, "dtype": "bfloat16"}, "`train_dtype` or `use_amp`"),
            ({"llm": "./absent"}, "./absent does not exist"),
            ({"config": {"hidden_size": 8}}, "unknown model_type None"),
            ({"config": {**SMALL, "model_type": "llamma"}}, "unknown model_type 'llamma'"),
            ({"config": {**SMALL, "num_layers": 2}}, "LlamaConfig has no num_layers"),
            ({"config": {**SMALL, "vocab_size": 99}}, r"vocab_size 99 .* \(12\)"),
            ({"config": {**SMALL, "hidden_act": "no"}}, "cannot build this llama.*no"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(UserError, match=message):
            CausalLLM(V, **options)

    def test_special_ids_of_a_new_model(self):
        config = from_scratch().llm.config
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (V - 1, V - 1, 0)
        assert config.vocab_size == V

    @pytest.mark.parametrize("frozen", [True, False])
    def test_llm_over_another_token_list(self, adapted, frozen):
        with pytest.raises(UserError, match="over 12 tokens, the token list has 13"):
            CausalLLM(V + 1, llm=str(adapted), frozen=frozen)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """An LLM with its own tokens, of which it has fewer than rows."""
    return save_llm_dir(tmp_path_factory.mktemp("llm") / "native")


def rows_of(llm):
    return load_config(llm).vocab_size


LORA = {"r": 2, "alpha": 4, "targets": "all-linear"}


def with_lora(llm, vocab_size=V, **options):
    torch.manual_seed(0)
    lm = CausalLLM(vocab_size, llm=str(llm), tuning="lora", lora_conf=LORA, **options)
    with torch.no_grad():
        for parameter in lm.parameters():  # B is zero at the start
            parameter.add_(0.3 * torch.randn_like(parameter))
    return lm


class OwnTokensContract(ScorerContract):
    """Token 0 is one like others."""

    @pytest.fixture(autouse=True)
    def _llm(self, native):
        self.directory, self.vocab_size = native, rows_of(native)
        self.sentences = ([4, 300, 0, 4, 9, 260], [4, 300, 8])

    def test_blank_is_never_predicted(self):
        rows, _ = self.walk(self.make_scorer(), self.sentences[0])
        assert rows[:, 0].min() > -1e4


class TestScorerOwnTokens(OwnTokensContract):
    def make_scorer(self):
        return CausalLLM(self.vocab_size, llm=str(self.directory), frozen=True)


class TestScorerOwnTokensLora(OwnTokensContract):
    def make_scorer(self):
        return with_lora(self.directory, self.vocab_size).eval()


class TestScorerLora(ScorerContract):
    vocab_size = V

    @pytest.fixture(autouse=True)
    def _llm(self, adapted):
        self.directory = adapted

    def make_scorer(self):
        return with_lora(self.directory).eval()


class TestCheckpointLora(CheckpointContract):
    @pytest.fixture(autouse=True)
    def _llm(self, adapted, other):
        self.directory, self.other = adapted, other

    def make(self):
        return CausalLLM(V, llm=str(self.directory), tuning="lora", lora_conf=LORA).eval()

    def make_with_other_llm(self):
        return CausalLLM(V, llm=str(self.other), tuning="lora", lora_conf=LORA).eval()

    def run(self, model):
        with torch.no_grad():
            return model(torch.tensor([[V - 1, 4, 5, 3]]), None)[0]

    def frozen_tensors(self, model):
        return list(model.tuned._frozen_tensors())


def test_own_tokens_are_the_llms(native):
    """ESPnet's loss of a sentence is the LLM's, from BOS to EOS, whatever id ESPnet gives them."""
    from espnet2.lm.espnet_model import ESPnetLanguageModel

    rows = rows_of(native)
    model = ESPnetLanguageModel(CausalLLM(rows, llm=str(native)).eval(), rows)
    llm, tokenizer = load_causal_lm(native), load_tokenizer(native)
    sentences = [[5, 0, 300, 7], [9, 260]]
    text = torch.tensor([sentences[0], [*sentences[1], 0, 0]])
    with torch.no_grad():
        nll, _ = model.nll(text, torch.tensor([4, 2]))
        for row, ids in zip(nll, sentences):
            full = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            log_probs = llm(torch.tensor([full])).logits[0].log_softmax(-1)
            expected = -sum(log_probs[n, token] for n, token in enumerate(full[1:]))
            torch.testing.assert_close(row.sum(), expected, atol=1e-4, rtol=1e-5)
    with pytest.raises(UserError, match=f"token {rows - 1} of LLM .*leave out the text"):
        model.lm(torch.tensor([[rows - 1, 3, rows - 1]]), None)


def test_lora_learns_and_the_llm_stays(adapted):
    lm = CausalLLM(V, llm=str(adapted), tuning="lora", lora_conf=LORA)
    frozen = [tensor.clone() for tensor in lm.tuned._frozen_tensors()]
    optimizer = torch.optim.Adam(lm.parameters(), lr=0.05)
    ids = torch.tensor([[V - 1, 4, 5, 3, 7]])
    losses = []
    for _ in range(8):
        logits, _ = lm(ids[:, :-1], None)
        loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    after = list(lm.tuned._frozen_tensors())
    assert len(after) == len(frozen) or not frozen
    plain = load_causal_lm(adapted)
    found = [t for t in lm.tuned.model().state_dict() if "lora" not in t]
    assert len(found) == len(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        own = lm.tuned.model().state_dict()
        key = name if name in own else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(own[key], tensor)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"tuning": "some"}, "tuning is 'some'"),
        ({"tuning": "lora", "frozen": True}, "excludes `frozen: true`"),
        ({"lora_conf": {"r": 2}}, "`lora_conf` is for `tuning: lora`"),
        ({"tuning": "lora", "lora_conf": {"rank": 2}}, "unknown option 'rank'"),
    ],
)
def test_bad_tuning_is_named(adapted, options, message):
    with pytest.raises(UserError, match=message):
        CausalLLM(V, llm=str(adapted), **options)


def test_lora_from_scratch_is_refused():
    with pytest.raises(UserError, match="adapts a pretrained LLM"):
        CausalLLM(V, config=SMALL, tuning="lora")


def test_own_tokens_of_another_size(native):
    with pytest.raises(
        UserError, match="tokens of its own, the token list has 12.*make_token_list"
    ):
        CausalLLM(V, llm=str(native), frozen=True)
