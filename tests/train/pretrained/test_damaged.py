"""Files that are damaged, or of models that this one cannot be, are refused; the error names what is wrong."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers.damaged_files import flipped, overwritten, truncated, zeroed
from helpers.gguf_files import write_gguf
from helpers.pretrained import MODELS, parameters_of
from safetensors.numpy import load_file, save_file

from train.__main__ import main
from train.pretrained.read import read


@pytest.fixture
def folder(tmp_path):
    """A copy of a model, which a test may damage."""
    return lambda name: shutil.copytree(MODELS / name, tmp_path / name)


def load(source):
    return parameters_of(read(source))


def change_json(file, **changes):
    """Replaces fields; those that are ... are removed."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama2",
            {"model_type": "gemma"},
            "model_type = 'gemma': expected one of llama, mistral, qwen2, qwen3, nsa-jax",
        ),
        ("llama2", {"model_type": ...}, "model_type is missing: expected some text"),
        ("llama2", {"hidden_act": "gelu"}, "hidden_act = 'gelu': expected 'silu'"),
        ("llama2", {"attention_bias": True}, "attention_bias = True: expected False"),
        ("llama2", {"mlp_bias": True}, "mlp_bias = True: expected False"),
        (
            "llama2",
            {"quantization_config": {"bits": 4}},
            "quantization_config = {'bits': 4}: expected weights that are",
        ),
        ("llama2", {"hidden_size": "32"}, "hidden_size = '32': expected a positive integer"),
        ("llama2", {"hidden_size": 34, "head_dim": None}, "head_dim is missing: expected it, because num_attention"),
        ("llama2", {"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a positive integer"),
        (
            "llama2",
            {"num_key_value_heads": 3},
            "num_key_value_heads = 3: expected a divisor of num_attention_heads = 4",
        ),
        ("llama2", {"head_dim": 7}, "head_dim = 7: expected an even number"),
        ("llama2", {"rms_norm_eps": -1}, "rms_norm_eps = -1: expected a positive number"),
        ("llama2", {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': expected true or false"),
        ("llama2", {"rope_parameters": [1]}, "rope_parameters = [1]: expected a group of fields"),
        (
            "llama2",
            {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling.type = 'yarn': expected default, linear or llama3",
        ),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "original_max_position_embeddings is miss",
        ),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True: expected False"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "expected full_attention in every layer"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "expected sliding_attention in every layer, because slid"),
        ("qwen3", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05: expected 1e-06, which the model's norm of queries"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: expected 1"),
        (
            "llama2",
            {"num_hidden_layers": 3},
            "tensor model.layers.2.input_layernorm.weight is missing: expected one of",
        ),
        ("llama2", {"num_hidden_layers": 1}, "expected no such tensor in this kind of model"),
        ("llama2", {"intermediate_size": 49}, "mlp.gate_proj.weight has shape (48, 32): expected (49, 32)"),
        ("qwen2", {"model_type": "llama"}, "proj.bias of shape (16,): expected no such tensor in this kind"),
        (
            "smollm2",
            {"tie_word_embeddings": False},
            "tensor lm_head.weight is missing: expected one of shape (any, 32)",
        ),
    ],
)
def test_a_model_that_this_one_cannot_be_is_refused(folder, name, changes, message):
    where = folder(name)
    change_json(where / "config.json", **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load(where)
    assert str(where) in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count = 8: expected 0"),
        ({"rope.scaling.type": 3}, "llama.rope.scaling.type = 3: expected 'none' or 'linear'"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count = 4: expected 8, the size of the heads"),
        ({"attention.value_length": 4}, "llama.attention.value_length = 4: expected 8, the size of the heads"),
        ({"block_count": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"block_count": None}, "llama.block_count is missing: expected a positive integer"),
        ({"feed_forward_length": 49}, "mlp.gate_proj.weight has shape (48, 32): expected (49, 32)"),
        ({"architecture": "gemma"}, "general.architecture = 'gemma': expected one of llama, qwen2, qwen3"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre = 'tekken': expected one of gpt-2, smollm, llama-bpe, qwen2"),
        ({"model": "bert"}, "tokenizer.ggml.model = 'bert': expected one of gpt2, llama"),
        ({"merges": ["a"]}, "tokenizer.ggml.merges holds 'a': expected two tokens that make one"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries: expected 288, one for each token"),
        ({"eos_token_id": 400}, "tokenizer.ggml.eos_token_id = 400: expected 0 to 287, the tokens of the tokenizer"),
        ({"split.count": 2}, "split.count = 2: expected 0 or 1; llama-gguf-split --merge makes one file"),
    ],
)
def test_a_gguf_file_that_this_model_cannot_be_is_refused(tmp_path, monkeypatch, changes, message):
    import gguf

    file = tmp_path / "model.gguf"
    outer = {"architecture": "general.architecture", "split.count": "split.count"}
    outer |= {name: f"tokenizer.ggml.{name}" for name in ("pre", "model", "merges", "token_type", "eos_token_id")}
    write_gguf(MODELS / "smollm2", file, **{name: value for name, value in changes.items() if name not in outer})
    actual = gguf.GGUFReader

    class Changed(actual):
        """A reader that finds something else in some fields."""

        def __init__(self, path):
            super().__init__(path)
            for name, value in changes.items():
                if name in outer:
                    found = type("Field", (), {"contents": lambda self, value=value: value})()
                    self.fields[outer[name]] = found

    monkeypatch.setattr(gguf, "GGUFReader", Changed)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load(file)
    assert str(file) in str(raised.value)


def test_a_type_that_cannot_be_dequantised_is_refused(tmp_path, monkeypatch):
    import gguf

    def dequantize(data, kind):
        raise NotImplementedError

    write_gguf(MODELS / "smollm2", tmp_path / "model.gguf")
    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    with pytest.raises(
        ValueError, match=r"model.gguf: tensor blk.0.attn_norm.weight is F32: expected a type that gguf"
    ):
        load(tmp_path / "model.gguf")


def test_llama_3s_frequencies_are_refused_where_they_are_no_such(tmp_path, monkeypatch):
    import helpers.gguf_files as writer

    monkeypatch.setattr(writer, "_llama3_factors", lambda rope, D: np.linspace(1, 8, D // 2, dtype=np.float32))
    write_gguf(MODELS / "llama3", tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"tensor rope_freqs.weight = \[1.0, 2.0.*expected the factors of Llama 3.1"):
        load(tmp_path / "model.gguf")


def test_what_is_missing_or_no_number_is_named(folder):
    where = folder("llama2")
    index = where / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    first = files["model.embed_tokens.weight"]
    for changed, message in (
        (
            {**files, "model.norm.weight": "../other.safetensors"},
            "model.norm.weight = '../other.safetensors': expected",
        ),
        ({**files, "more": first}, "tensor more is missing: expected it by"),
        ({}, "weight_map = {}: expected the file of each tensor by its name"),
    ):
        change_json(index, weight_map=changed)
        with pytest.raises(ValueError, match=re.escape(message)):
            load(where)
    change_json(index, weight_map=files)
    tensors = load_file(where / first)
    for array, message in (
        (
            np.full((288, 32), np.nan, np.float16),
            "model.embed_tokens.weight has NaN or infinite numbers: expected finite",
        ),
        (np.zeros((288, 32), np.int8), "model.embed_tokens.weight is I8: expected one of F32, F16, BF16"),
        (
            np.zeros((200, 32), np.float16),
            "model.embed_tokens.weight has 200 rows: expected at least 288, one for each",
        ),
    ):
        save_file({**tensors, "model.embed_tokens.weight": array}, where / first)
        with pytest.raises(ValueError, match=re.escape(message)):
            load(where)
    for file, message in (
        ("tokenizer.json", "tokenizer.json is missing: expected a tokenizers JSON file"),
        (first, f"{first}: expected a safetensors file, but"),
        ("config.json", "config.json is missing: expected a JSON object"),
    ):
        (where / file).unlink()
        with pytest.raises(ValueError, match=re.escape(message)):
            load(where)
    shutil.copy(MODELS / "llama2" / "config.json", where)
    index.unlink()
    (where / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"expected model.safetensors or .*; pytorch_model.bin cannot be read"):
        load(where)
    (where / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json holds list: expected a JSON object"):
        load(where)


@pytest.mark.parametrize("kind", ["model.safetensors", "config.json", "tokenizer.json", "model.gguf"])
def test_random_damage_is_refused_or_changes_numbers_only(folder, tmp_path, kind):
    where = folder("smollm2")
    if kind == "model.gguf":
        where = tmp_path / kind
        write_gguf(MODELS / "smollm2", where)
    file = where if kind == "model.gguf" else where / kind
    data, rng = file.read_bytes(), np.random.default_rng(0)
    wanted, errors = load(where), []
    for number in range(24):
        damage = (truncated, flipped, overwritten, zeroed)[number % 4]
        file.write_bytes(damage(data, rng))
        try:
            found = load(where)
        except ValueError as error:
            errors.append(str(error))
        else:
            assert set(found) <= {*wanted, "output_kernel"}
    assert [message for message in errors if str(where) not in message] == []
    assert len(errors) >= 6, "what is cut off must not be read"


def test_import_refuses_what_it_cannot_read_and_leaves_nothing(tmp_path, folder, capsys):
    where, run = folder("smollm2"), tmp_path / "run"
    change_json(where / "config.json", hidden_act="relu")
    assert main(["import", str(where), "--out", str(run)]) == 2
    assert "hidden_act = 'relu': expected 'silu'" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none"), "--out", str(run)]) == 2
    assert "expected a Hugging Face folder or a GGUF file, and there is nothing. A model" in capsys.readouterr().err
    assert main(["import", str(where / "model.safetensors"), "--out", str(run)]) == 2
    assert "model.safetensors: expected the folder around it, with config.json" in capsys.readouterr().err
    assert not run.exists()
    assert main(["import", str(where), "--out", str(where)]) == 2
    assert f"out = {where}: expected a folder that is empty or not there yet" in capsys.readouterr().err
