"""Which tokens of the labels to compute after a prompt: the labels as a tree of tokens, searched best first.

An example: the labels `card lost`, `card late` and `top up fails`, one token per word, each followed by the end token.
Computing a node gives the log-probability of every token that may come next, which is what its children are worth:

    (prompt)                     computed before the search
    |-- card      -0.22 (0.8)    computed in pass 1
    |   |-- lost  -0.51 (0.6)    computed in pass 2, which gives the end token -0.11 (0.9)
    |   +-- late  -1.20 (0.3)    computed in pass 2, which gives the end token -0.11 (0.9)
    +-- top      -15.42 (2e-7)   skipped, with `up` and `fails` below it

Pass 1: `card` is the likeliest branch. `top` could be computed in the same pass, but its 2e-7 is below tolerance x 0.8
with the tolerance 1e-6, so that the outcome of `card` will probably make it needless.
Pass 2: `lost` and `late`. Found are now `card lost` with 0.8 x 0.6 x 0.9 = 0.432 and `card late` with 0.216, together
0.648. What is left, 2e-7, is at most 1e-6 x 0.648, and the search is done: three nodes of six, in two passes.

Why the bound holds: all labels below `top` begin with it and differ after it, so that their probabilities add up to at
most that of `top`. The sum over all labels is thus between 0.648 and 0.648 + 2e-7, and no label's share of it is off by
more than 2e-7 / 0.648 = 3.1e-7. Reported are 0.6667, 0.3333 and, for `top up fails`, 3.1e-7, the most that it can have.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.model.prompt_cache import Node, log_sum
from common.text.prompts import ClassificationPrompt

BUDGET = 12  # nodes that a search wants at first; twice as many each time after, as far as they may matter


@dataclass
class Trie:
    """A node of the tree of candidates; a candidate is a sequence of tokens and then any one of its enders.

    ends: number and enders of each candidate that ends here. candidates: at the root, all (ids, enders) by number.
    """

    ends: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    children: dict[int, "Trie"] = field(default_factory=dict)
    candidates: Sequence[tuple[Sequence[int], Sequence[int]]] = ()

    def numbers(self) -> list[int]:
        """Of all candidates at or below this node."""
        return [number for number, _ in self.ends] + [n for child in self.children.values() for n in child.numbers()]


def build_trie(candidates: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Trie:
    """The tree of (ids, enders) pairs."""
    root = Trie(candidates=candidates)
    for number, (ids, enders) in enumerate(candidates):
        node = root
        for token in ids:
            node = node.children.setdefault(token, Trie())
        node.ends.append((number, enders))
    return root


def label_trie(prompt: ClassificationPrompt, first: int = 0, chosen: bool = False) -> Trie:
    """The labels as candidates: all, or if a row may have several those from `first` on, and last the end alone.

    chosen: they come after other labels.
    """
    if not prompt.multi_label:
        return build_trie([(ids, prompt.end_ids) for ids in prompt.first_ids])
    pieces, candidates = prompt.next_ids if chosen else prompt.first_ids, []
    for k in range(first, len(prompt.labels)):
        followers = {ids[0] for ids in prompt.next_ids[k + 1 :]} | set(prompt.end_ids)
        candidates.append((pieces[k], sorted(followers)))
    return build_trie([*candidates, ([], prompt.end_ids)])


class TrieSearch:
    """Log-probabilities of all candidates of `trie` after `start`, the most probable branches first.

    Call `next_nodes` and compute what it returns, until it returns nothing.
    tolerance: the search is done once all branches that are left hold no more than this share of the probability of the
    candidates found, so that no normalized probability is off by more. 0: all candidates are found; infinite: the
    likeliest, which is found with any tolerance.
    also: ids after `start` whose nodes are computed with the first ones, whatever they are worth.
    """

    def __init__(self, start: Node, trie: Trie, tolerance: float, also: Sequence[int] = ()) -> None:
        self.start, self.trie, self.tolerance, self.budget = start, trie, tolerance, BUDGET
        self.first = start.descend(also).path()
        self.found: dict[int, float] = {}  # candidate -> log-probability
        self.frontier: list[tuple[float, int, Node, Trie]] = [(-0.0, 0, start, trie)]  # (- log-probability, tie, ...)
        self.ties = 1
        self.taken: list[tuple[float, list[tuple[Node, Trie]]]] = []  # branches that wait for their nodes' computation

    def next_nodes(self) -> list[Node]:
        """The nodes to compute next; empty: the search is done. Those of the last call must have been computed."""
        while True:
            for log, branch in self.taken:
                self._read(log, branch)
            self.taken = []
            wanted, self.first = _not_yet_requested(self.first), []
            while len(wanted) < self.budget and not self._enough():
                wanted += _not_yet_requested(self._take())
            self.budget *= 2
            if wanted or not self.taken:
                return wanted

    def tighten(self, tolerance: float) -> None:
        """Continues a search that was done, with a smaller tolerance."""
        self.tolerance, self.budget = tolerance, BUDGET

    def scores(self) -> list[float]:
        """The log-probability of every candidate, by number; candidates of a branch left out share its probability."""
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
        return self.start.descend(self.trie.candidates[number][0])

    def _enough(self) -> bool:
        """Whether to take no further branch for now."""
        if not self.frontier or not self.tolerance:
            return not self.frontier
        following, likeliest = -self.frontier[0][0], max(self.found.values(), default=-math.inf)
        if self.taken:  # the outcome of those taken may well settle it
            return following < max(likeliest, *(log for log, _ in self.taken)) + math.log(self.tolerance)
        settled = self.left_out() <= log_sum(list(self.found.values())) + math.log(self.tolerance)
        return settled and following < likeliest

    def _take(self) -> list[Node]:
        """The best branch, down to where it divides: those tokens are known, so one pass computes them all."""
        negative, _, node, trie = heapq.heappop(self.frontier)
        branch = [(node, trie)]
        while len(trie.children) == 1:
            [(token, trie)] = trie.children.items()
            node = node.descend([token])
            branch.append((node, trie))
        self.taken.append((-negative, branch))
        return [node for node, _ in branch if node.parent]

    def _read(self, log: float, branch: list[tuple[Node, Trie]]) -> None:
        """Moves a computed branch's ends to those found, and its children to the frontier."""
        for i, (node, trie) in enumerate(branch):
            if i:
                log += node.parent.log_probs[node.token]
            for number, enders in trie.ends:
                self.found[number] = log + node.log_prob_of_any(enders)
        for token, child in trie.children.items():
            heapq.heappush(self.frontier, (-log - node.log_probs[token], self.ties, node.descend([token]), child))
            self.ties += 1


class OneLabel(TrieSearch):
    """The search for a row's one label."""

    def answer(self) -> tuple[tuple[int, ...], list[float]]:
        """The likeliest label, and the probability of each; none of these if the tolerance is infinite."""
        logs = [] if self.tolerance == math.inf else self.scores()
        total = log_sum(logs)
        return (self.best(),), [math.exp(log - total) for log in logs]


class LabelChain:
    """The search for several labels of a row: a chain of yes / no decisions in label order.

    With q_m the probability that label m comes next (then a separator or the end) after those already chosen, and
    q_stop that of the end, p_k = q_k / (q_k + sum of q_m over later m + q_stop); p_k at or above its threshold adds k.
    The p_k are the reported probabilities.
    trie: (the first label that may come, whether others are chosen) -> as of `label_trie`.
    """

    def __init__(
        self,
        root: Node,
        trie: Callable[[int, bool], Trie],
        thresholds: Sequence[float],
        tolerance: float,
        also: Sequence[int] = (),
    ) -> None:
        self.trie, self.thresholds, self.tolerance = trie, thresholds, tolerance
        self.chosen: tuple[int, ...] = ()
        self.probabilities: list[float] = []
        self.search = TrieSearch(root, trie(0, False), tolerance, also)

    def next_nodes(self) -> list[Node]:
        """As of TrieSearch."""
        while len(self.probabilities) < len(self.thresholds):
            if nodes := self.search.next_nodes():
                return nodes
            self._decide()
        return []

    def answer(self) -> tuple[tuple[int, ...], list[float]]:
        """The labels chosen, and the probability of each decision."""
        return self.chosen, self.probabilities

    def _decide(self) -> None:
        """Decides up to the next label that is chosen, or tightens the search if too much was left out for that."""
        first, logs = len(self.probabilities), self.search.scores()
        top = max(logs)
        q = [math.exp(log - top) for log in logs]  # of labels first, first + 1, ..., and of stopping
        decided: list[float] = []
        least, chosen = 0.0, False
        while len(decided) < len(q) - 1 and not chosen:
            least = sum(q[len(decided) :])  # of what this decision is made among
            decided.append(q[len(decided)] / least if least else 0.0)
            chosen = decided[-1] >= self.thresholds[first + len(decided) - 1]
        if math.exp(self.search.left_out() - top) > self.tolerance * least:
            self.search.tighten(self.search.tolerance * least / sum(q) / 2)
            return
        self.probabilities += decided
        node = self.search.start
        if chosen:
            self.chosen += (len(self.probabilities) - 1,)
            node = self.search.node(len(decided) - 1)
        self.search = TrieSearch(node, self.trie(len(self.probabilities), bool(self.chosen)), self.tolerance)


def _not_yet_requested(nodes: Sequence[Node]) -> list[Node]:
    """The nodes that no search has requested, which now count as requested."""
    found = [node for node in nodes if not node.requested]
    for node in found:
        node.requested = True
    return found
