"""ScorerContract: what every LM that a search asks for next-token scores must show."""

import torch


class ScorerContract:
    """Mix in and define :meth:`make_scorer` (a fresh, deterministic scorer)."""

    vocab_size: int
    # Two sentences of token ids of different length, with a common beginning.
    sentences = ([4, 5, 3, 4, 9, 2], [4, 5, 8])
    atol = 1e-5

    def make_scorer(self):
        raise NotImplementedError

    def full_log_probs(self, scorer, tokens) -> torch.Tensor:
        """Reference (L+1, V): one forward over sos and all tokens, no state."""
        ids = torch.tensor([[self.vocab_size - 1, *tokens]])
        with torch.no_grad():
            logits, _ = scorer(ids, None)
        return logits[0].log_softmax(-1)

    def prefix(self, tokens) -> torch.Tensor:
        return torch.tensor([self.vocab_size - 1, *tokens])

    def walk(self, scorer, tokens):
        """Log-probs (L+1, V) by single steps, and the last state."""
        state = scorer.init_state(None)
        rows = []
        for end in range(len(tokens) + 1):
            row, state = scorer.score(self.prefix(tokens[:end]), state, None)
            rows.append(row)
        return torch.stack(rows), state

    def test_stepwise_equals_full_sequence(self):
        scorer = self.make_scorer()
        for tokens in self.sentences:
            stepwise, _ = self.walk(scorer, tokens)
            expected = self.full_log_probs(scorer, tokens)
            assert stepwise.shape == (len(tokens) + 1, self.vocab_size)
            torch.testing.assert_close(stepwise, expected, atol=self.atol, rtol=1e-5)
            targets = torch.tensor([*tokens, self.vocab_size - 1])[:, None]
            torch.testing.assert_close(
                stepwise.gather(1, targets).sum(), expected.gather(1, targets).sum()
            )

    def test_scores_are_log_probs_that_depend_on_the_prefix(self):
        scorer = self.make_scorer()
        rows, _ = self.walk(scorer, self.sentences[0])
        torch.testing.assert_close(rows.logsumexp(-1), torch.zeros(len(rows)), atol=1e-4, rtol=0)
        assert (rows[1:] - rows[:-1]).abs().amax(-1).min() > 1e-3

    def test_blank_is_never_predicted(self):
        scorer = self.make_scorer()
        rows, _ = self.walk(scorer, self.sentences[0])
        assert rows[:, 0].max() < -1e4
        assert torch.isfinite(rows).all()  # a weight of zero times it must stay zero

    def test_batch_equals_single(self):
        scorer = self.make_scorer()
        length = min(map(len, self.sentences))
        states = [self.walk(scorer, tokens[: length - 1])[1] for tokens in self.sentences]
        ys = torch.stack([self.prefix(tokens[:length]) for tokens in self.sentences])
        batch, new = scorer.batch_score(ys, states, None)
        assert batch.shape == (len(self.sentences), self.vocab_size)
        assert len(new) == len(self.sentences)
        for row, y, state in zip(batch, ys, states):
            single, _ = scorer.score(y, state, None)
            torch.testing.assert_close(row, single, atol=self.atol, rtol=1e-5)

    def test_states_are_not_modified(self):
        """A parent's state serves several children, in any order, more than once."""
        scorer = self.make_scorer()
        common = self.sentences[0][:2]
        _, parent = self.walk(scorer, common)
        children = ([*common, 3], [*common, 8], [*common, 3])
        rows = [scorer.score(self.prefix(child), parent, None)[0] for child in children]
        for row, child in zip(rows, children):
            expected = self.full_log_probs(scorer, child)[-1]
            torch.testing.assert_close(row, expected, atol=self.atol, rtol=1e-5)

    def _search(self, cls, beam_size):
        scorer = self.make_scorer()
        search = cls(
            beam_size=beam_size,
            vocab_size=self.vocab_size,
            weights={"lm": 1.0},
            scorers={"lm": scorer},
            sos=self.vocab_size - 1,
            eos=self.vocab_size - 1,
        )
        with torch.no_grad():
            return scorer, search(torch.zeros(5, 2), maxlenratio=1.0)

    def test_serves_in_espnets_batch_beam_search(self):
        from espnet.nets.batch_beam_search import BatchBeamSearch
        from espnet.nets.beam_search import BeamSearch

        scorer, batched = self._search(BatchBeamSearch, 4)
        _, single = self._search(BeamSearch, 4)
        assert batched[0].yseq.tolist() == single[0].yseq.tolist()
        for hypothesis in batched[:4]:
            tokens = hypothesis.yseq.tolist()[1:-1]
            rows = self.full_log_probs(scorer, tokens)
            # ESPnet appends eos without scoring it at the maximal length, here 5
            scored = tokens if len(tokens) == 5 else [*tokens, self.vocab_size - 1]
            score = sum(float(row[token]) for row, token in zip(rows, scored))
            assert abs(score - float(hypothesis.score)) < 1e-3
