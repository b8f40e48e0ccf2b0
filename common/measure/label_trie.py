"""Which continuations of a prompt to compute: candidate answers as a tree of tokens, searched best first.

Pure Python. A search yields the nodes whose next-token probabilities it needs, and whoever runs the model fills them in
(common/continuations.py), for many rows at once.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common.model.prompt_cache import Node, log_sum

BUDGET = 12  # nodes that a search asks for at first; twice as many each time after, as far as they may matter


@dataclass
class Trie:
    """Candidates that begin alike: the numbers of those that end here, with the ids that may follow, and the rest.

    candidates: what the whole tree was built from, at its root.
    """

    ends: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    children: dict[int, "Trie"] = field(default_factory=dict)
    candidates: Sequence[tuple[Sequence[int], Sequence[int]]] = ()

    def numbers(self) -> list[int]:
        """Of all candidates at or below this node."""
        return [number for number, _ in self.ends] + [n for child in self.children.values() for n in child.numbers()]


def build_trie(candidates: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Trie:
    """candidates: (ids, enders) pairs; a candidate is its ids and then any one of its enders."""
    root = Trie(candidates=candidates)
    for number, (ids, enders) in enumerate(candidates):
        node = root
        for token in ids:
            node = node.children.setdefault(token, Trie())
        node.ends.append((number, enders))
    return root


def unknown(nodes: Sequence[Node]) -> list[Node]:
    """Those that still have to be computed, marked as asked for."""
    found = [node for node in nodes if not node.asked]
    for node in found:
        node.asked = True
    return found


class Search:
    """Log-probabilities of all candidates of `trie` behind `root`, the most probable branches first.

    A branch is left out once all that are left out hold no more than `tolerance` of the probability of the candidates
    found: whatever they are, no candidate's normalised probability moves by more. Their candidates share the branch's
    probability, which is an upper bound. The likeliest candidate is always among those found. tolerance 0: nothing is
    left out; infinite: all but what might be likelier than the likeliest.
    """

    def __init__(self, root: Node, trie: Trie) -> None:
        self.root, self.trie = root, trie
        self.found: dict[int, float] = {}
        self.frontier: list[tuple[float, int, Node, Trie]] = [(-0.0, 0, root, trie)]  # (- log-probability, tie, ...)
        self.ties = 1
        self.taken: list[tuple[float, list[tuple[Node, Trie]]]] = []

    def run(self, tolerance: float, also: Sequence[Node] = ()) -> Iterator[list[Node]]:
        """Yields nodes to be computed, until no more are needed. also: further nodes, computed with the first ones."""
        wanted, budget = unknown([*self.root.path(), *also]), BUDGET
        while True:
            while len(wanted) < budget and not self._settled(tolerance):
                wanted += unknown(self._take())
            if wanted:
                yield wanted
            elif not self.taken:
                return
            for log, branch in self.taken:
                self._read(log, branch)
            wanted, self.taken, budget = [], [], 2 * budget

    def scores(self) -> list[float]:
        """The log-probability of every candidate, by number."""
        logs = dict(self.found)
        for negative, _, _, trie in self.frontier:
            numbers = trie.numbers()
            logs |= dict.fromkeys(numbers, -negative - math.log(len(numbers)))
        return [logs[number] for number in range(len(logs))]

    def best(self) -> int:
        """The number of the likeliest candidate."""
        return max(sorted(self.found), key=self.found.__getitem__)

    def left_out(self) -> float:
        """The log-probability of all that was not computed."""
        return log_sum([-item[0] for item in self.frontier])

    def node(self, number: int) -> Node:
        """The last node of a candidate."""
        return self.root.walk(self.trie.candidates[number][0])

    def _settled(self, tolerance: float) -> bool:
        if not self.frontier or not tolerance:
            return not self.frontier
        if self.taken:  # what is next is taken with them unless their outcome may well settle it
            best = max(*(item[0] for item in self.taken), *self.found.values(), -math.inf)
            return -self.frontier[0][0] < best + math.log(tolerance)
        if -self.frontier[0][0] >= max(self.found.values(), default=-math.inf):
            return False
        return self.left_out() <= log_sum(list(self.found.values())) + math.log(tolerance)

    def _take(self) -> list[Node]:
        """The best branch, down to where it divides: those tokens are known, so one pass computes them all."""
        negative, _, node, trie = heapq.heappop(self.frontier)
        branch = [(node, trie)]
        while len(trie.children) == 1:
            [(token, trie)] = trie.children.items()
            node = node.walk([token])
            branch.append((node, trie))
        self.taken.append((-negative, branch))
        return [node for node, _ in branch if node.parent]

    def _read(self, log: float, branch: list[tuple[Node, Trie]]) -> None:
        for i, (node, trie) in enumerate(branch):
            if i:
                log += node.parent.logs[node.token]
            for number, enders in trie.ends:
                self.found[number] = log + node.log_any(enders)
        for token, child in trie.children.items():
            heapq.heappush(self.frontier, (-log - node.logs[token], self.ties, node.walk([token]), child))
            self.ties += 1
