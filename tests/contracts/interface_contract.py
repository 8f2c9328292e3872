"""What every interface between audio and an LLM must show."""

import copy

import pytest
import torch

from espnet_llm_plugin.errors import UserError

BEFORE, AFTER = (3, 4), (5,)
VOCAB = 37


class InterfaceContract:
    """Mix into a test class that has a fixture ``interface`` over a tiny LLM of 37 rows.

    It must be in eval mode, with parameters that are not its initial ones.
    """

    tolerance = 1e-5
    # Tokens that the LLM can see are at least so many.
    context = 20
    # Whether some token of every text sees all of the audio.
    sees_all_audio = True
    # Whether soft vectors are seen as tokens of the prompt are, not as audio is.
    soft_is_prompt = True

    def close(self, actual, expected):
        torch.testing.assert_close(actual, expected, atol=self.tolerance, rtol=self.tolerance)

    @pytest.fixture
    def batch(self, interface):
        """Audio, its lengths, texts, their lengths; one utterance without audio."""
        audio = torch.randn(4, 6, interface.llm.hidden_size)
        text = torch.randint(1, VOCAB, (4, 7))
        return audio, torch.tensor([6, 3, 0, 4]), text, torch.tensor([5, 7, 4, 1])

    def alone(self, interface, audio, length, text, **prompt):
        """Logits (U, V) of one utterance in a batch of its own, without any padding."""
        logits, _ = interface(
            audio[None, : int(length)],
            length[None],
            text[None],
            torch.tensor([len(text)]),
            **prompt,
        )
        return logits[0]

    @pytest.mark.parametrize("prompt", [{}, {"before": BEFORE, "after": AFTER}])
    def test_batch_is_single(self, interface, batch, prompt):
        audio, lengths, text, text_lengths = batch
        with torch.no_grad():
            logits, hidden = interface(*batch, **prompt)
            for i, n in enumerate(text_lengths.tolist()):
                expected = self.alone(interface, audio[i], lengths[i], text[i, :n], **prompt)
                self.close(logits[i, :n], expected)
                if "audio" in hidden:
                    p = int(lengths[i])
                    _, own = interface(
                        audio[i : i + 1, :p],
                        lengths[i : i + 1],
                        text[i : i + 1],
                        text_lengths[:1],
                        **prompt,
                    )
                    self.close(hidden["audio"][i, :p], own["audio"][0])

    @pytest.mark.parametrize("prompt", [{}, {"before": BEFORE, "after": AFTER}])
    def test_stepwise_is_teacher_forced(self, interface, batch, prompt):
        audio, lengths, text, text_lengths = batch
        with torch.no_grad():
            expected, _ = interface(*batch, **prompt)
        state = interface.start(audio, lengths, **prompt)
        assert state.utterance.tolist() == [0, 1, 2, 3]
        for u in range(text.size(1)):
            logits, state = interface.step(text[:, u], state)
            rows = (u < text_lengths).nonzero().flatten()
            self.close(logits[rows], expected[rows, u])

    def test_soft_vectors_stand_before_the_audio(self, interface, batch):
        """Embeddings of tokens, others in each utterance: as if they were of the prompt."""
        audio, lengths, text, text_lengths = batch
        ids = torch.tensor([[6, 7], [8, 9], [10, 11], [12, 13]])
        soft = interface.llm.embed(ids)
        prompt = {"before": BEFORE, "after": AFTER}
        with torch.no_grad():
            logits, hidden = interface(*batch, **prompt, soft=soft)
            expected = []
            for i in range(4):
                if self.soft_is_prompt:
                    one = {"before": (*BEFORE, *ids[i].tolist()), "after": AFTER}
                    rows = self.alone(interface, audio[i], lengths[i], text[i], **one)
                else:  # as if they were audio
                    both = torch.cat([soft[i], audio[i, : lengths[i]]])
                    size = torch.tensor(len(both))
                    rows = self.alone(interface, both, size, text[i], **prompt)
                expected.append(rows)
            expected = torch.stack(expected)
            valid = torch.arange(7) < text_lengths[:, None]
            self.close(logits[valid], expected[valid])
            none, _ = interface(*batch, **prompt)
            assert (logits - none)[valid].abs().max() > 1e-2
        if "audio" in hidden:
            assert hidden["audio"].size(1) == audio.size(1)
        # step by step, in any order of the rows
        state = interface.start(audio, lengths, **prompt, soft=soft)
        for u in range(text.size(1)):
            order = torch.tensor([1, 3, 2, 0]) if u == 0 else torch.arange(4)
            rows = state.utterance[order]
            logits, state = interface.step(text[rows, u], state, order)
            live = u < text_lengths[rows]
            self.close(logits[live], expected[rows[live], u])

    def test_gradients_reach_soft_vectors(self, interface, batch):
        soft = torch.randn(4, 2, interface.llm.hidden_size, requires_grad=True)
        logits, _ = interface(*batch, before=BEFORE, soft=soft)
        valid = torch.arange(7) < batch[3][:, None]
        logits[valid].logsumexp(-1).sum().backward()
        reached = soft.grad.abs().amax(-1) > 0
        assert reached.all() if self.sees_all_audio else reached.any()

    def test_what_is_shared_is_as_if_it_were_not(self, interface, batch):
        """Hypotheses that branch, end and come in ragged numbers, and utterances that end."""
        audio, lengths, _, _ = batch
        state = interface.start(audio, lengths, before=BEFORE)
        texts = [[] for _ in range(4)]
        generator = torch.Generator().manual_seed(3)
        steps = self.context - 2 - audio.size(1) - 1
        for step in range(steps):
            alive = [0, 1, 2, 3] if step < 4 else [0, 3] if step < 8 else [3]
            number = [5, 4, 9, 12, 7][step % 5]
            rows = [i for i, u in enumerate(state.utterance.tolist()) if u in alive]
            parents = torch.tensor(rows)[torch.randint(len(rows), (number,), generator=generator)]
            # each goes on with at least one
            first = [state.utterance.tolist().index(u) for u in alive]
            parents = torch.cat([parents, torch.tensor(first)])
            parents = parents[torch.randperm(len(parents), generator=generator)]
            number = len(parents)
            tokens = torch.randint(1, VOCAB, (number,), generator=generator)
            utterances = state.utterance[parents]
            logits, state = interface.step(tokens, state, parents)
            texts = [texts[p] + [t] for p, t in zip(parents.tolist(), tokens.tolist())]
            assert torch.equal(state.utterance, utterances)
            with torch.no_grad():
                for row, (utterance, ids) in enumerate(zip(utterances.tolist(), texts)):
                    length = lengths[utterance]
                    one = self.alone(
                        interface, audio[utterance], length, torch.tensor(ids), before=BEFORE
                    )
                    self.close(logits[row], one[-1])

    def test_a_state_can_be_extended_again(self, interface, batch):
        audio, lengths, text, _ = batch
        start = interface.start(audio, lengths)
        _, state = interface.step(text[:, 0], start)
        first, after_first = interface.step(text[:, 1], state)
        parents = torch.tensor([3, 0, 0, 1, 3, 3])
        tokens = torch.tensor([7, 8, 9, 10, 11, 12])
        interface.step(tokens, state, parents)
        other, _ = interface.step(text[:, 2], after_first)
        again, after_again = interface.step(text[:, 1], state)
        self.close(again, first)
        self.close(interface.step(text[:, 2], after_again)[0], other)
        self.close(interface.step(text[:, 0], start)[0], interface.step(text[:, 0], start)[0])

    def test_padding_is_not_seen(self, interface, batch):
        audio, lengths, text, text_lengths = batch
        other_audio, other_text = audio.clone(), text.clone()
        other_audio[torch.arange(6) >= lengths[:, None]] = 1e3
        other_text[torch.arange(7) >= text_lengths[:, None]] = 2
        with torch.no_grad():
            first, _ = interface(audio, lengths, text, text_lengths, after=AFTER)
            second, _ = interface(other_audio, lengths, other_text, text_lengths, after=AFTER)
        valid = torch.arange(7) < text_lengths[:, None]
        self.close(first[valid], second[valid])
        states = [interface.start(x, lengths, after=AFTER) for x in (audio, other_audio)]
        steps = [interface.step(text[:, 0], state)[0] for state in states]
        self.close(*steps)

    def test_audio_and_text_matter(self, interface, batch):
        """The tests above would pass for an interface that shows nothing."""
        audio, lengths, text, text_lengths = batch
        with torch.no_grad():
            logits, _ = interface(*batch)
            other, _ = interface(audio.flip(0)[:, [4, 0, 1, 2, 3, 5]], lengths, text, text_lengths)
            nothing, _ = interface(audio, 0 * lengths, text, text_lengths)
        for changed in (other, nothing):
            assert (logits - changed)[0].abs().max() > 1e-2
        self.close(logits[2], nothing[2])
        assert (logits[0, 0] - logits[0, 1]).abs().max() > 1e-2

    def test_without_audio_it_is_the_llm(self, interface, batch):
        text = batch[2]
        none = torch.zeros(4, 0, interface.llm.hidden_size)
        lengths = torch.zeros(4, dtype=torch.long)
        prompt = torch.tensor([BEFORE + AFTER]).expand(4, -1)
        with torch.no_grad():
            plain = interface.llm.model()(torch.cat([prompt, text], dim=1)).logits[:, 3:]
            logits, _ = interface(none, lengths, text, lengths + 7, before=BEFORE, after=AFTER)
        self.close(logits, plain)
        state = interface.start(none, lengths, before=BEFORE, after=AFTER)
        for u in range(text.size(1)):
            logits, state = interface.step(text[:, u], state)
            self.close(logits, plain[:, u])

    def test_gradients_reach_the_audio_and_not_its_padding(self, interface, batch):
        audio, lengths, text, text_lengths = batch
        audio = audio.clone().requires_grad_()
        logits, _ = interface(audio, lengths, text, text_lengths)
        valid = torch.arange(7) < text_lengths[:, None]
        logits[valid].logsumexp(-1).sum().backward()
        inside = torch.arange(6) < lengths[:, None]
        reached = audio.grad.abs().amax(-1) > 0
        assert reached[inside].all() if self.sees_all_audio else reached[inside].any()
        assert (audio.grad[~inside] == 0).all()

    def test_gradient_checkpointing_changes_nothing(self, interface, batch):
        """The LLM must have no dropout."""
        audio, lengths, text, text_lengths = batch
        model = interface.llm.model().train()
        embeddings = model.get_input_embeddings().weight.requires_grad_()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            inputs = audio.clone().requires_grad_()
            logits, _ = interface(inputs, lengths, text, text_lengths, after=AFTER)
            gradients.append(torch.autograd.grad(logits.square().mean(), [inputs, embeddings]))
        assert model.is_gradient_checkpointing
        for plain, checkpointed in zip(*gradients):
            assert plain.abs().max() > 0
            self.close(checkpointed, plain)

    def test_bfloat16(self, interface, batch):
        audio, lengths, text, text_lengths = batch
        interface.llm.model().to(torch.bfloat16)
        with torch.no_grad():
            expected, _ = interface(*batch, before=BEFORE, after=AFTER)
        assert expected.dtype == torch.bfloat16
        state = interface.start(audio, lengths, before=BEFORE, after=AFTER)
        for u in range(text.size(1)):
            logits, state = interface.step(text[:, u], state)
            rows = (u < text_lengths).nonzero().flatten()
            difference = (logits[rows] - expected[rows, u]).float().abs()
            assert difference.mean() < 0.02 * expected.float().std()

    def test_copies_are_apart(self, interface, batch):
        with torch.no_grad():
            expected, _ = interface(*batch)
            other = copy.deepcopy(interface)
            randomized, _ = other(*batch)
            self.close(randomized, expected)
            for parameter in other.llm.model().parameters():
                parameter.zero_()
            self.close(interface(*batch)[0], expected)

    def test_beyond_the_context(self, interface):
        width, context = interface.llm.hidden_size, interface.llm.context
        none = torch.zeros(1, 0, width)
        zero, text = torch.zeros(1, dtype=torch.long), torch.ones(1, context + 1, dtype=torch.long)
        with pytest.raises(UserError, match=f"{context + 1} positions"):
            interface(none, zero, text, torch.tensor([context + 1]))
        with pytest.raises(UserError, match=f"{context + 1} positions"):
            interface.start(none, zero, before=[1] * (context + 1))
        state = interface.start(none, zero, before=[1] * (context - 1))
        _, state = interface.step(text[:, 0], state)
        with pytest.raises(UserError, match="hypothesis"):
            interface.step(text[:, 0], state)
