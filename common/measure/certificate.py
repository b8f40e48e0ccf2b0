"""Whether an exported model is what was trained: layer by layer, token by token, in its task, and in its text handling.

    trained adapter on its base ─┬─ the same held-out rows ─┬─ KL per token, likeliest token, task metric, prompt ids
    exported model, plain loading ┘                         └─ the same inputs to every layer, every other weight

Layers are compared because one that lacks its adapter may hardly show in the tokens of a few rows.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from common.measure.intervals import Measure, difference, percentiles, point, resampled
from common.measure.metrics import METRICS
from common.model.merging import plain_weight

PROBES = 8  # inputs to a layer
POSITIONS = 16  # of a row, at most
# The largest differences that rounding explains. Layers: relative; a bf16 weight is off by up to 1/256.
LAYER_BOUNDS = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2}
# Mean KL divergence in nats per token, and share of tokens with the same likeliest one. Two ways to compute the same in
# bf16, as on a GPU, are 0.002 to 0.004 nats apart on SmolLM2-135M.
TOKEN_BOUNDS = {"merged": (0.02, 0.93), "f16": (0.02, 0.93), "q8_0": (0.03, 0.92), "q4_k_m": (0.2, 0.75)}


@dataclass(frozen=True)
class ReplayRow:
    """A held-out row. ids: all its tokens. targets: the places in `ids` of those that the model is to predict."""

    id: str
    ids: list[int]
    targets: list[int]

    @property
    def prompt(self) -> list[int]:
        """The ids before the first target."""
        return self.ids[: self.targets[0]]

    def chosen(self, most: int) -> list[int]:
        """At most so many of the targets, from all over the row."""
        step = max(1, len(self.targets) / most)
        return [self.targets[int(i * step)] for i in range(int(len(self.targets) / step))]


@torch.inference_mode()
def layer_differences(trained: nn.Module, exported: nn.Module) -> dict[str, float]:
    """name -> how far a layer with an adapter, or any other weight, of the exported model is off, as a share of it.

    trained: the model as PEFT holds it, or one whose weights were all trained. An adapted layer is compared by what it
    puts out for inputs that its adapter answers to most: sums of the rows of lora_A. A weight that the exported model
    lacks, or one of another shape, is off by infinity.
    """
    layers = dict(exported.named_modules())
    found, adapted = {}, set()
    for name, layer in trained.named_modules():
        if isinstance(layer, LoraLayer):
            adapted.add(f"{name}.")
            plain = _plain(name)
            found[plain] = _output_difference(layer, layers[plain]) if plain in layers else math.inf
    weights = dict(exported.named_parameters())
    for name, weight in trained.named_parameters():
        if not any(name.startswith(layer) for layer in adapted) and ".original_module." not in name:
            before = plain_weight(trained.get_submodule(name.rpartition(".")[0]), weight)
            plain = _plain(name.replace(".modules_to_save.default", ""))
            after = weights.get(plain)
            same = after is not None and after.shape == before.shape
            found[plain] = _relative(before, after) if same else math.inf  # type: ignore[arg-type]
    return found


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _output_difference(layer: Any, exported: nn.Module) -> float:
    directions = layer.lora_A["default"].weight.float()  # [r, inputs]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(PROBES, len(directions), generator=generator).to(directions) @ directions
    base = layer.get_base_layer()
    with torch.autocast(inputs.device.type, enabled=False):
        after = copy.deepcopy(exported).float()(inputs)
        if base.weight.is_floating_point():
            return _relative(copy.deepcopy(layer).float()(inputs), after)
        # A quantized layer computes in bf16, or rounds its input; what its adapter adds comes out exactly.
        bias = None if base.bias is None else base.bias.float()
        own = nn.functional.linear(inputs, plain_weight(base, base.weight).float(), bias)
        return _relative(own + layer(inputs) - base(inputs), after)


def _relative(before: torch.Tensor, after: torch.Tensor) -> float:
    before, after = before.float(), after.float()
    return float((after - before).norm() / before.norm().clamp_min(1e-12))


def token_agreement(trained: Sequence[torch.Tensor], exported: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean KL divergence (nats per token) of the exported model's predictions from the trained one's, and top-1 share.

    trained, exported: of each row, log-probabilities [positions, vocabulary].
    """
    kl = hits = count = 0.0
    for before, after in zip(trained, exported, strict=True):
        before, after = before.float(), after.float()
        kl += float((before.exp() * (before - after)).sum().double())
        hits += int((before.argmax(-1) == after.argmax(-1)).sum())
        count += len(before)
    return {"kl_per_token": kl / count, "top_1_agreement": hits / count, "tokens": int(count)}


def metric_difference(before: Measure, after: Measure, rows: int) -> dict[str, Any]:
    """Of each metric: both values, and the difference with its paired 95 % interval. rows: how many are measured."""
    change = difference(before, after)
    spread = {name: percentiles(values) for name, values in resampled(change, rows).items()}
    values = point(before, rows), point(after, rows), point(change, rows)
    spread = {name: bounds for name, bounds in spread.items() if name in METRICS}
    return {name: {"trained": values[0][name], "exported": values[1][name], "difference": values[2][name],
                   "interval_95": spread[name]} for name in spread}  # fmt: skip


def problems(certificate: Mapping[str, Any]) -> list[str]:
    """What a certificate shows to be off, in sentences; empty where the export is what was trained."""
    found = [f"{name}: {text}" for name, text in certificate["different"].items()]
    if layers := certificate.get("layers"):
        far = {name: value for name, value in layers["differences"].items() if not value <= layers["bound"]}
        shown = ", ".join(f"{name} by {value:.2%}" for name, value in list(far.items())[:3])
        if far:
            found.append(
                f"{len(far)} of {len(layers['differences'])} weights differ ({shown}; bound {layers['bound']:.2%})"
            )
    if tokens := certificate.get("tokens"):
        most_kl, least = tokens["bounds"]
        if not tokens["kl_per_token"] <= most_kl:
            found.append(f"KL divergence {tokens['kl_per_token']:.4f} nats per token, above {most_kl}")
        if not tokens["top_1_agreement"] >= least:
            found.append(f"the same likeliest token in {tokens['top_1_agreement']:.1%}, below {least:.0%}")
    return found


def certificate_text(certificate: Mapping[str, Any]) -> str:
    """A certificate for people."""
    rows = f"{certificate['rows']} {certificate['split']} rows"
    lines = [f"{certificate['format']} export of {certificate['run']}, replayed on {rows}", ""]
    if layers := certificate.get("layers"):
        worst, bound = max(layers["differences"].values()), layers["bound"]
        count = len(layers["differences"])
        lines.append(f"weights       {count} compared, at most {worst:.3%} off (bound {bound:.2%})")
    if tokens := certificate.get("tokens"):
        most_kl, least = tokens["bounds"]
        kl = f"KL {tokens['kl_per_token']:.5f} nats per token (bound {most_kl})"
        top = f"same likeliest token {tokens['top_1_agreement']:.1%} (bound {least:.0%})"
        lines.append(f"tokens        {tokens['tokens']} compared, {kl}, {top}")
    for name, entry in certificate["metrics"].items():
        low, high = entry["interval_95"]
        title = METRICS[name].title
        lines.append(f"{title:<13} {entry['trained']:.4g} trained, {entry['exported']:.4g} exported, difference "
                     f"{entry['difference']:+.4g} [{low:.4g}, {high:.4g}]")  # fmt: skip
    lines.append(f"the same      {', '.join(certificate['same'])}")
    lines += certificate["notes"]
    off = problems(certificate)
    verdict = "NOT what was trained:" if off else "Passed." if certificate["rows"] else "Not replayed."
    lines += ["", verdict, *(f"- {line}" for line in off)]
    return "\n".join(lines)
