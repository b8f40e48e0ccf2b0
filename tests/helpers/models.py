"""Tiny random models with a real tokenizer."""

from pathlib import Path

from helpers.rows import WORDS, toy_rows

FAMILIES = ("llama", "mistral", "gemma", "qwen")


def build_tokenizer(folder: Path, pad_is_eos: bool = True) -> None:
    """A byte-level BPE of a few hundred tokens, with BOS in front and, by default, pad == eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = (
        [row["text"] for row in toy_rows(40)] + list(WORDS) * 5 + ["Classify the text into and return the answer"] * 5
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>" if pad_is_eos else "<pad>",
    )
    fast.save_pretrained(folder)


def build_model(folder: Path, family: str, **changes) -> Path:
    """A two-layer random model of the family, saved with its tokenizer, as --model takes it."""
    import torch
    import transformers

    shape = {
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": family in ("gemma", "qwen"),
        **changes,
    }
    kind = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "gemma": transformers.GemmaConfig,
        "qwen": transformers.Qwen2Config,
    }[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**shape))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual start, so that logits differ clearly
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    build_tokenizer(folder)
    return folder


def build_encoder(folder: Path, family: str) -> Path:
    """A tiny random BERT or DistilBERT, stored without a classification head."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    else:
        config = transformers.DistilBertConfig(vocab_size=200, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    words = sorted({word for row in toy_rows(40) for word in row["text"].split()} | {"."})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder
