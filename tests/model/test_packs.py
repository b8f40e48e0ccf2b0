"""Shared-prefix packs: the same loss and gradients as a padded batch, and no row that sees another."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.models import FAMILIES, build_encoder, build_model
from helpers.packs import LENGTH, PRECISIONS, Options, assert_same, make
from helpers.rows import toy_options, toy_rows, write_csv
from helpers.runs import log_lines, train

from common.errors import InputError
from common.model import attention, base_model
from common.model.losses import target_logits
from common.text import batches
from common.text.batches import Layout, collate_rows, common_prefix, pays
from common.text.prompts import AnswerRow, HeadRow

PREFIX = list(range(5, 42))


def rows_of(count: int, kind: str) -> list:
    """Rows of one token and of the greatest length among them, with answers of one to three tokens."""
    generator = torch.Generator().manual_seed(count)
    rows = []
    for i in range(count):
        length = {0: 1, 1: LENGTH - len(PREFIX) - 4}.get(i, 3 + (i * 11) % 40)
        prompt = PREFIX + torch.randint(42, 600, (length,), generator=generator).tolist()
        weight = 1.0 + i % 3
        if kind == "answer":
            rows.append(AnswerRow(prompt, [7 + i % 4, 9, 2][-(1 + i % 3) :], weight))
        else:
            rows.append(HeadRow(prompt, i % 3 if kind == "single" else [float(i % 2), 0.0, 1.0], weight))
    return rows


@pytest.mark.parametrize("count", [1, 2, 7, 33])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_padded_batch(models, family, count):
    assert_same(make(models[family]), rows_of(count, "answer"))


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_classification_head(models, family, kind):
    assert_same(make(models[family], head=kind), rows_of(7, kind))


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"checkpointing": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_4_bit_and_with_gradient_checkpointing(models, family, options):
    assert_same(make(models[family], **options), rows_of(7, "answer"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_sees_the_prefix_and_itself(models, family):
    model = make(models[family]).eval()
    rows = [(row, True) for row in rows_of(5, "answer")]

    def logits(changed: int | None = None) -> list[torch.Tensor]:
        """Of every row [answer's tokens, vocabulary], after one token of row `changed` was replaced."""
        some = list(rows)
        if changed is not None:
            prompt = list(rows[changed][0].prompt)
            prompt[-1] = 599 if prompt[-1] != 599 else 598
            some[changed] = (dataclasses.replace(rows[changed][0], prompt=prompt), True)
        batch = batches.collate_answers(some, pad_id=2, shared_prefix="on")
        with torch.no_grad():
            found = target_logits(model, batch)
        return [found[batch.rows == i] for i in range(len(some))]

    before = logits()
    for changed in range(len(rows)):
        moved = [not torch.equal(a, b) for a, b in zip(before, logits(changed), strict=True)]
        assert moved == [i == changed for i in range(len(rows))]


def test_common_prefix_leaves_a_token_in_every_row():
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2, 4, 5]]) == 1
    assert common_prefix([[1, 2], [1, 2]]) == 1
    assert common_prefix([[1], [1, 2]]) == common_prefix([[3, 4], [4, 4]]) == 0


def test_auto_packs_where_it_saves_work():
    assert pays(500, [520] * 8) and pays(35, [215] * 4)
    assert not pays(500, [520]) and not pays(0, [50] * 8) and not pays(3, [200] * 8)
    rows = [AnswerRow([*range(10, 60), i], [2]) for i in range(4)]
    shapes = {}
    for choice in ("auto", "off"):
        batch = collate_rows([(row, True) for row in rows], pad_id=2, shared_prefix=choice)
        shapes[choice] = tuple(batch.input_ids.shape)
    assert shapes == {"auto": (1, 50 + 4 * 2), "off": (4, 52)}
    prompts, lengths = [row.prompt for row in rows], [row.length for row in rows]
    assert "same 50 tokens of about 52, computed once" in batches.describe_prefix(prompts, lengths, 4, "auto")
    assert "computed in every row" in batches.describe_prefix(prompts, lengths, 4, "off")
    assert "computed in every row" in batches.describe_prefix(prompts, lengths, 1, "on")


def resolved(path, encoder: bool = False, **options) -> str:
    config = Options(**options)
    model, _ = base_model.load_base(str(path), config, labels=["a", "b"] if encoder else None, device="cpu")
    return attention.resolve_shared_prefix(model, config, encoder)


def test_packs_are_off_where_they_would_not_be_the_same_training(models, tmp_path):
    llama = models["llama"]
    assert resolved(llama) == "auto" and resolved(llama, shared_prefix="off") == "off"
    assert resolved(llama, lora_dropout=0.1) == "off" and resolved(llama, lora_dropout=0.1, shared_prefix="on") == "on"
    short = build_model(tmp_path / "short", "mistral", sliding_window=LENGTH - 1)
    cases = {
        "sliding window of 119 tokens is shorter": {"path": short},
        r"attention \(eager\) knows none": {"path": llama, "attn_implementation": "eager"},
        "both directions": {"path": build_encoder(tmp_path / "bert", "bert"), "encoder": True},
    }
    for reason, case in cases.items():
        assert resolved(**case) == "off"
        with pytest.raises(InputError, match=f"--shared_prefix on: tiny cannot take packs, because.*{reason}"):
            resolved(**case, shared_prefix="on")
    assert resolved(build_model(tmp_path / "long", "mistral", sliding_window=LENGTH)) == "auto"


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trial_tells_rounding_from_a_mask_that_is_ignored(models, family, precision):
    """And leaves the mode and the random numbers of a run as they were."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model, _ = base_model.load_base(str(models[family]), Options(**precision), device="cpu")
    assert torch.rand(1) == expected and model.config._attn_implementation == attention.NAME
    assert attention.resolve_shared_prefix(model, Options(), False) == "auto"
    body, deaf = model.base_model, model.base_model.forward
    body.forward = lambda attention_mask=None, **inputs: deaf(**inputs)
    model.set_attn_implementation("sdpa")
    attention.use(model.train())
    assert model.training and model.config._attn_implementation == attention.ALONE


def odd(kind: str, **changes) -> torch.nn.Module:
    """A tiny random model of another kind, with attention of ours where it can have it."""
    shape = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**shape, **changes))
    attention.use(model)
    return model


def test_models_that_no_list_names_take_no_packs(tmp_path):
    """Doge makes its own mask from ours; the loss of a router reads the mask; a state runs through all rows; Nemotron
    drops the layout."""
    odd("DogeConfig").save_pretrained(tmp_path)
    assert resolved(tmp_path) == "off"
    with pytest.raises(InputError, match="tiny cannot take packs, because a trial of two rows in a pack failed"):
        resolved(tmp_path, shared_prefix="on")
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    assert attention.takes_packs(odd("MixtralConfig", **experts), LENGTH)
    refused = [odd("MixtralConfig", **experts, output_router_logits=True)]
    refused += [odd(kind) for kind in ("Qwen3_5TextConfig", "DogeConfig", "NemotronConfig")]
    assert not any(attention.takes_packs(model, LENGTH) for model in refused)


def test_windows_of_a_model_for_pictures_are_seen():
    """Gemma 3 keeps its text settings one level down."""
    config = transformers.Gemma3Config(attn_implementation=attention.NAME)
    config.text_config.sliding_window = 100
    assert "sliding window of 100 tokens" in attention._why_no_packs(config, False, LENGTH)
    assert attention._why_no_packs(config, False, 100) is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_no_cached_prefix_where_positions_change_with_the_length(kind):
    config = transformers.LlamaConfig(attn_implementation=attention.NAME, max_position_embeddings=100)
    config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 64}
    model = SimpleNamespace(config=config, _is_stateful=False, _supports_attention_backend=True)
    assert attention.takes_packs(model, 64) and not attention.takes_packs(model, 65)
    config.rope_parameters = {"rope_type": "default"}
    assert attention.takes_packs(model, 65)


def test_dropout_without_a_module_is_seen():
    """OPT's, of which the config alone tells."""
    shape = {"vocab_size": 60, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "word_embed_proj_dim": 16, "max_position_embeddings": 64}  # fmt: skip
    for dropout, choice in ((0.1, "off"), (0.0, "auto")):
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**shape, dropout=dropout))
        attention.use(model)
        model.config.summary_first_dropout = 0.1  # of a head that is not used
        assert attention.resolve_shared_prefix(model, Options(), False) == choice


def test_a_model_with_dropout_of_its_own_is_not_packed_unasked(models):
    config = Options()
    model, _ = base_model.load_base(str(models["llama"]), config, device="cpu")
    model.add_module("dropout", torch.nn.Dropout(0.1))
    assert attention.resolve_shared_prefix(model, config, False) == "off"
    config.shared_prefix = "on"
    assert attention.resolve_shared_prefix(model, config, False) == "on"


def test_a_run_is_the_same_with_and_without(models, tmp_path):
    """Through the whole script: few-shot prompts, accumulation, a short last micro-batch."""
    files = {s: str(write_csv(tmp_path / f"{s}.csv", toy_rows(n, start=k))) for s, n, k in
             (("train", 9, 0), ("validation", 2, 20), ("test", 3, 30))}  # fmt: skip
    losses, metrics = {}, {}
    for choice in ("on", "off"):
        run = tmp_path / choice
        few = [
            "--per_device_train_batch_size",
            3,
            "--gradient_accumulation_steps",
            2,
            "--few_shot",
            3,
            "--max_steps",
            6,
        ]
        train("--model", models["llama"], *toy_options(files), *few, "--output_dir", run, "--shared_prefix", choice)
        losses[choice] = [(line["loss"], line["grad_norm"]) for line in log_lines(run)]
        metrics[choice] = json.loads((run / "eval" / "test" / "metrics.json").read_text())["eval_loss"]
    assert torch.tensor(losses["on"]).allclose(torch.tensor(losses["off"]), rtol=1e-5)
    assert metrics["on"] == pytest.approx(metrics["off"], rel=1e-5)


def test_transformers_hands_mask_and_layout_through(models):
    """What packs rest on: both reach every layer as they are."""
    seen = []
    model = transformers.AutoModelForCausalLM.from_pretrained(models["qwen"])
    attention.use(model)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((kwargs["attention_mask"], kwargs["layout"])), with_kwargs=True
        )
    inputs = batches.pack([row.prompt for row in rows_of(3, "answer")], len(PREFIX), pad_id=2)
    model(**inputs)
    assert len(seen) == 2 and all(mask is inputs["attention_mask"] for mask, _ in seen)
    assert all(layout is inputs["layout"] for _, layout in seen)


def test_one_graph_serves_packs_of_every_size(models):
    """The numbers of a layout are variables of torch.compile's graphs; as constants, each batch would be compiled."""
    model, compiled, graphs = make(models["llama"]).eval(), make(models["llama"]).eval(), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled.compile(dynamic=True, backend=backend)
    for prefix, count in ((9, 4), (21, 3), (14, 5), (30, 2)):
        prompts = [PREFIX[:prefix] + list(range(60, 64 + 3 * i)) for i in range(count)]
        batch = batches.collate_answers([(AnswerRow(ids, [7, 2]), True) for ids in prompts], 2, "on")
        assert batch.layout == Layout(count, prefix + 3)
        with torch.no_grad():
            torch.testing.assert_close(
                target_logits(compiled, batch), target_logits(model, batch), atol=1e-4, rtol=1e-4
            )
    torch.compiler.reset()
    assert len(graphs) == 1


def test_the_worked_example_of_the_docstring():
    """`A B C D E` and `A B C F` in one sequence, and what each token sees."""
    example = batches.pack([[1, 2, 3, 4, 5], [1, 2, 3, 6]], 3, pad_id=0)
    assert example["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0, 6]]
    assert example["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 3]]
    assert example["attention_mask"].int().tolist() == [
        [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]],
        [[[1, 1, 1, 0, 0], [1, 1, 1, 0, 1]]],
    ]
    assert example["layout"] == Layout(rows=2, prefix=3)
