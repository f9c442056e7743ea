"""Small tokenizers made on the spot: real byte-level and SentencePiece-like BPE with a chat template, without a
download.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["hello world, what is 2+3? The answer is 5. Ärger über € und 你好 🎉 today"] * 20
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if open_reasoning %}<think>\n{% endif %}{% endif %}"
)


def byte_level(corpus: list[str] | None = None, vocab_size: int = 350) -> Tokenizer:
    """A GPT-2 like BPE over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus or CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """A Llama-like BPE over characters that writes spaces as U+2581 and rare bytes as <0xE2>."""
    alphabet = sorted({char for text in CORPUS for char in text.replace(" ", "▁")} - set("你好🎉"))
    vocab = {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *alphabet, "▁w", "▁wh", "he", "ll"]:
        vocab[token] = len(vocab)
    merges = [("▁", "w"), ("▁w", "h"), ("h", "e"), ("l", "l")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, markers: tuple[str, ...] = ("<think>", "</think>")) -> Path:
    """Writes a Hugging Face tokenizer folder with a chat template; `markers` become added, not special."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_tokens(list(markers))
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    return folder
