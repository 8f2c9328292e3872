"""Learning to copy: noisy prefixes, rows of a batch, their scores, the training model."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.causal_llm import CausalLLM
from espnet_llm_plugin.llm.copy_accuracy import CLEAN, measure_copying, measure_directory
from espnet_llm_plugin.llm.copy_batch import IGNORED, copy_batch, copy_score, fitting
from espnet_llm_plugin.llm.copy_model import CopyLanguageModel
from espnet_llm_plugin.llm.copy_noise import BLANK, CopyNoise, NoisyPrefix, noisy_prefix
from tests.llm.tiny import char_tokens, save_adapted_dir, tiny_model

V = len(char_tokens())
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TEXT = torch.tensor([[4, 5, 6, 7, 8], [3, 9, 0, 0, 0], [2, 2, 3, 0, 0]])
LENGTHS = torch.tensor([5, 2, 3])


def rows(ids, lengths):
    return [row[:length].tolist() for row, length in zip(ids, lengths)]


def only(**noise):
    return CopyNoise(**{**vars(CLEAN), **noise})


def many(noise, sentences=400, pieces=20, **options):
    """Copies of many sentences of one piece, 5."""
    text = torch.full((sentences, pieces), 5)
    prefix = noisy_prefix(text, torch.full((sentences,), pieces), noise, V, **options)
    return rows(prefix.ids, prefix.lengths), prefix


class TestNoise:
    def test_clean_copy(self):
        prefix = noisy_prefix(TEXT, LENGTHS, CLEAN, V)
        assert rows(prefix.ids, prefix.lengths) == rows(TEXT, LENGTHS)
        assert not prefix.noise.any()

    def test_dropped(self):
        found, _ = many(only(drop=0.3), full=True)
        share = sum(map(len, found)) / (400 * 20)
        assert share == pytest.approx(0.7, abs=0.02)
        assert many(only(drop=1.0), full=True)[1].ids.shape == (400, 0)

    def test_replaced(self):
        found, _ = many(only(replace=0.3), full=True)
        pieces = torch.tensor(found)
        assert pieces.shape == (400, 20)
        # a random piece is the old one in one of the V - 3 cases
        assert float((pieces != 5).float().mean()) == pytest.approx(
            0.3 * (1 - 1 / (V - 3)), abs=0.02
        )
        assert set(pieces.flatten().tolist()) == set(range(2, V - 1))

    def test_inserted_after_the_piece(self):
        found, _ = many(only(insert=0.25), full=True)
        assert sum(map(len, found)) / (400 * 20) == pytest.approx(1.25, abs=0.02)
        assert all(row[0] == 5 and row.count(5) >= 20 for row in found)

    def test_repeats_and_blanks(self):
        found, _ = many(only(max_repeats=3), full=True, sentences=40, pieces=1)
        assert {tuple(row) for row in found} == {(5,), (5, 5), (5, 5, 5)}
        found, _ = many(only(max_blanks=2), full=True, sentences=40, pieces=1)
        assert {tuple(row) for row in found} == {(5,), (5, BLANK), (5, BLANK, BLANK)}

    def test_sentences_differ_in_noise_and_pace(self):
        """Drawn per sentence: errors between none and their bound, blanks likewise."""
        noise = CopyNoise(drop=0.0, replace=0.8, insert=0.0, max_repeats=1, max_blanks=4)
        found, prefix = many(noise, pieces=50)
        wrong = torch.tensor([sum(p not in (5, BLANK) for p in row) / 50 for row in found])
        blanks = torch.tensor([row.count(BLANK) / 50 for row in found])
        for share, bound in ((wrong, 0.8 * (1 - 1 / (V - 3))), (blanks, 2.0)):
            assert share.min() < 0.1 * bound and 0.85 * bound < share.max() <= 1.25 * bound
            assert float(share.mean()) == pytest.approx(bound / 2, rel=0.2)
        # the errors' level is that of the embeddings' noise; the pace is another
        levels = torch.stack([wrong, prefix.noise, blanks])
        assert torch.corrcoef(levels)[0, 1] > 0.9 and abs(torch.corrcoef(levels)[0, 2]) < 0.2
        assert prefix.noise.min() >= 0 and prefix.noise.max() <= noise.embedding_noise

    def test_padding_is_never_copied(self):
        noise = CopyNoise(drop=0.0, replace=0.0, insert=1.0, max_repeats=1, max_blanks=0)
        prefix = noisy_prefix(TEXT, LENGTHS, noise, V, full=True)
        assert prefix.lengths.tolist() == [10, 4, 6]
        assert (prefix.ids[1, 4:] == BLANK).all()

    def test_the_generator_decides(self):
        def draw(seed):
            generator = torch.Generator().manual_seed(seed)
            return noisy_prefix(TEXT, LENGTHS, CopyNoise(), V, generator=generator)

        assert torch.equal(draw(1).ids, draw(1).ids)
        assert not torch.equal(draw(1).noise, draw(2).noise)

    @pytest.mark.parametrize(
        "wrong", [{"drop": 1.5}, {"insert": -0.1}, {"max_repeats": 0}, {"max_blanks": -1}]
    )
    def test_out_of_range(self, wrong):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is .* expected"):
            CopyNoise(**wrong)


PREFIX = NoisyPrefix(
    torch.tensor([[7, 0, 7], [0, 0, 0], [9, 0, 0]]),
    torch.tensor([3, 0, 1]),
    torch.zeros(3),
)


def reference(model, prefix, text):
    """(summed NLL, number of right tokens) of one sentence, token by token, blank left out."""
    nll, right = 0.0, 0
    for end, target in enumerate([*text, V - 1]):
        ids = torch.tensor([[*prefix, V - 1, *text[:end]]])
        row = model(input_ids=ids).logits[0, -1, 1:].log_softmax(-1)
        nll -= float(row[target - 1])
        right += int(row.argmax()) == target - 1
    return nll, right


class TestRows:
    def test_rows_without_gaps(self):
        batch = copy_batch(PREFIX, TEXT, LENGTHS, V - 1)
        s, i = V - 1, IGNORED
        assert batch.ids.tolist() == [
            [7, 0, 7, s, 4, 5, 6, 7, 8],
            [s, 3, 9, 0, 0, 0, 0, 0, 0],
            [9, s, 2, 2, 3, 0, 0, 0, 0],
        ]
        assert batch.targets.tolist() == [
            [i, i, i, 4, 5, 6, 7, 8, s],
            [3, 9, s, i, i, i, i, i, i],
            [i, 2, 2, 3, s, i, i, i, i],
        ]
        assert batch.in_prefix.sum(1).tolist() == [3, 0, 1]

    @pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
    def test_score_is_that_of_each_sentence_alone(self, family):
        model = tiny_model(family, vocab_size=V)
        score = copy_score(model, PREFIX, TEXT, LENGTHS)
        alone = [
            reference(model, prefix, text)
            for prefix, text in zip(rows(PREFIX.ids, PREFIX.lengths), rows(TEXT, LENGTHS))
        ]
        assert int(score.tokens) == 13
        assert float(score.nll) == pytest.approx(sum(n for n, _ in alone) / 13, rel=1e-4)
        assert float(score.accuracy) == pytest.approx(sum(r for _, r in alone) / 13)

    def test_no_prefix(self):
        model = tiny_model("llama", vocab_size=V)
        score = copy_score(model, None, TEXT, LENGTHS)
        alone = [reference(model, [], text) for text in rows(TEXT, LENGTHS)]
        assert float(score.nll) == pytest.approx(sum(n for n, _ in alone) / 13, rel=1e-4)

    def test_a_prefix_without_room_is_left_out(self):
        """Context of 8: the first sentence has 3 + 1 + 5 positions, the third 1 + 1 + 3."""
        assert fitting(PREFIX, LENGTHS, 8).lengths.tolist() == [0, 0, 1]
        assert fitting(PREFIX, LENGTHS, 9).lengths.tolist() == [3, 0, 1]
        assert fitting(PREFIX, LENGTHS, None) is PREFIX
        model = tiny_model("llama", vocab_size=V)
        model.config.max_position_embeddings = 8
        cut = NoisyPrefix(PREFIX.ids, torch.tensor([0, 0, 1]), PREFIX.noise)
        expected = copy_score(tiny_model("llama", vocab_size=V), cut, TEXT, LENGTHS).nll
        assert float(copy_score(model, PREFIX, TEXT, LENGTHS).nll) == pytest.approx(float(expected))

    def test_noise_is_on_the_prefix_only_and_in_units_of_the_embeddings(self):
        model = tiny_model("llama", vocab_size=V, max_position_embeddings=400)
        seen = []
        forward = model.forward
        model.forward = lambda **inputs: seen.append(inputs["inputs_embeds"]) or forward(**inputs)
        long = NoisyPrefix(
            torch.full((2, 300), 7), torch.tensor([300, 300]), torch.tensor([2.0, 0])
        )
        text, lengths = TEXT[:2], LENGTHS[:2]
        copy_score(model, long, text, lengths)
        batch = copy_batch(long, text, lengths, V - 1)
        change = seen[0] - model.get_input_embeddings()(batch.ids)
        scale = float(model.get_input_embeddings().weight[7].pow(2).mean().sqrt())
        assert float(change[0, :300].std()) == pytest.approx(2 * scale, rel=0.05)
        assert not change[0, 300:].any() and not change[1].any()


class Copier(torch.nn.Module):
    """A causal LM that predicts, after the sos at position n, the n tokens before it; then eos."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(torch.eye(V))
        self.config = tiny_model("llama", vocab_size=V).config

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, inputs_embeds, attention_mask, use_cache):
        ids = inputs_embeds.argmax(-1)
        logits = torch.zeros(*ids.shape, V)
        for row, tokens in zip(logits, ids.tolist()):
            begin = tokens.index(V - 1)
            for position in range(begin, len(tokens)):
                offset = position - begin
                following = tokens[offset] if offset < begin else V - 1
                row[position, following] = 20.0
        return type("Output", (), {"logits": logits})


class TestMeasures:
    def test_a_perfect_copier(self):
        stats, tokens = measure_copying(Copier(), TEXT, LENGTHS, CLEAN, V)
        assert int(tokens) == 13
        for name in ("acc_copy", "acc_clean", "acc_random"):
            assert float(stats[name]) == 1
        assert float(stats["loss_copy"]) < 1e-6
        # without a prefix it ends at once: right after the three sentences only
        assert float(stats["acc_plain"]) == pytest.approx(3 / 13)
        assert float(stats["gap_copy"]) > 5

    def test_an_llm_that_ignores_its_prefix(self):
        model = tiny_model("llama", vocab_size=V)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
        stats, _ = measure_copying(model, TEXT, LENGTHS, CopyNoise(embedding_noise=0.0), V)
        assert float(stats["gap_copy"]) == pytest.approx(0, abs=1e-6)
        assert float(stats["loss_copy"]) == pytest.approx(float(stats["loss_plain"]))

    def test_the_same_in_every_epoch_and_no_gap_of_one_sentence(self):
        model = tiny_model("llama", vocab_size=V)
        first, _ = measure_copying(model, TEXT, LENGTHS, CopyNoise(), V)
        torch.rand(3)  # the state of training's generator does not matter
        again, _ = measure_copying(model, TEXT, LENGTHS, CopyNoise(), V)
        assert first == again
        alone, _ = measure_copying(model, TEXT[:1], LENGTHS[:1], CopyNoise(), V)
        assert "gap_copy" not in alone

    def test_of_a_directory_and_the_gate(self, tmp_path, capsys):
        from espnet_llm_plugin.bin import copy_accuracy

        llm = save_adapted_dir(tmp_path / "llm", char_tokens())
        sentences = ["ion rest", "tin", "a stone", "era"]
        figures = measure_directory(llm, sentences, CopyNoise(), batch_size=2)
        (tmp_path / "text").write_text("".join(f"u{i} {s}\n" for i, s in enumerate(sentences)))
        options = ["--llm", str(llm), "--text", str(tmp_path / "text")]
        options += ["--output", str(tmp_path / "copy.json")]
        copy_accuracy.main(options)
        assert "acc_random" in capsys.readouterr().out
        # the plain loss does not depend on batches
        import json

        found = json.loads((tmp_path / "copy.json").read_text())
        assert found["loss_plain"] == pytest.approx(figures["loss_plain"], rel=1e-5)
        copy_accuracy.main([*options, "--require", "acc_random=0"])
        with pytest.raises(UserError, match=r"acc_random is 0\.\d+, at least 0\.99 is required"):
            copy_accuracy.main([*options, "--require", "acc_random=0.99"])
        (tmp_path / "copy.json").unlink()
        with pytest.raises(UserError, match="is required"):
            copy_accuracy.main([*options, "--require", "acc_clean=0", "acc_random=1.1"])
        assert not (tmp_path / "copy.json").exists()  # a recipe would take it for passed
        with pytest.raises(UserError, match="expected NAME=VALUE with one of loss_plain"):
            copy_accuracy.main([*options, "--require", "accuracy=0.9"])
        with pytest.raises(UserError, match="at least two sentences"):
            copy_accuracy.main([*options, "--max_sentences", "1"])


def make(**conf):
    torch.manual_seed(0)
    return CopyLanguageModel(CausalLLM(V, config=SMALL), V, **conf)


class TestModel:
    def test_shares_of_batches(self):
        model = make(plain_share=0.3, random_share=0.5).train()
        plain = ["loss_plain" in model(TEXT, LENGTHS)[1] for _ in range(200)]
        assert sum(plain) / 200 == pytest.approx(0.3, abs=0.1)

    def test_random_text_has_nothing_of_the_sentence(self, monkeypatch):
        from espnet_llm_plugin.llm import copy_model

        seen = []
        score = copy_model.copy_score
        monkeypatch.setattr(
            copy_model,
            "copy_score",
            lambda m, p, text, n: seen.append(text) or score(m, p, text, n),
        )
        make(plain_share=0.0, random_share=0.0).train()(TEXT, LENGTHS)
        make(plain_share=0.0, random_share=1.0).train()(TEXT, LENGTHS)
        assert torch.equal(seen[0], TEXT) and not torch.equal(seen[1], TEXT)

    def test_noise_reaches_the_prefix(self, monkeypatch):
        from espnet_llm_plugin.llm import copy_model

        model = make(plain_share=0.0, random_share=0.0, drop=0.5, max_blanks=0).train()
        assert (model.noise.drop, model.noise.max_blanks, model.noise.replace) == (0.5, 0, 0.1)
        seen = []
        noise = copy_model.noisy_prefix
        monkeypatch.setattr(
            copy_model, "noisy_prefix", lambda *given: seen.append(given[2]) or noise(*given)
        )
        model(TEXT, LENGTHS)
        assert seen == [model.noise]

    def test_plain_batches_and_perplexity_are_those_of_espnet(self):
        from espnet2.lm.espnet_model import ESPnetLanguageModel

        model = make(plain_share=1.0).train()
        expected = ESPnetLanguageModel(model.lm, V)(TEXT, LENGTHS)
        loss, stats, weight = model(TEXT, LENGTHS)
        assert float(loss) == pytest.approx(float(expected[0])) and int(weight) == 13
        mean = float(model.nll(TEXT, LENGTHS)[0].sum()) / 13
        assert mean == pytest.approx(float(expected[0]))
        _, stats, _ = model.eval()(TEXT, LENGTHS)
        assert float(stats["loss_plain"]) == pytest.approx(float(expected[0]), rel=1e-5)

    def test_loss_of_validation(self):
        model = make(plain_share=0.25).eval()
        loss, stats, weight = model(TEXT, LENGTHS)
        mixed = 0.25 * stats["loss_plain"] + 0.75 * stats["loss_copy"]
        assert float(loss) == pytest.approx(float(mixed)) and int(weight) == 13
        assert {"acc_plain", "acc_copy", "acc_clean", "acc_random", "gap_copy"} <= set(stats)

    def test_training_depends_on_the_seed_alone(self):
        def losses(seed):
            model = make().train()
            torch.manual_seed(seed)
            return [float(model(TEXT, LENGTHS)[0]) for _ in range(4)]

        assert losses(3) == losses(3) != losses(4)

    def test_every_parameter_is_trained(self):
        model = make(plain_share=0.0).train()
        model(TEXT, LENGTHS)[0].backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())

    def test_it_learns_to_copy(self):
        """Eight random pieces, one layer's worth of width: from chance to nearly always."""
        torch.manual_seed(0)
        config = {**SMALL, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
        model = CopyLanguageModel(CausalLLM(V, config=config), V, plain_share=0.0, random_share=1.0)
        model.noise = CLEAN
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        text, lengths = torch.ones(64, 4, dtype=torch.long), torch.full((64,), 4)
        before = measure_copying(model.lm.llm, text, lengths, CLEAN, V)[0]["acc_random"]
        for _ in range(250):
            optimizer.zero_grad()
            model(text, lengths)[0].backward()
            optimizer.step()
        after = measure_copying(model.lm.llm, text, lengths, CLEAN, V)[0]["acc_random"]
        assert float(before) < 0.4 and float(after) > 0.9

    def test_mistakes(self, tmp_path):
        from espnet2.lm.transformer_lm import TransformerLM

        with pytest.raises(UserError, match="plain_share is 2; expected 0 to 1"):
            make(plain_share=2)
        with pytest.raises(UserError, match="has no dropped; expected some of plain_share"):
            make(dropped=0.1)
        llm = save_adapted_dir(tmp_path / "llm", char_tokens())
        frozen = CausalLLM(V, llm=str(llm), frozen=True)
        other = TransformerLM(V, unit=8, att_unit=8, head=2, layer=1, embed_unit=8)
        for lm in (frozen, other):
            with pytest.raises(UserError, match="trains a `causal_llm` that is not frozen"):
                CopyLanguageModel(lm, V)
