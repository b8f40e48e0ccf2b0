"""Best-first search against the sum over everything, with a made-up language model."""

import itertools
import math
import random

import pytest

from common import trie
from common.trie import Node, Search, build_trie, log_sum

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

    def run(self, talk) -> None:
        for nodes in talk:
            assert len(set(map(id, nodes))) == len(nodes) and all(node.logs is None for node in nodes)
            self.rounds += 1
            self.computed += len(nodes)
            for node in nodes:
                node.logs = self.logs(tuple(step.token for step in node.path()))

    def root(self) -> Node:
        return Node(logs=self.logs(()))

    def brute(self, ids: tuple[int, ...], enders) -> float:
        steps = [self.logs(ids[:i])[token] for i, token in enumerate(ids)]
        return sum(steps) + log_sum([self.logs(ids)[token] for token in enders])


def labels(count: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct labels of one to six tokens, some of which begin others."""
    rng, found = random.Random(seed), {(5,), (5, 6), (5, 6, 7)}
    while len(found) < count:
        found.add(tuple(rng.randint(2, 11) for _ in range(rng.randint(1, 6))))
    return sorted(found, key=lambda ids: rng.random())


def normalised(logs: list[float]) -> list[float]:
    return [math.exp(value - log_sum(logs)) for value in logs]


@pytest.mark.parametrize("sharp", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("count", [4, 77, 1000])
def test_scores_are_those_of_the_sum_over_everything(count, sharp):
    candidates = [(ids, (END,) if i % 3 else (END, STOP)) for i, ids in enumerate(labels(count, seed=count))]
    model = Model(12, sharp)
    exact = [model.brute(*candidate) for candidate in candidates]
    tree = build_trie(candidates)
    search = Search(model.root(), tree)
    model.run(search.run(0.0))
    assert search.scores() == pytest.approx(exact, abs=1e-9)
    nodes = {ids[: i + 1] for ids, _ in candidates for i in range(len(ids))}
    assert model.computed == len(nodes)  # every token once
    for tolerance in (1e-6, 1e-3):
        model = Model(12, sharp)
        search = Search(model.root(), tree)
        model.run(search.run(tolerance))
        found, wanted = normalised(search.scores()), normalised(exact)
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
    search = Search(model.root(), build_trie(candidates))
    model.run(search.run(tolerance))
    few, exact = model.computed, [model.brute(*candidate) for candidate in candidates]
    assert exact[search.best()] == max(exact)
    model.run(search.run(0.0))
    assert few < model.computed or count == 4


def test_candidates_that_were_left_out_share_their_branch():
    model = Model(12, 12.0)
    candidates = [(ids, (END,)) for ids in labels(300, seed=1)]
    search = Search(model.root(), build_trie(candidates))
    model.run(search.run(1e-6))
    scores = search.scores()
    assert len(search.found) < 300 and log_sum(scores) == pytest.approx(
        log_sum([*search.found.values(), search.left_out()]), abs=1e-9
    )
    for number in set(range(300)) - set(search.found):
        assert scores[number] >= model.brute(*candidates[number]) - math.log(300)


def test_stricter_tolerance_goes_on_where_the_search_stopped():
    model, tree = Model(12, 6.0), build_trie([(ids, (END,)) for ids in labels(200, seed=2)])
    search = Search(model.root(), tree)
    model.run(search.run(1e-2))
    few = model.computed
    model.run(search.run(0.0))
    assert few < model.computed
    assert search.scores() == pytest.approx([model.brute(*candidate) for candidate in tree.candidates], abs=1e-9)


def test_known_tokens_are_computed_once_and_with_the_first(monkeypatch):
    """The gold answer's tokens, and a start that was never computed."""
    model, tree = Model(12, 6.0), build_trie([(ids, (END,)) for ids in labels(50, seed=3)])
    root = model.root()
    gold = root.walk(tree.candidates[7][0])
    talk = Search(root, tree).run(1e-6, gold.path())
    first = next(talk)
    assert {id(node) for node in gold.path()} <= {id(node) for node in first}
    model.run(itertools.chain([first], talk))
    assert all(node.logs for node in gold.path())
    later = root.walk([9, 9, 9, 9])
    assert later.logs is None
    search = Search(later, tree)
    model.run(search.run(0.0))
    assert later.logs and search.scores()[0] == pytest.approx(
        model.brute((9, 9, 9, 9, *tree.candidates[0][0]), (END,)) - sum(n.parent.logs[9] for n in later.path())
    )


@pytest.mark.parametrize("budget", [1, 5, 1000])
def test_budget_changes_the_rounds_alone(budget, monkeypatch):
    monkeypatch.setattr(trie, "BUDGET", budget)
    candidates = [(ids, (END,)) for ids in labels(77, seed=4)]
    model = Model(12, 3.0)
    search = Search(model.root(), build_trie(candidates))
    model.run(search.run(1e-6))
    exact = normalised([model.brute(*candidate) for candidate in candidates])
    assert normalised(search.scores()) == pytest.approx(exact, abs=1e-6)
    assert budget > 1 or model.rounds > 5
