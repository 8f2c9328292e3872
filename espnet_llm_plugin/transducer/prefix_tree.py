"""Label prefixes of a search: what the predictor and the language models know, once each.

M prefixes, L labels. Node 0 is the empty prefix; a node's number is its row everywhere.
"""

from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional

import numpy as np
import torch

if TYPE_CHECKING:
    from espnet_llm_plugin.fusion.external_lm import ExternalLM
    from espnet_llm_plugin.transducer.scorer import PrefixPool

ROOT = 0
# What the prefixes of a search take by default at most, beside the live ones: a bound for long
# recordings and large batches, out of reach of a short one (12,000 prefixes' LM rows at 5,000
# labels, 400 at 152,000).
MAX_BYTES = 256 * 2**20


class RowStore:
    """Tensors with a row per node, which grow by doubling."""

    def __init__(self) -> None:
        self._rows: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """All rows, also unused ones."""
        return self._rows[name]

    def put(self, name: str, nodes: torch.Tensor, values: torch.Tensor) -> None:
        """Set the rows of nodes (M) to values (M, ...)."""
        rows = self._rows.get(name)
        needed = int(nodes.max()) + 1 if nodes.numel() else 0
        if rows is None or rows.size(0) < needed:
            size = max(64, 2 * (0 if rows is None else rows.size(0)), needed)
            grown = values.new_zeros(size, *values.shape[1:])
            if rows is not None:
                grown[: rows.size(0)] = rows
            rows = self._rows[name] = grown
        rows.index_copy_(0, nodes.to(rows.device), values.to(rows.dtype))

    @property
    def row_bytes(self) -> int:
        """Memory of one node's rows."""
        return sum(rows[0].nbytes for rows in self._rows.values())


def state_bytes(state: Any) -> int:
    """Memory of the tensors in a prefix's state, or what it says of itself (``nbytes``)."""
    if isinstance(state, dict):
        return sum(map(state_bytes, state.values()))
    if isinstance(state, (tuple, list)):
        return sum(map(state_bytes, state))
    return getattr(state, "nbytes", 0)


class PathSums:
    """Sums of a score over the labels of prefixes; each label is asked for once.

    Args:
        tree: Of the prefixes.
        scores: ``scores(parents, labels)``, both (M), gives those of the labels after the parents.
    """

    def __init__(self, tree: "PrefixTree", scores: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        self._tree, self._scores = tree, scores
        self._sum = np.zeros(64)
        self._known = np.zeros(64, dtype=bool)
        self._known[ROOT] = True

    def __call__(self, nodes: np.ndarray) -> np.ndarray:
        """Of prefixes (any shape), float64."""
        tree = self._tree
        if len(self._known) < len(tree.parent):
            more = len(tree.parent) - len(self._known)
            self._sum = np.concatenate([self._sum, np.zeros(more)])
            self._known = np.concatenate([self._known, np.zeros(more, dtype=bool)])
        if not self._known[nodes].all():
            missing = set()
            for node in np.unique(nodes).tolist():
                while not self._known[node] and node not in missing:
                    missing.add(node)
                    node = int(tree.parent[node])
            new = np.array(list(missing))
            new = new[np.argsort(tree.depth(new), kind="stable")]
            parents = tree.parent[new]
            added = self._scores(parents, tree.label[new])
            for node, parent, score in zip(new.tolist(), parents.tolist(), added.tolist()):
                self._sum[node] = self._sum[parent] + score
            self._known[new] = True
        return self._sum[nodes]

    def forget(self, nodes: list[int]) -> None:
        """These numbers may come back for other prefixes."""
        nodes = [node for node in nodes if node < len(self._known)]
        self._known[nodes] = False


class PrefixTree:
    """Trie of label prefixes with the predictor's data and the external LM's row of each.

    A network runs for a prefix when its scores are first asked for (:meth:`need_predictor`,
    :meth:`need_external`), one batch for all prefixes asked for together, and never again. Nothing
    here depends on an utterance, a frame or a scale: the utterances of a batch share one tree, and
    a tree can be kept for further searches.

    Args:
        pool: The predictor's data, from ``TransducerScorer.prefixes()``. ``None``: no predictor
            (CTC).
        num_labels: L.
        external_lm: Language model whose rows (L,) are kept beside the predictor's data.
        max_bytes: :meth:`release` frees what no live hypothesis reaches once the prefixes' rows
            and states take more than this. ``None`` keeps everything. A freed prefix that comes
            back is computed again.

    Attributes:
        parent: Node before the last label (-1: none).
        label: Last label (-1: none).
        num_created: Prefixes explored so far, those freed since included.
        num_predictor: Prefixes that the predictor ran for.
        num_external: Prefixes that the external LM ran for.
        followers: What else keeps data by node: told of freed ones by ``forget(nodes)``, and may
            say what it takes (``bytes_per_prefix``).
        prior_sums: Log prior of prefixes, if a fusion needs it.
        late: Delayed LM of the prefixes, if a fusion has one.
    """

    def __init__(
        self,
        pool: Optional["PrefixPool"],
        num_labels: int,
        external_lm: Optional["ExternalLM"] = None,
        max_bytes: Optional[int] = None,
    ):
        self.pool = pool
        self.num_labels = num_labels
        self.external_lm = external_lm
        self.max_bytes = max_bytes
        self.num_created = self.num_predictor = self.num_external = 0
        self._child: dict[int, int] = {}
        self._free: list[int] = []
        self._size = 1
        self._release_above = 0  # prefixes
        self.parent = np.full(64, -1, dtype=np.int64)
        self.label = np.full(64, -1, dtype=np.int64)
        self._depth = np.zeros(64, dtype=np.int64)
        self._predicted = np.zeros(64, dtype=bool)
        self._scored = np.zeros(64, dtype=bool)  # by the external LM
        self._predicted[ROOT] = True
        self._rows = RowStore()
        self._states: dict[int, Any] = {}  # the external LM's
        self.followers: list[Any] = []
        self.prior_sums: Optional[PathSums] = None
        self.late: Any = None
        self._external_sums: Optional[PathSums] = None
        self._lm_sums: Optional[PathSums] = None

    def __len__(self) -> int:
        return self._size - len(self._free)

    def children(self, parents: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Node of each (parent, label), all (M); new ones are made."""
        nodes = np.empty(len(parents), dtype=np.int64)
        for i, (parent, label) in enumerate(zip(parents.tolist(), labels.tolist())):
            key = parent * self.num_labels + label
            node = self._child.get(key)
            if node is None:
                node = self._child[key] = self._new()
                self.parent[node], self.label[node] = parent, label
                self._depth[node] = self._depth[parent] + 1
                self._predicted[node] = self._scored[node] = False
                self.num_created += 1
            nodes[i] = node
        return nodes

    def _new(self) -> int:
        if self._free:
            return self._free.pop()
        node = self._size
        self._size += 1
        if node == len(self.parent):
            for name in ("parent", "label", "_depth", "_predicted", "_scored"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        return node

    def need_predictor(self, nodes: np.ndarray, together: Optional[np.ndarray] = None) -> None:
        """Let the predictor run for the nodes (M) that it has not seen yet.

        Args:
            together: If it must run, let it run for these too (any number).
        """
        for batch in self._missing(nodes, together, self._predicted):
            self.pool.compute(batch, self.parent[batch], self.label[batch])
            self._predicted[batch] = True
            self.num_predictor += len(batch)

    def need_external(self, nodes: np.ndarray, together: Optional[np.ndarray] = None) -> None:
        """The same for the external LM."""
        at_once = getattr(self.external_lm, "takes_paths", False)
        for batch in self._missing(nodes, together, self._scored, at_once):
            if batch[0] == ROOT:
                row, state = self.external_lm.start()
                rows, states = row[None], [state]
            else:
                rows, states = self._extended(batch, at_once)
            self._rows.put("external", torch.from_numpy(batch), rows)
            self._states.update(zip(batch.tolist(), states))
            self._scored[batch] = True
            self.num_external += len(batch)

    def _extended(self, batch: np.ndarray, at_once: bool) -> tuple[torch.Tensor, list]:
        """External LM's rows and states of nodes that follow known ones, directly or not."""
        if not at_once:
            before = [self._states[p] for p in self.parent[batch].tolist()]
            return self.external_lm.extend(self.label[batch].tolist(), before)
        paths, before = [], []
        for node in batch.tolist():
            path = []
            while not self._scored[node]:
                path.append(int(self.label[node]))
                node = int(self.parent[node])
            paths.append(path[::-1])
            before.append(self._states[node])
        return self.external_lm.extend_paths(paths, before)

    def _missing(
        self,
        nodes: np.ndarray,
        together: Optional[np.ndarray],
        done: np.ndarray,
        at_once: bool = False,
    ) -> Iterator[np.ndarray]:
        """Batches of nodes without a result, those before them included; each needs the last.

        ``at_once``: all but the empty prefix in one batch.
        """
        if done[nodes].all():
            return
        asked = nodes if together is None else np.concatenate([nodes, together])
        wanted = set(asked[~done[asked]].tolist())
        for node in list(wanted):
            while node != ROOT and not done[self.parent[node]]:
                node = int(self.parent[node])
                wanted.add(node)
        left = np.array(sorted(wanted))
        if left[0] == ROOT:
            yield left[:1]
            left = left[1:]
        while len(left):
            # Their lengths differ, but what comes before each is known.
            ready = np.ones(len(left), dtype=bool) if at_once else done[self.parent[left]]
            yield left[ready]
            left = left[~ready]

    def external_rows(self, nodes: np.ndarray) -> torch.Tensor:
        """External LM log-probs of every label after nodes (M): (M, L)."""
        self.need_external(nodes)
        rows = self._rows["external"]
        return rows[torch.from_numpy(nodes).to(rows.device)]

    def external_sums(self, nodes: np.ndarray) -> np.ndarray:
        """External LM log-probs of prefixes (any shape), each label looked up once."""
        if self._external_sums is None:

            def scores(parents: np.ndarray, labels: np.ndarray) -> np.ndarray:
                self.need_external(parents)
                return self.external_steps(parents, labels)

            self._external_sums = self.sums(scores)
        return self._external_sums(nodes)

    def lm_sums(self, nodes: np.ndarray) -> np.ndarray:
        """Predictor's LM log-probs of prefixes (any shape), each label looked up once."""
        if self._lm_sums is None:

            def scores(parents: np.ndarray, labels: np.ndarray) -> np.ndarray:
                self.need_predictor(parents)
                picked = self.pool.lm(parents).cpu()[range(len(labels)), torch.from_numpy(labels)]
                return picked.double().numpy()

            self._lm_sums = self.sums(scores)
        return self._lm_sums(nodes)

    def external_ends(self, nodes: np.ndarray) -> np.ndarray:
        """External LM log-probs of the sentence's end after nodes (any shape)."""
        distinct, inverse = np.unique(nodes, return_inverse=True)
        self.need_external(distinct)
        ends = self.external_lm.end_log_probs([self._states[n] for n in distinct.tolist()])
        return np.array(ends, dtype=np.float64)[inverse].reshape(nodes.shape)

    def sums(self, scores: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> PathSums:
        """:class:`PathSums` that know when nodes are freed."""
        found = PathSums(self, scores)
        self.followers.append(found)
        return found

    def external_steps(self, nodes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """External LM log-probs of labels (M,) after nodes (M,), for which it has run."""
        rows = self._rows["external"]
        at = torch.from_numpy(nodes).to(rows.device), torch.from_numpy(labels).to(rows.device)
        return rows[at].double().cpu().numpy()

    def path(self, node: int) -> list[int]:
        """The prefixes of a node that are not empty, shortest first, itself last."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]

    def depth(self, nodes: np.ndarray) -> np.ndarray:
        """Number of labels of nodes (any shape)."""
        return self._depth[nodes]

    def labels_of(self, node: int) -> list[int]:
        """The labels of a prefix, first to last."""
        return self.label[self.path(node)].tolist() if node != ROOT else []

    def lm_sum(self, node: int) -> float:
        """Predictor's LM log-prob of a prefix."""
        if node == ROOT:
            return 0.0
        path = self.path(node)
        before = self.parent[path]
        self.need_predictor(before)
        return float(self.pool.lm(before)[self._at(path)].double().sum())

    def external_sum(self, node: int) -> float:
        """External LM log-prob of a prefix."""
        if node == ROOT:
            return 0.0
        path = self.path(node)
        return float(self.external_rows(self.parent[path])[self._at(path)].double().sum())

    def _at(self, path: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(len(path)), torch.from_numpy(self.label[path])

    def release(self, live: np.ndarray) -> None:
        """Free the prefixes that are neither live nor the beginning of a live one.

        Does nothing while they take at most ``max_bytes``.

        Args:
            live: Nodes, any shape; -1 stands for none.
        """
        if self.max_bytes is None or len(self) <= self._release_above:
            return
        most = self.max_bytes // self.bytes_per_prefix
        if len(self) <= most:
            self._release_above = most
            return
        keep = {ROOT}
        for node in np.unique(live[live >= 0]).tolist():
            while node not in keep:
                keep.add(node)
                node = int(self.parent[node])
        freed = [node for node in self._child.values() if node not in keep]
        self._child = {key: node for key, node in self._child.items() if node in keep}
        self._free += freed
        for node in freed:
            self._states.pop(node, None)
        if self.pool is not None:
            self.pool.free(freed)
        for follower in self.followers:
            follower.forget(freed)
        # If most is alive, looking again after every frame would find little.
        self._release_above = max(most, len(self) + len(self) // 10)

    @property
    def bytes_per_prefix(self) -> int:
        """Memory of a prefix's rows and states."""
        size = 0 if self.pool is None else self.pool.bytes_per_prefix
        if self.external_lm is not None:
            # before its first call: float32
            size += self._rows.row_bytes or 4 * self.num_labels
            size += state_bytes(next(reversed(self._states.values()), None))
        size += sum(getattr(follower, "bytes_per_prefix", 0) for follower in self.followers)
        return max(size, 1)
