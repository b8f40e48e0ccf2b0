"""Best-first search against the sum over everything, with a made-up language model."""

import math
import random
from types import SimpleNamespace

import pytest

from common.measure import label_trie
from common.measure.label_trie import LabelChain, OneLabel, TrieSearch, build_trie
from common.model.prompt_cache import Node, log_sum

END, STOP = 0, 1


class Model:
    """Next-token probabilities drawn by path; `sharp` ones make a few paths nearly certain."""

    def __init__(self, tokens: int, sharp: float) -> None:
        self.tokens, self.sharp, self.computed, self.rounds = tokens, sharp, 0, 0

    def logs(self, path: tuple[int, ...]) -> dict[int, float]:
        rng = random.Random(str(path))
        logits = [rng.gauss(0, self.sharp) for _ in range(self.tokens)]
        total = log_sum(logits)
        return {token: value - total for token, value in enumerate(logits)}

    def compute(self, nodes: list[Node]) -> None:
        assert len(set(map(id, nodes))) == len(nodes) and not any(node.log_probs for node in nodes)
        self.rounds += 1
        self.computed += len(nodes)
        for node in nodes:
            assert node.parent.requested or not node.parent.parent  # parents come first
            node.log_probs = self.logs(tuple(step.token for step in node.path()))

    def run(self, search) -> None:
        while nodes := search.next_nodes():
            self.compute(nodes)
        assert search.next_nodes() == []

    def root(self) -> Node:
        return Node(log_probs=self.logs(()))

    def brute(self, ids: tuple[int, ...], enders) -> float:
        steps = [self.logs(ids[:i])[token] for i, token in enumerate(ids)]
        return sum(steps) + log_sum([self.logs(ids)[token] for token in enders])


def labels(count: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct labels of one to six tokens, some of which begin others."""
    rng, found = random.Random(seed), {(5,), (5, 6), (5, 6, 7)}
    while len(found) < count:
        found.add(tuple(rng.randint(2, 11) for _ in range(rng.randint(1, 6))))
    return sorted(found, key=lambda ids: rng.random())


def normalized(logs: list[float]) -> list[float]:
    return [math.exp(value - log_sum(logs)) for value in logs]


def test_the_worked_example_of_the_module():
    """Its numbers, its passes, and what it skips."""
    end, card, lost, late, top, up, fails = range(7)
    chances = {(): {card: 0.8, top: 2e-7}, (card,): {lost: 0.6, late: 0.3}, (card, lost): {end: 0.9},
               (card, late): {end: 0.9}}  # fmt: skip
    logs = {path: {token: math.log(p) for token, p in row.items()} for path, row in chances.items()}
    root = Node(log_probs=logs[()])
    trie = build_trie([((card, lost), (end,)), ((card, late), (end,)), ((top, up, fails), (end,))])
    search, passes = OneLabel(root, trie, 1e-6), []
    while nodes := search.next_nodes():
        paths = [tuple(step.token for step in node.path()) for node in nodes]
        for node, path in zip(nodes, paths, strict=True):
            node.log_probs = logs[path]
        passes.append(paths)
    assert passes == [[(card,)], [(card, lost), (card, late)]]
    assert {number: math.exp(log) for number, log in search.found.items()} == pytest.approx({0: 0.432, 1: 0.216})
    answer, probabilities = search.answer()
    assert answer == (0,) and probabilities == pytest.approx([2 / 3, 1 / 3, 3.1e-7], abs=4e-7)
    assert probabilities[2] == pytest.approx(3.1e-7, rel=0.01)
    shown = [f"{value:.2f}" for value in (logs[()][card], logs[card,][lost], logs[card,][late], logs[()][top])]
    assert all(value in label_trie.__doc__ for value in shown)


@pytest.mark.parametrize("sharp", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("count", [4, 77, 1000])
def test_scores_are_those_of_the_sum_over_everything(count, sharp):
    candidates = [(ids, (END,) if i % 3 else (END, STOP)) for i, ids in enumerate(labels(count, seed=count))]
    model = Model(12, sharp)
    exact = [model.brute(*candidate) for candidate in candidates]
    tree = build_trie(candidates)
    search = TrieSearch(model.root(), tree, 0.0)
    model.run(search)
    assert search.scores() == pytest.approx(exact, abs=1e-9)
    nodes = {ids[: i + 1] for ids, _ in candidates for i in range(len(ids))}
    assert model.computed == len(nodes)  # every token once
    for tolerance in (1e-6, 1e-3):
        model = Model(12, sharp)
        search = TrieSearch(model.root(), tree, tolerance)
        model.run(search)
        found, wanted = normalized(search.scores()), normalized(exact)
        assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= tolerance
        assert search.left_out() <= log_sum(exact) + math.log(tolerance) + 1e-9
        assert model.computed <= len(nodes)
        if sharp == 12.0 and count > 4:
            assert model.computed < len(nodes) / 2


@pytest.mark.parametrize("sharp", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("count", [4, 77, 1000])
@pytest.mark.parametrize("tolerance", [0.5, math.inf])
def test_the_likeliest_is_right_whatever_the_tolerance(count, sharp, tolerance):
    """Even where nearly nothing else is known, and all are about equally likely."""
    model = Model(12, sharp)
    candidates = [(ids, (END,)) for ids in labels(count, seed=count + 1)]
    search = TrieSearch(model.root(), build_trie(candidates), tolerance)
    model.run(search)
    few, exact = model.computed, [model.brute(*candidate) for candidate in candidates]
    assert exact[search.best()] == max(exact)
    search.tighten(0.0)
    model.run(search)
    assert few < model.computed or count == 4


def test_candidates_that_were_left_out_share_their_branch():
    model = Model(12, 12.0)
    candidates = [(ids, (END,)) for ids in labels(300, seed=1)]
    search = TrieSearch(model.root(), build_trie(candidates), 1e-6)
    model.run(search)
    scores = search.scores()
    assert len(search.found) < 300 and log_sum(scores) == pytest.approx(
        log_sum([*search.found.values(), search.left_out()]), abs=1e-9
    )
    for number in set(range(300)) - set(search.found):
        assert scores[number] >= model.brute(*candidates[number]) - math.log(300)


def test_a_tightened_search_continues_where_it_stopped():
    model, tree = Model(12, 6.0), build_trie([(ids, (END,)) for ids in labels(200, seed=2)])
    search = TrieSearch(model.root(), tree, 1e-2)
    model.run(search)
    few = model.computed
    search.tighten(0.0)
    model.run(search)
    assert few < model.computed
    assert search.scores() == pytest.approx([model.brute(*candidate) for candidate in tree.candidates], abs=1e-9)


def test_further_tokens_are_computed_once_and_with_the_first():
    """The gold answer's tokens, and a start that was never computed."""
    model, tree = Model(12, 6.0), build_trie([(ids, (END,)) for ids in labels(50, seed=3)])
    root = model.root()
    gold = tree.candidates[7][0]
    search = TrieSearch(root, tree, 1e-6, gold)
    first = search.next_nodes()
    assert set(root.descend(gold).path()) <= set(first)
    model.compute(first)
    model.run(search)
    assert all(node.log_probs for node in root.descend(gold).path())
    later = root.descend([9, 9, 9, 9])
    assert not later.log_probs
    search = TrieSearch(later, tree, 0.0)
    model.run(search)
    assert later.log_probs and search.scores()[0] == pytest.approx(
        model.brute((9, 9, 9, 9, *tree.candidates[0][0]), (END,)) - sum(n.parent.log_probs[9] for n in later.path())
    )


@pytest.mark.parametrize("budget", [1, 5, 1000])
def test_budget_changes_the_rounds_alone(budget, monkeypatch):
    monkeypatch.setattr(label_trie, "BUDGET", budget)
    candidates = [(ids, (END,)) for ids in labels(77, seed=4)]
    model = Model(12, 3.0)
    search = TrieSearch(model.root(), build_trie(candidates), 1e-6)
    model.run(search)
    exact = normalized([model.brute(*candidate) for candidate in candidates])
    assert normalized(search.scores()) == pytest.approx(exact, abs=1e-6)
    assert budget > 1 or model.rounds > 5


@pytest.mark.parametrize("sharp", [0.5, 6.0])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 1.1])
def test_a_chain_is_right_to_its_tolerance(threshold, sharp):
    """Against a chain that computes everything: the same decisions, and less work where few paths are likely."""
    ids = labels(12, seed=5)
    prompt = SimpleNamespace(
        multi_label=True, labels=ids, first_ids=ids, next_ids=[(11, *label) for label in ids], end_ids=[END]
    )

    def chain(tolerance: float) -> tuple[Model, LabelChain]:
        model = Model(12, sharp)
        search = LabelChain(
            model.root(), lambda *place: label_trie.label_trie(prompt, *place), [threshold] * 12, tolerance
        )
        model.run(search)
        return model, search

    (all_of_it, exact), (less, quick) = chain(0.0), chain(1e-6)
    chosen, probabilities = exact.answer()
    assert quick.answer()[0] == chosen and len(probabilities) == 12
    assert quick.answer()[1] == pytest.approx(probabilities, abs=1e-6)
    assert chosen == tuple(k for k, p in enumerate(probabilities) if p >= threshold)
    assert less.computed <= all_of_it.computed and (sharp < 1 or less.computed < all_of_it.computed)
