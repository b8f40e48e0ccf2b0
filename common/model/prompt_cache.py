"""Next-token log-probabilities after prompts, and after tokens that continue them, for many prompts at once.

The tokens that continue a prompt form a tree of nodes, whose root is the prompt's last token. PromptCache keeps the
keys and values of what it has computed: each token sees its prompt and the tokens on its path, so that one pass
computes many branches of many prompts. PaddedPrompts does the same, more slowly, for models that take no packs.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from common.text.batches import Layout, pad_left

KeyValues = Sequence[tuple[torch.Tensor, torch.Tensor]]  # of every layer: (key, value), each [1, heads, tokens, size]


@dataclass(eq=False)
class Node:
    """A token that continues a prompt; the root of the tree is the prompt's last token.

    log_probs: token id -> log-probability that it comes next; empty until computed. likeliest: the likeliest next token
    of the entire vocabulary. requested: whether a search has wanted it. slot: column in PromptCache.
    """

    token: int = -1
    parent: "Node | None" = None
    log_probs: Mapping[int, float] = field(default_factory=dict)
    likeliest: int = -1
    requested: bool = False
    slot: int = -1
    children: dict[int, "Node"] = field(default_factory=dict)

    def descend(self, ids: Sequence[int]) -> "Node":
        """The node at the end of `ids`, which continue this one."""
        node = self
        for token in ids:
            node = node.children.setdefault(token, Node(token, node))
        return node

    def path(self) -> list["Node"]:
        """The nodes from the first one below the root to this one."""
        nodes, node = [], self
        while node.parent:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def log_prob_of_any(self, ids: Sequence[int]) -> float:
        """Log-probability that the next token is one of `ids`."""
        return log_sum([self.log_probs[token] for token in ids])


def log_sum(logs: Sequence[float]) -> float:
    """log(sum(exp(logs)))."""
    top = max(logs, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(value - top) for value in logs))


@dataclass(frozen=True)
class TokenScorer:
    """A model with what it takes to read its next-token log-probabilities, those of the tokens in `alphabet`."""

    model: nn.Module
    alphabet: list[int]
    pad_id: int
    device: torch.device | str

    def read(self, logits: torch.Tensor, nodes: Sequence[Node]) -> None:
        """Notes what may follow the nodes; logits: [nodes, vocabulary]."""
        few = max(1, (2**20 if logits.device.type == "cpu" else 2**24) // logits.shape[1])
        for i in range(0, len(nodes), few):  # copies in fp32 that fit in a cache
            part = logits[i : i + few].float()
            logs = (part[:, self.alphabet] - part.logsumexp(1, keepdim=True)).tolist()
            for node, values, best in zip(nodes[i : i + few], logs, part.argmax(1).tolist(), strict=True):
                node.log_probs, node.likeliest = dict(zip(self.alphabet, values, strict=True)), best


class PackCache(Cache):
    """Keys and values of a prefix, and of rows that continue it, in the layout of shared-prefix packs."""

    def __init__(self, prefix: KeyValues, rows: int) -> None:
        super().__init__(layers=[])
        self.prefix, self.rows = prefix, rows
        self.own: dict[int, list[torch.Tensor]] = {}  # layer -> the rows' keys and values, [heads, rows, own, size]

    def update(  # type: ignore[override]
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
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


class PromptCache:
    """Computed prompts (`roots`), and after them any tokens that continue them.

    Short prompts are first computed one after another in a row, where none sees another, so that there is little
    padding. From then on each prompt has its row.
    prefix: keys and values of what all prompts begin with. rows: numbers of the prompts that are still in the cache.
    """

    def __init__(self, scorer: TokenScorer, prompts: Sequence[Sequence[int]], prefix: KeyValues = ()) -> None:
        self.scorer = scorer
        self.rows, self.roots = list(range(len(prompts))), [Node() for _ in prompts]
        self.shared = shared = prefix[0][0].shape[2] if prefix else 0
        self.lengths = torch.tensor([len(ids) for ids in prompts])
        own = (self.lengths - shared).tolist()
        packed, width = fill_rows(own), max(own)
        self.cache = PackCache(prefix, len(packed))
        ids = torch.full((len(packed), width), self.scorer.pad_id)
        positions = torch.zeros_like(ids)
        mask = torch.zeros(len(packed), width, width, dtype=torch.bool)
        starts = torch.zeros_like(self.lengths)  # of each prompt's own tokens, in the flattened rows
        for i, members in enumerate(packed):
            end = 0
            for k in members:
                place, end = slice(end, end + own[k]), end + own[k]
                ids[i, place] = torch.tensor(prompts[k][shared:])
                positions[i, place] = torch.arange(shared, shared + own[k])
                mask[i, place, place] = torch.ones(own[k], own[k], dtype=torch.bool).tril()
                starts[k] = i * width + place.start
        self._run(ids, positions, mask, starts + self.lengths - shared - 1, self.roots)
        # [rows, columns]: which of a row's cached tokens are its prompt's, and so seen by all that come later
        self.prompt_columns = torch.arange(width) < self.lengths[:, None] - shared
        places = starts[:, None] + torch.arange(width) * self.prompt_columns
        self.cache = self.cache.select(places.to(scorer.device))

    def compute(self, wanted: dict[int, list[Node]]) -> None:
        """Computes nodes, by row, parents first. Rows that want none are dropped, and must not want any later."""
        if len(wanted) < len(self.rows):
            self._keep([i for i, row in enumerate(self.rows) if row in wanted])
        columns, new = self.prompt_columns.shape[1], max(map(len, wanted.values()))
        ids = torch.full((len(self.rows), new), self.scorer.pad_id)
        positions = torch.zeros_like(ids)
        self.prompt_columns = torch.cat([self.prompt_columns, torch.zeros_like(ids, dtype=torch.bool)], 1)
        mask = self.prompt_columns[:, None].repeat(1, new, 1)
        nodes, places = [], []
        for i, row in enumerate(self.rows):
            for j, node in enumerate(wanted[row]):
                node.slot, path = columns + j, node.path()
                ids[i, j], positions[i, j] = node.token, self.lengths[i] + len(path) - 1
                mask[i, j, [other.slot for other in path]] = True
                nodes.append(node)
                places.append(i * new + j)
        self._run(ids, positions, mask, torch.tensor(places), nodes)

    def split(self, wanted: dict[int, list[Node]], most: int) -> "PromptCache | None":
        """Hands half of its rows over, if those that want these nodes would be more than `most` tokens with them."""
        kept = [i for i, row in enumerate(self.rows) if row in wanted]
        new = max(map(len, wanted.values()), default=0)
        if len(kept) < 2 or len(kept) * (self.prompt_columns.shape[1] + new) <= most:
            return None
        other = copy.copy(self)
        other._keep(kept[len(kept) // 2 :])
        self._keep(kept[: len(kept) // 2])
        return other

    def _keep(self, kept: list[int]) -> None:
        self.rows, self.lengths = [self.rows[i] for i in kept], self.lengths[kept]
        self.prompt_columns = self.prompt_columns[kept]
        columns = self.prompt_columns.shape[1]
        places = columns * torch.tensor(kept)[:, None] + torch.arange(columns)
        self.cache = self.cache.select(places.to(self.scorer.device))

    def _run(
        self,
        ids: torch.Tensor,  # [rows, new]
        positions: torch.Tensor,  # [rows, new]
        mask: torch.Tensor,  # [rows, new, columns + new], which tokens of its row each one sees
        places: torch.Tensor,  # of the nodes, in the flattened ids
        nodes: list[Node],
    ) -> None:
        """One pass over new tokens, which see the prefix and what `mask` says."""
        rows, new, device = *ids.shape, self.scorer.device
        mask[:, :, -new:] |= torch.eye(new, dtype=torch.bool)  # padding would see nothing
        mask = torch.cat([torch.ones(rows, new, self.shared, dtype=torch.bool), mask], 2)[:, None]
        output = self.scorer.model(
            input_ids=ids.view(1, -1).to(device),
            attention_mask=mask.to(device),
            position_ids=positions.view(1, -1).to(device),
            layout=Layout(rows, self.shared),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=places.to(device),
        )
        self.scorer.read(output.logits[0], nodes)


def fill_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the sequences in rows as long as the longest, each in the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        i = next((i for i, left in enumerate(room) if left >= lengths[k]), len(rows))
        if i == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[i].append(k)
        room[i] -= lengths[k]
    return rows


class PaddedPrompts:
    """PromptCache for models that take no packs: every branch is a padded row of its own.

    keep_keys: the prompts' keys and values are kept; else a branch is computed with its prompt. positions: as many at
    least has every pass, some of them of padding, so that all passes have the same rotary embeddings.
    """

    def __init__(
        self, scorer: TokenScorer, prompts: Sequence[Sequence[int]], keep_keys: bool, positions: int = 0
    ) -> None:
        self.scorer, self.keep_keys, self.positions = scorer, keep_keys, positions
        self.states: KeyValues = []
        self.rows, self.roots = list(range(len(prompts))), [Node() for _ in prompts]
        longer = [[scorer.pad_id] * (max(map(len, prompts)) + 1)] if positions else []  # so that all rows have padding
        self.prompts = pad_left([*prompts, *longer], scorer.pad_id)
        self._run([(row, []) for row in self.rows])

    def split(self, wanted: dict[int, list[Node]], most: int) -> None:
        """Never: what continues a prompt is not kept, so a batch does not grow."""

    def compute(self, wanted: dict[int, list[Node]]) -> None:
        """Computes nodes, by row, in passes of as many branches as there are prompts."""
        self.rows, branches = list(wanted), []
        for row, nodes in wanted.items():
            parents = {node.parent for node in nodes}
            branches += [(row, node.path()) for node in nodes if node not in parents]
        for start in range(0, len(branches), len(self.roots)):
            self._run(branches[start : start + len(self.roots)])

    def _run(self, branches: list[tuple[int, list[Node]]]) -> None:
        """One pass over paths of nodes, each with its row; an empty path is the prompt alone."""
        rows, longest = [row for row, _ in branches], max(len(path) for _, path in branches)
        tokens = [[node.token for node in path] + [self.scorer.pad_id] * (longest - len(path)) for _, path in branches]
        new = torch.tensor(tokens, dtype=torch.long)  # padded on the right, which no token sees
        ids = torch.cat([self.prompts["input_ids"][rows], new], 1)
        mask = torch.cat([self.prompts["attention_mask"][rows], torch.ones_like(new)], 1)
        start, last = ids.shape[1] - longest if self.states else 0, max(0, self.positions - 1)
        cache: Any = DynamicCache([(key[rows], value[rows]) for key, value in self.states]) if self.keep_keys else None
        logits = self.scorer.model(
            input_ids=ids[:, start:].to(self.scorer.device),
            attention_mask=mask.to(self.scorer.device),
            position_ids=(mask.cumsum(1) - 1).masked_fill(mask == 0, last)[:, start:].to(self.scorer.device),
            past_key_values=cache,
            use_cache=self.keep_keys,
            logits_to_keep=max(1, longest),
        ).logits[:, -max(1, longest) :]  # a few models return all
        if self.keep_keys and not self.states:
            self.states = [(layer.keys, layer.values) for layer in cache.layers]
        for (row, path), values in zip(branches, logits, strict=True):
            self.scorer.read(values[: max(1, len(path))], path or [self.roots[row]])


def prefix_states(model: nn.Module, ids: Sequence[int], device: torch.device | str) -> KeyValues:
    """Keys and values of the tokens `ids`."""
    cache: Any = DynamicCache()
    tokens = torch.tensor([list(ids)], device=device)
    positions = torch.arange(len(ids), device=device)[None]
    model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]
