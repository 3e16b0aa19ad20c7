"""Makes the tiny models beside this file, with the logits that transformers gives for them.

They are random models of every family, each with the token ids of a conversation by its chat template. Run this where
PyTorch, transformers, accelerate, safetensors and gguf are installed:

    python tests/train/pretrained/make_models.py

It also checks `helpers.gguf_files.write_gguf`, with which the tests write GGUF files: transformers must read the same
model from such a file.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers.gguf_files import write_gguf

FOLDER = Path(__file__).parent / "models"
VOCABULARY, T = 288, 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "Be brief.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] +"
    " ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name: (config, dtype of the weights, kind of tokenizer, chat template)
MODELS = {
    "llama2": (
        transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=1000.0),
        torch.float16,
        "spm",
        INST,
    ),
    "llama3": (
        transformers.LlamaConfig(**SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
        torch.bfloat16,
        "llama-bpe",
        None,
    ),
    "mistral": (
        transformers.MistralConfig(**SIZES, sliding_window=11, tie_word_embeddings=False),
        torch.bfloat16,
        "spm",
        INST,
    ),
    "smollm2": (
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_theta=100_000.0),
        torch.float32,
        "smollm",
        CHATML,
    ),
    "qwen2": (
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=True, rope_theta=1_000_000.0),
        torch.bfloat16,
        "qwen2",
        CHATML,
    ),
    "qwen3": (
        transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False, rope_theta=1_000_000.0),
        torch.bfloat16,
        "qwen2",
        CHATML,
    ),
}
SPLIT = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    ),
}
TEXT = [
    "def the_sum(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n    return total\n",
    "Native sparse attention reads the blocks that matter, and the other tokens as means.\n" * 2,
    "In 2025, 1234567 tokens of naïve café and 東京 were read; it's what they'll see.\n",
]
TALK = [
    {"role": "user", "content": "The sum of\nnumbers?"},
    {"role": "assistant", "content": "12 "},
    {"role": "user", "content": " and more"},
]
SPECIAL = {
    "spm": ["<unk>", "<s>", "</s>"],
    "llama-bpe": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}


def make_tokenizer(kind):
    """A tokenizer like those of the family, of exactly VOCABULARY tokens."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "spm":
        # 256 bytes, three special tokens, the characters of the text, and merges of these.
        letters = sorted(set("".join(TEXT).replace(" ", "\u2581")) & set("abcdefghilmnorstu\u2581."))
        pieces = [*SPECIAL["spm"], *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
        pairs = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "a"), ("o", "r"), ("e", "n"), ("i", "n")]
        pairs += [("n", "u"), ("nu", "m"), ("num", "b")]
        merges = [pair for pair in pairs][: VOCABULARY - len(pieces)]
        pieces += [a + b for a, b in merges]
        pieces += [f"<unused{index}>" for index in range(VOCABULARY - len(pieces))]
        vocab = {piece: index for index, piece in enumerate(pieces)}
        bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        tokenizer = tokenizers.Tokenizer(bpe)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.add_special_tokens(SPECIAL["spm"])
        return tokenizer
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if kind == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        parts = [
            pre_tokenizers.Split(Regex(SPLIT[kind]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL[kind],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def make_model(name):
    """Writes the folder of a model, and its tokens and logits beside it."""
    config, dtype, kind, template = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter_name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
            parameter.copy_(parameter.to(dtype).float())  # what is stored is what the logits are of
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB" if name == "llama2" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer = make_tokenizer(kind)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    special = SPECIAL[kind]
    settings = {"bos_token": special[0], "eos_token": special[-1], "model_max_length": 64}
    settings |= {"bos_token": "<s>", "unk_token": "<unk>"} if kind == "spm" else {}
    settings |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    tokens = torch.randint(0, VOCABULARY, (1, T))
    expected = logits_of(folder, tokens)
    prompt = []
    if template is not None:
        read = transformers.AutoTokenizer.from_pretrained(folder)
        prompt = read.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    arrays = {"tokens": tokens.numpy().astype(np.int32), "logits": expected, "prompt": np.array(prompt, np.int32)}
    np.savez_compressed(folder / "expected.npz", **arrays)
    with tempfile.TemporaryDirectory() as there:
        write_gguf(folder, Path(there) / "model.gguf")
        read = transformers.AutoTokenizer.from_pretrained(there, gguf_file="model.gguf")
        for text in TEXT:
            assert tokenizer.encode(text, add_special_tokens=False).ids == read.encode(text, add_special_tokens=False)
        # From a GGUF file, transformers reads neither windows, nor Llama 3's frequencies, nor the size of heads.
        if name not in ("mistral", "llama3", "qwen3"):
            again = logits_of(Path(there), tokens, gguf_file="model.gguf")
            assert np.abs(again - expected).max() < 1e-4 * np.abs(expected).max(), name


def logits_of(folder, tokens, **options):
    """Float32 logits [1, T, V] as transformers computes them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    with torch.no_grad():
        return model(tokens).logits.numpy()


if __name__ == "__main__":
    for each in MODELS:
        make_model(each)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions) + "\n")
