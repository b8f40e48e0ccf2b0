"""Loading, adapting, saving and reloading models: what was trained is what answers later, in any process."""

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from helpers import ROOT
from helpers.classifiers import LABELS, TEXTS, make, probabilities
from helpers.models import FAMILIES
from safetensors.torch import load_file, save_file
from torch import nn

import train_cls
from common.errors import InputError
from common.model import base_model, lora, storage
from common.model.classifier import Classifier
from common.model.token_losses import TokenLosses
from common.options import ModelConfig
from common.text.batches import collate_answers, collate_head
from common.text.prompts import AnswerRow, HeadRow
from common.train import loop

ENCODERS = ("bert", "distilbert")


def step(classifier: Classifier, config: train_cls.Config, updates: int = 2) -> None:
    """A few updates, large ones, so that every trained weight moves."""
    config.learning_rate = 0.05
    optimizer, prompt = loop.make_optimizer(classifier.model, config), classifier.prompt
    rows = [(prompt.prompt(text).ids, i % 3) for i, text in enumerate(TEXTS)]
    if classifier.head:
        batch = collate_head([(HeadRow(ids, k), True) for ids, k in rows], 2, encoder=classifier.encoder)
    else:
        batch = collate_answers([(AnswerRow(ids, prompt.answer([k])), True) for ids, k in rows], 2)
    model = classifier.model if classifier.head else TokenLosses(classifier.model)
    model.train()
    for _ in range(updates):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            loss = train_cls.loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    classifier.model.eval()
    assert loss.isfinite()


def named(model: nn.Module, part: str) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if part in name}


FRESH = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import torch
from pathlib import Path
from helpers.classifiers import probabilities
from common.model import base_model
from common.model import classifier
from common.model import lora
from common.model import storage

torch.manual_seed(12345)
torch.set_num_threads(int(sys.argv[4]))
found = {p.name: probabilities(storage.load_classifier(p, "cpu")) for p in sorted(Path(sys.argv[3]).iterdir())}
print("FOUND" + json.dumps(found))
"""


def test_fresh_process_gives_the_same_answers(models, encoders, tmp_path):
    """Heads, generative adapters, encoders and full fine-tuning, reloaded with another seed."""
    cases = {f"{family}-{approach}-nf4": (models[family], approach, {"load_in_4bit": True})
             for family in FAMILIES for approach in ("head", "generative")}  # fmt: skip
    cases |= {f"{family}-head": (encoders[family], "head", {}) for family in ENCODERS}
    full = {"full_finetuning": True, "load_in_4bit": None}
    cases |= {"llama-head-full": (models["llama"], "head", full), "gemma-full": (models["gemma"], "generative", full),
              "bert-full": (encoders["bert"], "head", full)}  # fmt: skip
    expected = {}
    for name, (path, approach, options) in cases.items():
        classifier, config = make(path, approach, **options)
        before = probabilities(classifier)
        step(classifier, config)
        storage.save_classifier(tmp_path / "saved" / name, classifier, config)
        expected[name] = probabilities(classifier)
        assert (torch.tensor(before) - torch.tensor(expected[name])).abs().max() > 1e-3
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    command = [sys.executable, script, ROOT, ROOT / "tests", tmp_path / "saved", str(torch.get_num_threads())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.partition("FOUND")[2])
    for name, rows in expected.items():
        for row, same in zip(rows, found[name], strict=True):
            assert same == pytest.approx(row, abs=1e-6), name


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS])
def test_adapter_without_its_head_is_refused(models, encoders, family, tmp_path):
    """By reloading, and by resuming; the same where a single weight of it is missing."""
    classifier, config = make({**models, **encoders}[family])
    storage.save_classifier(tmp_path / "whole", classifier, config)
    weights = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for key in [name for name in weights if "lora_" not in name] + [next(name for name in weights if "lora_B" in name)]:
        folder = tmp_path / "part"
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
        save_file({k: v for k, v in weights.items() if k != key}, folder / "adapter_model.safetensors")
        with pytest.raises(InputError, match=key):
            storage.load_classifier(folder)
        with pytest.raises(InputError, match=key):
            storage.load_weights(classifier.model, folder)
    storage.load_weights(classifier.model, tmp_path / "whole")


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_and_prompt_are_saved_beside_the_weights(models, family, tmp_path):
    """And a task.json whose labels were reordered no longer loads."""
    classifier, config = make(models[family])
    storage.save_classifier(tmp_path / "adapter", classifier, config)
    task = json.loads((tmp_path / "adapter" / "task.json").read_text())
    assert (task["labels"], task["multi_label"]) == (LABELS, False)
    again = storage.load_classifier(tmp_path / "adapter")
    assert again.prompt.labels == LABELS and not again.model.training
    assert again.model.model.config.id2label == dict(enumerate(LABELS))
    assert again.model.model.config.problem_type == "single_label_classification"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert all(part in card for part in (str(models[family]), *LABELS, "evaluate.py --run"))
    (tmp_path / "adapter" / "task.json").write_text(json.dumps({**task, "labels": LABELS[::-1]}))
    with pytest.raises(InputError, match="changed after training"):
        storage.load_classifier(tmp_path / "adapter")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_stays_a_float_linear_under_nf4(models, family, precision):
    """Trained, beside base layers that are 4-bit and frozen."""
    classifier, _ = make(models[family], load_in_4bit=True, mixed_precision=precision)
    base = classifier.model.model.get_base_model()
    score = base.score.modules_to_save["default"]
    assert type(score) is nn.Linear and score.weight.dtype is torch.float32 and score.weight.requires_grad
    quantized = base.model.layers[0].mlp.up_proj.base_layer
    assert type(quantized).__name__ == "Linear4bit" and not quantized.weight.requires_grad
    trained = {name for name, p in classifier.model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"model.base_model.model.score.modules_to_save.default.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_on_a_stored_quantized_model_stops_with_a_reason(models, family, tmp_path):
    """Its own settings would quantise the head as well."""
    shutil.copytree(models[family], tmp_path / "stored")
    file = tmp_path / "stored" / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    with pytest.raises(InputError, match="stored quantized.*Use the unquantized model"):
        make(tmp_path / "stored", load_in_4bit=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_reads_the_last_token_whatever_the_padding(models, family):
    """Alone, in a batch, padded with the end token, texts that end with one or two of those."""
    classifier, config = make(models[family])
    step(classifier, config)
    base = classifier.model.model.get_base_model()
    rows = [classifier.prompt.prompt(text).ids for text in TEXTS]
    assert all(ids[-1] == 2 for ids in rows) and len({len(ids) for ids in rows}) > 1
    rows += [[*rows[0], 2], rows[0][:-1], [*rows[0][:-1], 2, 2, 2]]
    for pad_id in (2, 3, 0):
        for size in (1, 3, len(rows)):
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                inputs = collate_head([(HeadRow(ids, 0), True) for ids in part], pad_id).inputs
                with torch.no_grad():
                    logits = classifier.model(**inputs)
                    for ids, row in zip(part, logits, strict=True):
                        hidden = base.model(torch.tensor([ids])).last_hidden_state[0, -1]
                        assert torch.allclose(row, base.score(hidden), atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_reads_the_same_text_whatever_the_padding(encoders, family):
    """The control models, alone and in a padded batch: positions count from the left."""
    classifier, config = make(encoders[family])
    step(classifier, config)
    rows = [(HeadRow(classifier.prompt.prompt(text).ids, 0), True) for text in TEXTS]
    with torch.no_grad():
        together = classifier.model(**collate_head(rows, 0, encoder=True).inputs)
        base = classifier.model.model.get_base_model()
        alone = torch.cat([base(torch.tensor([row.prompt])).logits for row, _ in rows])
    assert torch.allclose(together, alone, atol=1e-5) and together.std(0).min() > 1e-4


def test_positions_that_begin_after_the_padding_are_counted(tmp_path):
    """RoBERTa's first position is number 2 of its 34, so 32 tokens fit."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.RobertaConfig(vocab_size=20, max_position_embeddings=34, **shape)
    model = transformers.RobertaModel(config).eval()
    config.save_pretrained(tmp_path)
    options = ModelConfig(model=str(tmp_path))
    for tokens, fit in ((32, True), (33, False)):
        with contextlib.nullcontext() if fit else pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, tokens), 5))
        with contextlib.nullcontext() if fit else pytest.raises(InputError, match="longer than the 32 positions"):
            base_model.check_length(str(tmp_path), options, tokens, "--max_length")


@pytest.mark.parametrize("family", [*ENCODERS, *FAMILIES])
def test_every_module_that_the_base_lacks_is_trained_and_saved(models, encoders, family, tmp_path):
    """DistilBERT's pre_classifier, BERT's pooler, every head: changed by an update, and in the file."""
    expected = {"bert": {"bert.pooler.dense", "classifier"}, "distilbert": {"pre_classifier", "classifier"}}
    classifier, config = make({**models, **encoders}[family])
    before = {name: p.detach().clone() for name, p in named(classifier.model, "modules_to_save").items()}
    step(classifier, config)
    modules = {name.partition("base_model.model.")[2].partition(".modules_to_save")[0] for name in before}
    assert modules == expected.get(family, {"score"})
    for name, parameter in named(classifier.model, "modules_to_save").items():
        assert not torch.equal(parameter, before[name]), name
    storage.save_classifier(tmp_path / "adapter", classifier, config)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, parameter in named(classifier.model, "modules_to_save").items():
        assert torch.equal(saved[name.removeprefix("model.").replace("modules_to_save.default.", "")], parameter)
    assert probabilities(storage.load_classifier(tmp_path / "adapter")) == probabilities(classifier)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_neither_generates_nor_is_quantized(encoders, family):
    """Unset is unquantized; an explicit true, and a generative run, say why not."""
    _, config = make(encoders[family], load_in_4bit=None)
    assert config.load_in_4bit is False
    for options, reason in (
        ({"approach": "generative"}, "is an encoder and cannot write text: use train_cls.py with --approach head"),
        ({"load_in_4bit": True}, "unquantized: drop --load_in"),
        ({"load_in_8bit": True}, "unquantized: drop --load_in"),
    ):
        with pytest.raises(InputError, match=reason):
            make(encoders[family], **options)


@pytest.mark.parametrize("approach", ["generative", "head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_finetuning_trains_and_reloads_every_weight(models, family, approach, tmp_path):
    """A fp32 model that plain transformers loads as well; tied embeddings stay tied."""
    classifier, config = make(models[family], approach, full_finetuning=True, load_in_4bit=None)
    assert config.load_in_4bit is False
    before = {name: p.detach().clone() for name, p in classifier.model.named_parameters()}
    step(classifier, config)
    assert all(not torch.equal(p, before[name]) for name, p in classifier.model.named_parameters())
    storage.save_classifier(tmp_path / "model", classifier, config)
    again = storage.load_classifier(tmp_path / "model")
    assert probabilities(again) == probabilities(classifier)
    kind = "SequenceClassification" if approach == "head" else "CausalLM"
    plain = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "model")
    ours = again.model.model if approach == "head" else again.model
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    if approach == "generative":
        tied = ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
        assert tied == (family in ("gemma", "qwen"))
    other, _ = make(models[family], approach, full_finetuning=True, load_in_4bit=None)
    storage.load_weights(other.model, tmp_path / "model")
    assert probabilities(other) == probabilities(classifier)


@pytest.mark.parametrize("family", FAMILIES)
def test_census_counts_what_is_packed_in_4_bit(models, family):
    """As many weights as unquantized, each under its dtype; the untrained copy of a head is not in use."""
    counts = {}
    for bits in (True, False):
        model = make(models[family], load_in_4bit=bits)[0].model
        counts[bits] = census = base_model.census(model)
        assert census["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    used = [p.numel() for name, p in model.named_parameters() if "original_module" not in name]
    assert counts[True]["total"] == counts[False]["total"] == sum(used)
    groups = {(entry["group"], entry["dtype"]): entry["parameters"] for entry in counts[True]["groups"]}
    assert groups["base", "nf4"] == sum(
        module.base_layer.weight.numel() for module in model.modules() if hasattr(module, "lora_A")
    )
    assert groups["trained in full", "float32"] == len(LABELS) * 32
    assert {"LoRA", "base", "trained in full"} == {group for group, _ in groups}


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_weights_are_loaded_where_they_stay(models, family, monkeypatch):
    """Onto the device of the process that asks, whole, and nothing moves them afterwards."""
    config = train_cls.Config(model=str(models[family]), mixed_precision="no")
    base_model.resolve_options(config, encoder=False)
    asked = []

    def record(path: str, **options) -> None:
        asked.append(options["device_map"])
        raise OSError("enough")

    with monkeypatch.context() as patch, pytest.raises(InputError):
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
        base_model.load_base(config.model, config, device=torch.device("cuda", 1))
    assert asked == [{"": torch.device("cuda", 1)}]
    model, missing = base_model.load_base(config.model, config, device="cpu")
    packed = {name: p.data_ptr() for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    model = lora.add_lora(model, config, missing, head=False)
    placement = [not config.load_in_4bit, True]  # as the scripts have it
    model, _ = Accelerator(cpu=True).prepare(model, loop.make_optimizer(model, config), device_placement=placement)
    after = {p.data_ptr() for p in model.parameters() if hasattr(p, "quant_state")}
    assert packed and set(packed.values()) == after


def test_a_look_at_the_base_leaves_frozen_adapters_frozen(models):
    """PEFT makes them trainable; README's change for fewer adapted layers would get its backward pass back."""
    model = make(models["llama"], approach="generative")[0].model
    model.get_decoder().layers[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with lora.without_adapter(model):
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before and len(set(before.values())) == 2


@pytest.mark.parametrize("option", [
    {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "false"},
    {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
    {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["all-linear"]}, {"load_in_8bit": True},
    {"optim": "adamw_8bit"}, {"load_in_4bit": True, "use_dora": True}, {"mixed_precision": "bf16"},
    {"load_in_4bit": True, "mixed_precision": "bf16", "bnb_4bit_quant_type": "fp4"},
], ids=lambda option: "-".join(f"{name}={value}" for name, value in option.items()))  # fmt: skip
def test_options_take_a_step_and_reload(models, option, tmp_path):
    """Each trains its adapter and gives the same answers once reloaded."""
    for family in FAMILIES:
        for approach in ("generative", "head"):
            classifier, config = make(models[family], approach, **option)
            before = {name: p.detach().clone() for name, p in named(classifier.model, "lora_").items()}
            step(classifier, config)
            moved = {name: not torch.equal(p, before[name]) for name, p in named(classifier.model, "lora_").items()}
            assert all(moved.values())
            layers = 4 if option.get("target_modules") == ["q_proj", "v_proj"] else 14
            assert sum("lora_B" in name for name in moved) == layers
            folder = tmp_path / f"{family}-{approach}"
            storage.save_classifier(folder, classifier, config)
            again = storage.load_classifier(folder)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                for row, same in zip(probabilities(classifier), probabilities(again), strict=True):
                    assert same == pytest.approx(row, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}, {"full_finetuning": True}], ids=str)
def test_a_head_computes_in_fp32(models, options):
    """Its outputs under bf16 are those of its weights and the hidden states, not rounded again."""
    classifier, config = make(models["llama"], "head", mixed_precision="bf16", **options)
    step(classifier, config)
    base = storage.stored_model(classifier.model)
    score = (base if config.full_finetuning else base.get_base_model()).score
    seen = []
    score.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rows = [(HeadRow(classifier.prompt.prompt(text).ids, 0), True) for text in TEXTS]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = classifier.model(**collate_head(rows, 2).inputs)
    weight = score.weight if config.full_finetuning else score.modules_to_save.default.weight
    assert outputs.dtype == torch.float32 and not torch.equal(outputs, outputs.bfloat16().float())
    torch.testing.assert_close(outputs, seen[0].float() @ weight.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("approach", ["generative", "head"])
def test_upper_layers_alone_are_trained(models, encoders, approach, tmp_path):
    """--train_layers: an adapter in the last layer, no gradient below it, the same answers once reloaded."""
    for name, path in {**models, **(encoders if approach == "head" else {})}.items():
        classifier, config = make(path, approach, train_layers=1)
        step(classifier, config)
        layers = {part for weight in named(classifier.model, "lora_") for part in weight.split(".") if part.isdigit()}
        assert layers == {"1"}, name
        lower = named(classifier.model, ".0.")
        assert lower and not any(weight.requires_grad or weight.grad is not None for weight in lower.values())
        storage.save_classifier(tmp_path / name, classifier, config)
        for row, same in zip(*map(probabilities, (classifier, storage.load_classifier(tmp_path / name))), strict=True):
            assert same == pytest.approx(row, abs=1e-6)
    with pytest.raises(InputError, match="--train_layers 3: the model has 2 layers"):
        make(models["llama"], train_layers=3)
    with pytest.raises(InputError, match="lm_head: no linear layer in the upper 1 layers has this name"):
        make(models["llama"], train_layers=1, target_modules=["q_proj", "lm_head"])
    albert = transformers.AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, embedding_size=8)
    with pytest.raises(InputError, match="cannot be told apart: drop --train_layers"):
        lora.layer_stack(transformers.AlbertForSequenceClassification(albert))


def test_the_operations_of_a_token_are_counted_where_they_are_made(models):
    """A frozen weight below the adapters takes part in the forward pass alone."""
    every, upper = (make(models["llama"], "generative", train_layers=n)[0].model for n in (None, 1))
    lower = sum(p.numel() for p in named(every, ".layers.0.").values())
    adapters = sum(p.numel() for name, p in named(every, ".layers.0.").items() if "lora_" in name)
    difference = 2 * (lower - adapters) + 6 * adapters
    count = loop.flops_per_token(every)
    assert count - loop.flops_per_token(upper) == difference
    head, embeddings = every.get_output_embeddings(), every.get_input_embeddings()
    assert head.weight is not embeddings.weight
    head.weight = embeddings.weight  # tied or not, the same layers
    assert loop.flops_per_token(every) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_agree(models, family):
    """--attn_implementation reaches the model, and changes no answer."""
    found = [make(models[family], attn_implementation=name)[0] for name in ("eager", "sdpa")]
    assert [c.model.model.config._attn_implementation for c in found] == ["eager", "sdpa"]
    for row, same in zip(*map(probabilities, found), strict=True):
        assert same == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"target_modules": ["q_proj", "query"]}, "--target_modules query: .* there are .*k_proj.*q_proj"),
        ({"init_lora_weights": "eva"}, "--init_lora_weights eva: expected true, false, gaussian"),
        ({"init_lora_weights": "pissa", "load_in_4bit": True}, "pissa changes the weights of the base"),
        ({"init_lora_weights": "olora", "load_in_4bit": True}, "olora changes the weights of the base"),
        ({"attn_implementation": "flash"}, r"could not be loaded \(.*flash"),
    ],
)
def test_what_cannot_be_built_says_why(models, option, reason):
    """PEFT's and transformers' errors reach the user as one paragraph; a half-known list of modules is no list."""
    for family in FAMILIES:
        with pytest.raises(InputError, match=reason):
            make(models[family], **option)


def test_task_file_keeps_every_model_option(models, tmp_path):
    """What decides how a base is loaded is read back, for each family."""
    for family in FAMILIES:
        classifier, config = make(
            models[family], load_in_4bit=True, bnb_4bit_quant_type="fp4", attn_implementation="eager"
        )
        storage.save_classifier(tmp_path / family, classifier, config)
        options = json.loads((tmp_path / family / "task.json").read_text())["model_options"]
        names = [item.name for item in fields(base_model.ModelConfig) if item.name != "trust_remote_code"]
        assert options == {name: getattr(config, name) for name in names}
        again = storage.load_classifier(tmp_path / family).model.model.get_base_model()
        assert again.model.layers[0].mlp.up_proj.base_layer.weight.quant_type == "fp4"


def test_a_picture_tower_gets_no_adapter(models, tmp_path):
    """No text reaches it: such weights would learn nothing, and DDP would wait for their gradients."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["gemma"])
    tokenizer.save_pretrained(tmp_path)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": len(tokenizer) + 8, "num_key_value_heads": 1, "head_dim": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config=size | {"image_size": 28, "patch_size": 14})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    classifier, options = make(tmp_path, approach="generative")
    trained = named(classifier.model, "lora_")
    assert len(trained) == 2 * 7 * 2 and all("language_model.layers" in name for name in trained)
    before = probabilities(classifier)
    step(classifier, options)
    assert probabilities(classifier) != before
    full = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    lora.make_trainable(full, SimpleNamespace(full_finetuning=True, gradient_checkpointing=False), [])
    assert all(p.requires_grad != ("vision" in name or "projector" in name) for name, p in full.named_parameters())
    head = transformers.Gemma3ForSequenceClassification(config)
    assert {id(p) for p in head.score.parameters()}.isdisjoint(map(id, lora.outside_text(head)))
    reached = sum(p.numel() for name, p in full.named_parameters() if "language_model.layers" in name)
    assert 6 * reached <= loop.flops_per_token(full) < 6 * 1.1 * reached


def test_the_operations_of_the_experts_that_a_token_takes_are_counted(models):
    """Half of the experts' weights where two of four are taken."""
    shape = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    configs = (transformers.MixtralConfig(**shape, num_experts_per_tok=taken) for taken in (2, 4))
    two, four = map(transformers.MixtralForCausalLM, configs)
    experts = sum(p.numel() for name, p in two.named_parameters() if ".experts." in name)
    assert experts and loop.flops_per_token(four) - loop.flops_per_token(two) == 6 * experts / 2
