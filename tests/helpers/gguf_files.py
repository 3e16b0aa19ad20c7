"""GGUF files of the tiny models, as llama.cpp's converter writes them."""

import json
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401, NumPy's bfloat16
import numpy as np
from safetensors import safe_open

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PRE = {"llama3": "llama-bpe", "smollm2": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


def write_gguf(folder: Path, path: Path, quantization: gguf.GGMLQuantizationType | None = None, **fields):
    """Writes a Hugging Face folder as GGUF; matrices in float32, or quantised where they can be.

    `fields` replace settings by their names without the architecture's; one that is None is left out.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    D = config.get("head_dim") or config["hidden_size"] // H
    rope = config["rope_parameters"]
    settings = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": H,
        "attention.head_count_kv": K,
        "attention.key_length": D,
        "attention.value_length": D,
        "rope.dimension_count": D,
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    } | fields
    if config["model_type"] == "mistral":
        settings["attention.sliding_window"] = config["sliding_window"]
    for name, value in settings.items():
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{name}", value)
    _add_tokenizer(writer, folder)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, D))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                array = np.asarray(tensors.get_tensor(name), np.float32)
                heads = {"q_proj": H, "k_proj": K}.get(name.split(".")[-2])
                if architecture == "llama" and heads:
                    array = array.reshape(heads, 2, D // 2, -1).swapaxes(1, 2).reshape(array.shape)
                # Blocks of 32 numbers of a row are quantised together.
                if quantization is None or array.ndim == 1 or array.shape[-1] % 32:
                    writer.add_tensor(_name(name), array)
                else:
                    quantised = gguf.quants.quantize(array, quantization)
                    writer.add_tensor(_name(name), quantised, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def _llama3_factors(rope: dict, D: int) -> np.ndarray:
    """What divides each frequency, as the converter computes it."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for frequency in rope["rope_theta"] ** (-np.arange(0, D, 2) / D):
        wavelength = 2 * np.pi / frequency
        smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if wavelength < high else rope["factor"] if wavelength > low else between)
    return np.array(factors, np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    vocab = sorted(definition["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"]: token["id"] for token in definition["added_tokens"]}
    vocab += [(token, index) for token, index in special.items() if token not in dict(vocab)]
    tokens = [token for token, _ in sorted(vocab, key=lambda item: item[1])]
    kinds = [3 if token in special else 1 for token in tokens]
    if definition["model"].get("byte_fallback"):
        kinds = [6 if token.startswith("<0x") else kind for token, kind in zip(tokens, kinds, strict=True)]
        kinds[0] = 2
        merged = {"".join(pair): -float(rank) for rank, pair in enumerate(definition["model"]["merges"])}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([merged.get(token, -1e6) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(PRE[folder.name])
        writer.add_token_merges([" ".join(pair) for pair in definition["model"]["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokens.index(settings["bos_token"]))
    writer.add_eos_token_id(tokens.index(settings["eos_token"]))
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])
