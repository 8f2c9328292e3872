"""PrefixLM: stepwise with shared keys and values equals the full forward, for all families."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import state as state_module
from espnet_llm_plugin.llm.context import context_windows
from espnet_llm_plugin.llm.state import PrefixLM
from tests.llm.tiny import FAMILIES, RECOMPUTED, tiny_model

PREFIXES = ([3, 5, 7], [3, 5, 7, 1, 2, 9, 4, 4, 11, 30], [8, 2, 2, 6, 5, 3], [36], [3, 5, 9])


def full(model, prefix):
    """The slow obvious reference: one forward over the whole prefix."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(prefix)])).logits[0, -1]


def state_of(lm, prefix):
    state = None
    for token in prefix:
        _, (state,) = lm.step([token], [state])
    return state


@pytest.fixture(scope="module", params=FAMILIES + RECOMPUTED)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(family)


def test_ragged_batch_equals_full_forward(model, family):
    lm = PrefixLM(model)
    assert lm.uses_cache == (family not in RECOMPUTED)
    states = [state_of(lm, prefix[:-1]) for prefix in PREFIXES]
    logits, new = lm.step([prefix[-1] for prefix in PREFIXES], states)
    expected = torch.stack([full(model, prefix) for prefix in PREFIXES])
    assert expected.std() > 0.1  # the comparison below means something
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert [state.tokens() for state in new] == [list(prefix) for prefix in PREFIXES]
    assert [state.length for state in new] == [len(prefix) for prefix in PREFIXES]


def test_batch_equals_single(model):
    lm = PrefixLM(model)
    states = [state_of(lm, prefix[:-1]) for prefix in PREFIXES]
    batch, _ = lm.step([prefix[-1] for prefix in PREFIXES], states)
    for row, prefix, state in zip(batch, PREFIXES, states):
        single, _ = lm.step([prefix[-1]], [state])
        torch.testing.assert_close(row, single[0], atol=1e-5, rtol=1e-5)


def test_sharing_equals_no_sharing(model):
    shared, alone = PrefixLM(model), PrefixLM(model)
    parent = state_of(shared, [3, 5, 7, 2])
    children, states = shared.step([1, 2, 3], [parent, parent, parent])
    deeper, _ = shared.step([9, 9], [states[2], parent])
    for child, token in zip(children, (1, 2, 3)):
        expected, _ = alone.step([token], [state_of(alone, [3, 5, 7, 2])])
        torch.testing.assert_close(child, expected[0], atol=1e-5, rtol=1e-5)
    # the parent is as it was, after its children were made
    again, _ = shared.step([1], [parent])
    torch.testing.assert_close(again[0], children[0], atol=1e-5, rtol=1e-5)
    for row, prefix in zip(deeper, ([3, 5, 7, 2, 3, 9], [3, 5, 7, 2, 9])):
        torch.testing.assert_close(row, full(model, prefix), atol=1e-5, rtol=1e-5)


# Tokens and what they come after: a number of this list, or a letter of a known prefix.
TREE = ((3, None), (5, 0), (7, 1), (7, 0), (1, "a"), (2, 4), (9, 5), (9, 4), (6, "b"), (6, "a"))
KNOWN = {"a": [3, 5, 7, 2], "b": [8]}


def grown_and_stepwise(lm, tree=TREE):
    """What ``grow`` gives for a tree, and ``step`` one by one."""
    known = {name: state_of(lm, prefix) for name, prefix in KNOWN.items()}
    parents = [known.get(parent, parent) for _, parent in tree]
    tokens = [token for token, _ in tree]
    rows, states = [], []
    for token, parent in zip(tokens, parents):
        above = states[parent] if isinstance(parent, int) else parent
        row, new = lm.step([token], [above])
        rows.append(row[0])
        states += new
    return lm.grow(tokens, parents), (torch.stack(rows), states)


@pytest.mark.parametrize("logits_at_once", [None, 3 * 37])
def test_a_tree_in_one_forward_equals_steps(model, family, logits_at_once, monkeypatch):
    if logits_at_once:
        monkeypatch.setattr(state_module, "_GROWN_LOGITS", logits_at_once)
    lm = PrefixLM(model)
    (logits, states), (expected, expected_states) = grown_and_stepwise(lm)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert [s.tokens() for s in states] == [s.tokens() for s in expected_states]
    # What follows sees the same.
    after, _ = lm.step([4] * len(states), states)
    again, _ = lm.step([4] * len(states), expected_states)
    torch.testing.assert_close(after, again, atol=1e-5, rtol=1e-5)
    if lm.uses_cache and not logits_at_once:
        before = lm.num_forwards
        lm.grow([3, 5, 7], [None, 0, 1])
        assert lm.num_forwards == before + 1


def test_a_tree_beyond_the_context_equals_steps():
    lm = PrefixLM(tiny_model("llama", max_position_embeddings=6))
    (logits, states), (expected, expected_states) = grown_and_stepwise(lm)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert [s.length for s in states] == [s.length for s in expected_states]


def test_a_tree_frees_its_slots():
    lm = PrefixLM(tiny_model("llama"))
    _, states = lm.grow([3, 5, 7, 7], [None, 0, 1, 0])
    assert lm.num_slots == 4
    del states
    gc.collect()
    assert lm.num_slots == 0
    assert lm.grow([], [])[0].shape == (0, 37)
    with pytest.raises(UserError, match="37"):
        lm.grow([3, 37], [None, 0])


def test_every_prefix_is_computed_once(model, family):
    lm = PrefixLM(model)
    state = state_of(lm, [3, 5, 7, 2])
    lm.step([1, 2, 3], [state, None, state])
    cached = 4 + 3
    recomputed = (1 + 2 + 3 + 4) + (5 + 1 + 5)
    assert lm.num_token_forwards == (cached if family not in RECOMPUTED else recomputed)
    assert lm.num_forwards == 5


def test_recomputation_on_request_is_the_same(model):
    slow, fast = PrefixLM(model, use_cache=False), PrefixLM(model)
    for prefix in PREFIXES[:2]:
        a, _ = slow.step([prefix[-1]], [state_of(slow, prefix[:-1])])
        b, _ = fast.step([prefix[-1]], [state_of(fast, prefix[:-1])])
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert slow.num_slots == 0


class TestMemory:
    @pytest.fixture
    def lm(self):
        return PrefixLM(tiny_model("llama"))

    def test_check_at_construction_leaves_nothing(self, lm):
        assert lm.num_slots == lm.num_token_forwards == lm.num_forwards == 0

    def test_slots_are_freed_when_no_state_reaches_them(self, lm):
        trunk = state_of(lm, [1, 2, 3])
        _, branches = lm.step([4, 5], [trunk, trunk])
        assert lm.num_slots == 5
        del trunk
        assert lm.num_slots == 5  # the branches hold it
        branches.pop()
        assert lm.num_slots == 4
        branches.clear()
        assert lm.num_slots == 0

    def test_pool_grows_and_keeps_what_it_holds(self, lm):
        prefix = [1 + i % 30 for i in range(50)]
        states = [state_of(lm, prefix), state_of(lm, prefix[::-1])]
        assert lm.num_slots == 100 and lm._pool.capacity == 128
        logits, _ = lm.step([5, 6], states)
        expected = torch.stack([full(lm.model, prefix + [5]), full(lm.model, prefix[::-1] + [6])])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert lm._pool.layers[0].shape[0] == 128

    def test_freed_slots_are_used_again(self, lm):
        for _ in range(20):
            state_of(lm, range(20))
        assert lm._pool.capacity == 64 and lm.num_slots == 0

    def test_long_chains_are_freed(self):
        lm = PrefixLM(tiny_model("llama"), use_cache=False)
        from espnet_llm_plugin.llm.prefix_state import PrefixState

        state = None
        for slot in lm._pool.take(np.zeros(20000, dtype=int)).tolist():
            state = PrefixState(lm._pool, state, slot, 1)
        del state
        gc.collect()
        assert lm.num_slots == 0

    def test_failed_forward_leaks_nothing(self, lm, monkeypatch):
        state = state_of(lm, [1])

        def fail(*args):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(lm, "_forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            lm.step([1, 2], [state, None])
        assert lm.num_slots == 1

    def test_copies_share_the_slot(self, lm):
        state = state_of(lm, [1, 2])
        copies = [copy.copy(state), copy.deepcopy(state), copy.deepcopy([state])[0]]
        assert all(c is state for c in copies)
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(state)

    def test_usable_in_and_out_of_inference_mode(self, lm):
        with torch.inference_mode():
            state = state_of(lm, [1, 2])
        logits, _ = lm.step([3], [state])
        torch.testing.assert_close(logits[0], full(lm.model, [1, 2, 3]), atol=1e-5, rtol=1e-5)


def test_empty_call():
    lm = PrefixLM(tiny_model("llama"))
    logits, states = lm.step([], [])
    assert logits.shape == (0, 37) and states == [] and lm.num_forwards == 0


def test_tensor_tokens():
    lm = PrefixLM(tiny_model("llama"))
    a, _ = lm.step(torch.tensor([1, 2]), [None, None])
    b, _ = lm.step([1, 2], [None, None])
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("token", [-1, 37])
def test_token_outside_the_vocabulary(token):
    with pytest.raises(UserError, match=f"token id {token} .* 37 rows"):
        PrefixLM(tiny_model("llama")).step([token], [None])


LONG = [1 + (7 * i + i * i) % 30 for i in range(75)]


def window(tokens, context):
    """The slow obvious reference: what is left of tokens that come one by one."""
    seen = []
    for token in tokens:
        if len(seen) == context:
            seen = [seen[0], *seen[len(seen) - context // 2 + 1 :]]
        seen.append(token)
    return seen


class TestContext:
    """Prefixes longer than the LLM's context are cut, and search goes on."""

    CONTEXT = 20

    @pytest.fixture(params=["llama", "gemma2", "mistral", "opt", "gpt2"])
    def model(self, request):
        if request.param in ("opt", "gpt2"):
            return tiny_model(request.param)  # 20 learned positions
        return tiny_model(request.param, max_position_embeddings=self.CONTEXT)

    @pytest.mark.parametrize("use_cache", [None, False])
    def test_scores_are_those_of_the_last_tokens(self, model, use_cache, caplog):
        lm, state = PrefixLM(model, use_cache=use_cache), None
        assert lm.context == self.CONTEXT and lm.uses_cache == (use_cache is None)
        for n, token in enumerate(LONG, 1):
            logits, (state,) = lm.step([token], [state])
            seen = window(LONG[:n], self.CONTEXT)
            assert state.tokens() == seen and state.seen <= self.CONTEXT
            assert state.length == n and state.is_of(LONG[:n]) and not state.is_of(LONG[1 : n + 1])
            torch.testing.assert_close(logits[0], full(model, seen), atol=2e-5, rtol=2e-5)
        assert len(caplog.messages) == 1  # a warning, once
        assert "text of 20 tokens fills the context" in caplog.text
        assert "the last 9 to 19 tokens only" in caplog.text

    def test_branches_and_lengths_in_one_batch(self, model):
        lm = PrefixLM(model)
        rows = [[*LONG[:n], last] for n in (3, 18, 19, 20, 31, 44) for last in (7, 9)]
        states = [state_of(lm, row[:-1]) for row in rows]
        logits, _ = lm.step([row[-1] for row in rows], states)
        expected = torch.stack([full(model, window(row, self.CONTEXT)) for row in rows])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)

    def test_a_cut_costs_each_token_one_forward_more(self):
        lm = PrefixLM(tiny_model("llama", max_position_embeddings=20))
        trunk = state_of(lm, LONG[:17])
        branches = [trunk] * 3
        for token in (4, 5):
            _, branches = lm.step([token, token + 1, token + 2], branches)
        assert lm.num_token_forwards == 17 + 6
        _, full_ones = lm.step([1, 2, 3], branches)
        before = lm.num_token_forwards
        _, longer = lm.step([1, 2, 3], full_ones)
        # the last 9 tokens of each: 6 in common, 3 of its own; then the new one
        assert lm.num_token_forwards - before == 6 + 3 * 3 + 3
        lm.step([1, 2, 3, 4], [*full_ones, full_ones[0]])
        assert lm.num_token_forwards - before == 6 + 3 * 3 + 3 + 4  # not again
        del trunk, branches, full_ones
        # what is out of sight is freed: the first token, 6 in common, 4 of each
        assert lm.num_slots == 1 + 6 + 3 * 4
        del longer
        assert lm.num_slots == 0

    def test_failed_cut_leaks_nothing(self, monkeypatch):
        lm = PrefixLM(tiny_model("llama", max_position_embeddings=20))
        state = state_of(lm, LONG[:20])

        def fail(*args):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(lm, "_forward", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                lm.step([1], [state])
        assert lm.num_slots == 20
        logits, _ = lm.step([1], [state])
        expected = full(lm.model, window([*LONG[:20], 1], 20))
        torch.testing.assert_close(logits[0], expected, atol=2e-5, rtol=2e-5)

    def test_no_limit_without_positions(self):
        model = tiny_model("mamba")
        lm = PrefixLM(model)
        assert lm.context is None
        state = state_of(lm, LONG)
        assert state.tokens() == LONG


@pytest.mark.parametrize("context", [4, 5, 20])
def test_windows_are_what_is_seen(context):
    for length in (1, 3, 4, 5, 20, 21, 60):
        windows = context_windows(length, context)
        assert [begin for _, begin, _ in windows] == [0, *(end for _, _, end in windows[:-1])]
        assert windows[-1][2] == length
        for skipped, begin, end in windows:
            for n in range(begin + 1, end + 1):
                assert window(LONG[:n], context) == [LONG[0], *LONG[1 + skipped : n]]
    assert context_windows(60, None) == [(0, 0, 60)]
