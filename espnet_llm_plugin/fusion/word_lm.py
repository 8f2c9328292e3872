"""An LLM in its own vocabulary as the LM of texts that grow word by word.

M texts of one call, V rows of the LLM's tables.

A text is tokenised as a whole each time it grows, so that its tokens are those the LLM was trained
on; those it shares with the text before (or with any other text) have been scored already. Tokens
form a trie: what texts have in common is computed and kept once, for all hypotheses of all
utterances.
"""

from collections import deque
from typing import Optional, Sequence, Union
from weakref import WeakValueDictionary

import numpy as np
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm.adaptation import load_tokenizer
from espnet_llm_plugin.llm.backbone import FrozenLLM
from espnet_llm_plugin.llm.directory import TOKENS_FILE
from espnet_llm_plugin.llm.native import check_rows
from espnet_llm_plugin.llm.prefix_state import PrefixState
from espnet_llm_plugin.llm.state import PrefixLM
from espnet_llm_plugin.llm.vocabulary import special_rows

ENDS = ("eos", "newline", "none")
# Next-token log-probs that are kept for later branches (4 V bytes a token); others are computed
# again when a text branches there.
MAX_BYTES = 128 * 2**20


class TokenNode:
    """Tokens from BOS on. ``score``: their log-prob, BOS aside."""

    __slots__ = ("parent", "token", "score", "state", "row", "__weakref__")

    def __init__(self, parent: Optional["TokenNode"], token: int):
        self.parent = parent
        self.token = token
        self.score: Optional[float] = None
        self.state: Optional[PrefixState] = None  # once the LLM has seen the token
        self.row: Optional[torch.Tensor] = None  # log-probs of the next one (V,)


class Text:
    """Words so far, and what :class:`WordLM` has found out about them."""

    __slots__ = ("words", "node", "ended", "__weakref__")

    def __init__(self, words: str):
        self.words = words
        self.node: Optional[TokenNode] = None
        self.ended: Optional[float] = None


class WordLM:
    """Log-probs of texts under a causal LM of the Hugging Face hub, with or without its ending.

    ::

        hello = lm.extend(lm.start(), "hello")
        lm.scores([hello, lm.extend(hello, "world")])         # log P(words)
        lm.ends([hello])                                      # log P(words and the end)

    Args:
        llm: Directory, hub id, or what :class:`FrozenLLM` has loaded of it.
        end: What ends a sentence: ``eos`` (the LLM's own symbol), ``newline``, or ``none``: the
            end is not scored.
        lowercase: Lower the case of the words before they are tokenised.
        temperature: The LLM's probabilities are flattened (above 1) or sharpened by it.
        device: Where the LLM runs.
        dtype: Of an ``llm`` given by name.
        max_bytes: Of next-token log-probs.

    Attributes:
        num_calls: Forwards of the LLM so far.
        num_tokens: Tokens that it has read so far.

    Raises:
        UserError: No such LLM, no tokenizer, one over an ASR token list, or without the symbol
            that ``end`` names.
    """

    def __init__(
        self,
        llm: Union[str, FrozenLLM],
        *,
        end: str = "eos",
        lowercase: bool = False,
        temperature: float = 1.0,
        device: Union[str, torch.device] = "cpu",
        dtype: str = "float32",
        max_bytes: int = MAX_BYTES,
    ):
        if end not in ENDS:
            raise UserError(f"end of sentence {end!r}: expected one of {', '.join(ENDS)}")
        if temperature <= 0:
            raise UserError(f"LM temperature {temperature}: it must be above 0")
        llm = llm if isinstance(llm, FrozenLLM) else FrozenLLM(llm, dtype=dtype)
        if (llm.directory / TOKENS_FILE).is_file():
            raise UserError(
                f"LLM {llm.name} is adapted to an ASR token list ({TOKENS_FILE}): it has no "
                "vocabulary of its own. Give it as external LM (--lm_train_config "
                f"{llm.name}/espnet_lm.yaml --lm_file {llm.name}/espnet_lm.pth)"
            )
        tokenizer = load_tokenizer(llm.directory)
        check_rows(tokenizer, llm.vocab_size, llm.name)
        bos, eos, _ = special_rows(tokenizer, llm.config)
        configured = llm.config.get_text_config().eos_token_id
        if end == "eos" and tokenizer.eos_token_id is None and configured is None:
            raise UserError(
                f"LLM {llm.name} has no end-of-sentence token: use --lm_eos newline, or none"
            )
        self.end, self.lowercase, self.temperature = end, lowercase, temperature
        self.max_bytes = max_bytes
        self._tokenizer, self._eos = tokenizer, eos
        self._lm = PrefixLM(llm.model(device))
        self._root = TokenNode(None, bos)
        self._root.score = 0.0
        # By the parent's identity and the token: a child dies before its parent, so that no other
        # node can have the identity. A shorter text does not keep the longer ones alive.
        self._children: WeakValueDictionary[tuple[int, int], TokenNode] = WeakValueDictionary()
        self._with_rows: deque[TokenNode] = deque()
        self._texts: WeakValueDictionary[str, Text] = WeakValueDictionary()

    @property
    def num_calls(self) -> int:
        return self._lm.num_forwards

    @property
    def num_tokens(self) -> int:
        return self._lm.num_token_forwards

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values of the texts in use."""
        return self._lm.nbytes

    def start(self) -> Text:
        """The empty text."""
        return self.text("")

    def text(self, words: str) -> Text:
        """Words separated by spaces."""
        if self.lowercase:
            words = words.lower()
        found = self._texts.get(words)
        if found is None:
            found = self._texts[words] = Text(words)
        return found

    def extend(self, text: Text, words: str) -> Text:
        """The text and a word (or several, or none) more. The LLM does not run."""
        words = words.strip()
        return self.text(f"{text.words} {words}".strip()) if words else text

    @torch.inference_mode()
    def scores(self, texts: Sequence[Text]) -> np.ndarray:
        """log P(words) of M texts, natural logarithm, float64."""
        new = list({text.words: text for text in texts if text.node is None}.values())
        ids = self._tokenize([text.words for text in new])
        for text, node in zip(new, self._nodes(ids)):
            text.node = node
        return np.array([text.node.score for text in texts])

    @torch.inference_mode()
    def ends(self, texts: Sequence[Text]) -> np.ndarray:
        """log P(words and the end) of M texts; without an end the same as :meth:`scores`."""
        new = list({text.words: text for text in texts if text.ended is None}.values())
        if self.end == "newline":
            ids = self._tokenize([text.words + "\n" for text in new])
        else:
            ids = self._tokenize([text.words for text in new])
            if self.end == "eos":
                ids = [[*tokens, self._eos] for tokens in ids]
        for text, node in zip(new, self._nodes(ids)):
            text.ended = node.score
        return np.array([text.ended for text in texts])

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _nodes(self, ids: Sequence[Sequence[int]]) -> list[TokenNode]:
        """The nodes of token sequences; the LLM runs once for all that is new."""
        # 1. The nodes, new ones without scores, and those that the LLM must be asked about.
        paths: list[list[TokenNode]] = []
        asked: dict[TokenNode, int] = {}  # in order, shorter prefixes first along a path
        new: dict[TokenNode, None] = {}
        for tokens in ids:
            path = [self._root]
            for token in tokens:
                node = path[-1]
                child = self._children.get((id(node), token))
                if child is None:
                    child = self._children[id(node), token] = TokenNode(node, token)
                if child.score is None:  # new, or left over from a call that failed
                    new[child] = None
                    if node.row is None:
                        asked.setdefault(node, len(asked))
                path.append(child)
            paths.append(path)
        # 2. Log-probs of what follows the latter.
        if asked:
            self._predict(asked)
        for node in new:
            node.score = node.parent.score + float(node.parent.row[node.token])
        self._drop_rows(len(asked))
        return [path[-1] for path in paths]

    def _predict(self, asked: dict[TokenNode, int]) -> None:
        """Fill in the rows of nodes, in whose order they are numbered."""
        parents: list[Union[PrefixState, int, None]] = []
        for node in asked:
            before = node.parent
            if before is None or before.state is not None:
                parents.append(None if before is None else before.state)
            else:  # the LLM has not seen it: it is asked about here, and before its children
                parents.append(asked[before])
        logits, states = self._lm.grow([node.token for node in asked], parents)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        for node, row, state in zip(asked, logits.log_softmax(dim=-1).cpu(), states):
            node.row = row.clone()  # a view would keep the whole batch
            node.state = node.state or state
            self._with_rows.append(node)

    def _drop_rows(self, new: int) -> None:
        """Forget the oldest rows, if there are too many beside the new ones."""
        if self._with_rows and len(self._with_rows) > new:
            most = max(new, self.max_bytes // self._with_rows[-1].row.nbytes)
            while len(self._with_rows) > most:
                self._with_rows.popleft().row = None


def score_texts(lm: WordLM, texts: Sequence[str], ended: bool = True) -> list[float]:
    """Log-probs of whole texts, as rescoring needs them.

    Args:
        lm: Of the texts.
        texts: Words separated by spaces.
        ended: With the end.
    """
    kept = [lm.text(text) for text in texts]
    return (lm.ends(kept) if ended else lm.scores(kept)).tolist()
