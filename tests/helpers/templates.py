"""Chat templates of several families, and small tokenizers that go with them."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from helpers import ROOT

FOLDER = ROOT / "tests" / "templates"
FAMILIES = {  # template file -> bos, eos and the token that ends an answer
    "chatml": (None, "<|endoftext|>", "<|im_end|>"),
    "qwen": (None, "<|im_end|>", "<|im_end|>"),
    "qwen3": (None, "<|im_end|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>", "</s>"),
    "gemma": ("<bos>", "<eos>", "<end_of_turn>"),
}
SPECIAL = ["<unk>", "<s>", "</s>", "<bos>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<|assistant|>"]
PLAIN = ["<think>", "</think>"]  # added tokens that are not special, as Qwen3's
CORPUS = ["user", "assistant", "system", "model", "Be brief", "Be helpful", "Hi", "Hello", "Bye", "Ciao", "\n\n"]
CORPUS += ["[INST] Hi Bye [/INST] Hello Ciao"]
LLAMA_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ("bytes", "replaced spaces", "first space", "space in front")


def build(kind: str, family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the family, with pad == eos; the kinds differ in how they treat spaces."""
    bos, eos, _ = FAMILIES[family]
    if kind == "bytes":  # GPT-2's
        tokenizer = Tokenizer(token_models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        if family == "llama3":  # a line break never joins what follows
            split = pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        trainer = trainers.BpeTrainer(
            vocab_size=480, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:  # Gemma's, and Llama's with a space in front of a text, or of whatever follows a special token
        tokenizer = Tokenizer(token_models.BPE(unk_token="<unk>", byte_fallback=True))
        if kind == "first space":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        else:
            front = [normalizers.Prepend("▁")] * (kind == "space in front")
            tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
            tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIAL + [f"<0x{i:02X}>" for i in range(256)])
    tokenizer.train_from_iterator(CORPUS * 9, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    if bos:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
    names = {"bos_token": bos} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, unk_token="<unk>", **names)
    fast.chat_template = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    return fast
