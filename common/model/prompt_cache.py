"""Next-token probabilities behind prompts, and behind any tokens that go on from them, for many prompts at once.

The prompts are rows of a shared-prefix pack (common/collate.py) whose keys and values are kept. Tokens behind a prompt
are a tree: each sees the prefix, its prompt and the tokens on its way, so that one pass computes whole branches.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from common.text.batches import pad_left


@dataclass(eq=False)
class Node:
    """One token behind a prompt (the root is the prompt's last) with the tokens on the way to it.

    logs: log-probability of each token that may follow, by its id; None until it was computed. likeliest: the likeliest
    token of the whole vocabulary. slot: place among the row's computed tokens.
    """

    token: int = -1
    parent: "Node | None" = None
    logs: Mapping[int, float] | None = None
    likeliest: int = -1
    slot: int = -1
    asked: bool = False
    children: dict[int, "Node"] = field(default_factory=dict)

    def walk(self, ids: Sequence[int]) -> "Node":
        """The node behind `ids`, counted from this one."""
        node = self
        for token in ids:
            node = node.children.setdefault(token, Node(token, node))
        return node

    def path(self) -> list["Node"]:
        """The nodes from the first behind the root to this one."""
        nodes, node = [], self
        while node.parent:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def log_any(self, ids: Sequence[int]) -> float:
        """Log-probability that the next token is one of `ids`."""
        return log_sum([self.logs[token] for token in ids])


def log_sum(logs: Sequence[float]) -> float:
    """log(sum(exp(logs)))."""
    top = max(logs, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(value - top) for value in logs))


class PackCache(Cache):
    """Keys and values of a prefix, and of rows that go on from it, in the layout of shared-prefix packs.

    prefix: (key, value), each [1, heads, length, size], of every layer; empty where there is none.
    """

    def __init__(self, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: int) -> None:
        super().__init__(layers=[])
        self.prefix, self.rows = prefix, rows
        self.own: dict[int, list[torch.Tensor]] = {}  # layer -> the rows' keys and values, [heads, rows, own, size]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
        """New [1, heads, rows x new, size] -> all [1, heads, prefix + rows x (own + new), size]."""
        new = [states[0].unflatten(1, (self.rows, -1)) for states in (key, value)]
        old = self.own.get(layer_idx)
        own = self.own[layer_idx] = [torch.cat(pair, 2) for pair in zip(old, new, strict=True)] if old else new
        rest = [states.flatten(1, 2)[None] for states in own]
        if not self.prefix:
            return tuple(rest)
        return tuple(torch.cat(pair, 2) for pair in zip(self.prefix[layer_idx], rest, strict=True))

    def select(self, places: torch.Tensor) -> "PackCache":
        """A cache of rows made of these tokens, [rows, own]; a place is that of a token in the flattened rows."""
        other = PackCache(self.prefix, len(places))
        other.own = {layer: [states.flatten(1, 2)[:, places] for states in own] for layer, own in self.own.items()}
        return other


class Prompts:
    """Prompts whose next tokens were computed (`roots`), and after them those of any tokens behind the prompts.

    Short prompts are computed one behind the other in a row, where none sees another, so that there is little padding.
    From then on each has its row. prefix: a cache's keys and values of what all prompts begin with, `shared` tokens.
    alphabet: the tokens whose log-probabilities are wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        alphabet: Sequence[int],
        pad_id: int,
        device: Any,
        prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        self.model, self.alphabet, self.pad_id, self.device = model, list(alphabet), pad_id, device
        self.roots = [Node() for _ in prompts]
        self.shared = shared = prefix[0][0].shape[2] if prefix else 0
        self.lengths = torch.tensor([len(ids) for ids in prompts])
        own = (self.lengths - shared).tolist()
        rows, width = fill_rows(own), max(own)
        self.cache = PackCache(prefix, len(rows))
        ids = torch.full((len(rows), width), pad_id)
        positions = torch.zeros_like(ids)
        mask = torch.zeros(len(rows), width, width, dtype=torch.bool)
        starts = torch.zeros_like(self.lengths)
        for i, row in enumerate(rows):
            end = 0
            for k in row:
                place, end = slice(end, end + own[k]), end + own[k]
                ids[i, place] = torch.tensor(prompts[k][shared:])
                positions[i, place] = torch.arange(shared, shared + own[k])
                mask[i, place, place] = torch.ones(own[k], own[k], dtype=torch.bool).tril()
                starts[k] = i * width + place.start
        self._run(ids, positions, mask, starts + self.lengths - shared - 1, self.roots)
        self.rows = list(range(len(prompts)))  # those in the cache
        self.seen = torch.arange(width) < self.lengths[:, None] - shared  # [rows, own]: by every later token of a row
        places = starts[:, None] + torch.arange(width) * self.seen
        self.cache = self.cache.select(places.to(device))

    def compute(self, wanted: dict[int, list[Node]]) -> None:
        """Fills in the nodes of each row. Rows that want none are dropped, and must not want any later."""
        if len(wanted) < len(self.rows):
            self._keep([i for i, row in enumerate(self.rows) if row in wanted])
        own, new = self.seen.shape[1], max(map(len, wanted.values()))
        ids = torch.full((len(self.rows), new), self.pad_id)
        positions = torch.zeros_like(ids)
        self.seen = torch.cat([self.seen, torch.zeros_like(ids, dtype=torch.bool)], 1)
        mask = self.seen[:, None].repeat(1, new, 1)
        nodes, places = [], []
        for i, row in enumerate(self.rows):
            for j, node in enumerate(wanted[row]):
                node.slot = own + j
            for j, node in enumerate(wanted[row]):
                path = node.path()
                ids[i, j], positions[i, j] = node.token, self.lengths[i] + len(path) - 1
                mask[i, j, [other.slot for other in path]] = True
                nodes.append(node)
                places.append(i * new + j)
        self._run(ids, positions, mask, torch.tensor(places), nodes)

    def split(self, wanted: dict[int, list[Node]], most: int) -> "Prompts | None":
        """Gives half of its rows away, if those that want these nodes would be more than `most` tokens with them."""
        kept = [i for i, row in enumerate(self.rows) if row in wanted]
        new = max(map(len, wanted.values()), default=0)
        if len(kept) < 2 or len(kept) * (self.seen.shape[1] + new) <= most:
            return None
        other = copy.copy(self)
        other._keep(kept[len(kept) // 2 :])
        self._keep(kept[: len(kept) // 2])
        return other

    def _keep(self, rows: list[int]) -> None:
        self.rows, self.seen, self.lengths = [self.rows[i] for i in rows], self.seen[rows], self.lengths[rows]
        own = self.seen.shape[1]
        places = own * torch.tensor(rows)[:, None] + torch.arange(own)
        self.cache = self.cache.select(places.to(self.device))

    def _run(
        self, ids: torch.Tensor, positions: torch.Tensor, own: torch.Tensor, places: torch.Tensor, nodes: list[Node]
    ) -> None:
        """One pass over tokens [rows, new] that see the prefix and, by `own` [rows, new, own + new], of their row."""
        rows, new = ids.shape
        own[:, :, -new:] |= torch.eye(new, dtype=torch.bool)  # padding would see nothing
        mask = torch.cat([torch.ones(rows, new, self.shared, dtype=torch.bool), own], 2)[:, None]
        output = self.model(
            input_ids=ids.view(1, -1).to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.view(1, -1).to(self.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=places.to(self.device),
        )
        fill(nodes, output.logits[0], self.alphabet)


def fill_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the sequences in rows as long as the longest, each in the first row with room for it."""
    rows, room = [], []
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        i = next((i for i, left in enumerate(room) if left >= lengths[k]), len(rows))
        if i == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[i].append(k)
        room[i] -= lengths[k]
    return rows


class PlainPrompts:
    """The same for models that take no packs: every branch behind a prompt is a row of its own.

    cached: the prompts' keys and values are kept; else each branch is computed with its prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        alphabet: Sequence[int],
        pad_id: int,
        device: Any,
        cached: bool,
    ) -> None:
        self.model, self.alphabet, self.pad_id, self.device, self.cached = model, list(alphabet), pad_id, device, cached
        self.roots = [Node() for _ in prompts]
        self.prompts = pad_left(prompts, pad_id)
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._run([(row, []) for row in range(len(prompts))])

    def split(self, wanted: dict[int, list[Node]], most: int) -> None:
        """Never: nothing behind a prompt is kept."""

    def compute(self, wanted: dict[int, list[Node]]) -> None:
        """Fills in the nodes of each row."""
        branches = []
        for row, nodes in wanted.items():
            parents = {id(node.parent) for node in nodes}
            branches += [(row, node.path()) for node in nodes if id(node) not in parents]
        for i in range(0, len(branches), len(self.roots)):  # as many at once as there are prompts
            self._run(branches[i : i + len(self.roots)])

    def _run(self, branches: Sequence[tuple[int, list[Node]]]) -> None:
        """Rows with the nodes behind their prompts, none for the prompts themselves."""
        rows, longest = torch.tensor([row for row, _ in branches]), max(len(path) for _, path in branches)
        behind = [[node.token for node in path] + [self.pad_id] * (longest - len(path)) for _, path in branches]
        behind = torch.tensor(behind, dtype=torch.long)  # what is behind a row's last token is seen by none
        ids = torch.cat([self.prompts["input_ids"][rows], behind], 1)
        mask = torch.cat([self.prompts["attention_mask"][rows], torch.ones_like(behind)], 1)
        kept = self.prompts["input_ids"].shape[1] if self.states else 0
        cache = DynamicCache([(key[rows], value[rows]) for key, value in self.states]) if self.cached else None
        last = max(1, longest)
        logits = self.model(
            input_ids=ids[:, kept:].to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, kept:].to(self.device),
            past_key_values=cache,
            use_cache=self.cached,
            logits_to_keep=torch.arange(ids.shape[1] - kept - last, ids.shape[1] - kept, device=self.device),
        ).logits[:, -last:]  # a few models return all, whatever they are asked for
        if self.cached and not self.states:
            self.states = [(layer.keys, layer.values) for layer in cache.layers]
        nodes = [path or [self.roots[row]] for row, path in branches]
        parts = [row[: len(path)] for row, path in zip(logits, nodes, strict=True)]
        fill([node for path in nodes for node in path], torch.cat(parts), self.alphabet)


def fill(nodes: Sequence[Node], logits: torch.Tensor, alphabet: list[int]) -> None:
    """Gives the nodes their next-token log-probabilities; logits: [nodes, vocabulary]."""
    few = max(1, (2**20 if logits.device.type == "cpu" else 2**24) // logits.shape[1])
    for i in range(0, len(nodes), few):  # copies in fp32 that fit in a cache
        part = logits[i : i + few].float()
        logs = (part[:, alphabet] - part.logsumexp(1, keepdim=True)).tolist()
        for node, values, best in zip(nodes[i : i + few], logs, part.argmax(1).tolist(), strict=True):
            node.logs, node.likeliest = dict(zip(alphabet, values, strict=True)), best


def prefix_states(model: nn.Module, ids: Sequence[int], device: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(key, value), each [1, heads, tokens, size], of every layer."""
    cache = DynamicCache()
    tokens = torch.tensor([list(ids)], device=device)
    positions = torch.arange(len(ids), device=device)[None]
    model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]
