"""Runs become folders that transformers or this trainer reads, and come back bit for bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import train_runs
from helpers.models import SMALL
from helpers.pretrained import MODELS, NAMES, expected, logits_of
from helpers.saved_run import save_untrained

from nsa_jax import RopeScaling
from nsa_jax.testing import normwise_error
from train.__main__ import main
from train.checkpoints.saved import load_model
from train.config import DataConfig, MoEConfig, OptimizerConfig, TrainConfig
from train.data import chat
from train.data.bpe import byte_tokenizer
from train.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from train.pretrained import chat_template
from train.pretrained.families import family_of


def assert_same_bits(actual, wanted):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def there_and_back(run, folder, *options):
    """Exports a run, imports what was written, and returns both models."""
    assert main(["export", "--run", str(run), "--out", str(folder / "exported"), *options]) == 0
    assert main(["import", str(folder / "exported"), "--out", str(folder / "again")]) == 0
    return load_model(run), load_model(folder / "again")


@pytest.mark.parametrize("name", NAMES)
def test_a_family_comes_back_bit_for_bit(name, tmp_path, capsys):
    assert main(["import", str(MODELS / name), "--out", str(tmp_path / "run")]) == 0
    before, after = there_and_back(tmp_path / "run", tmp_path)
    assert_same_bits(after.params, before.params)
    assert after.config.model == before.config.model
    assert after.tokenizer.definition == before.tokenizer.definition
    assert chat_template.load(tmp_path / "again") == chat_template.load(tmp_path / "run")
    wanted = json.loads((MODELS / name / "config.json").read_text())
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    rope = {"rope_type": "default"} | wanted.pop("rope_parameters")
    assert written["rope_parameters"] == rope
    same = {"architectures", "model_type", "hidden_size", "head_dim", "tie_word_embeddings", "sliding_window"}
    same |= {"max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "hidden_act"}
    for field in same & wanted.keys() - {"sliding_window" if wanted.get("sliding_window") is None else ""}:
        assert written[field] == wanted[field], field
    assert f"transformers' {wanted['architectures'][0]}" in capsys.readouterr().out


def test_weights_that_were_stored_in_16_bits_can_be_again(tmp_path):
    assert main(["import", str(MODELS / "qwen3"), "--out", str(tmp_path / "run")]) == 0
    before, after = there_and_back(tmp_path / "run", tmp_path, "--dtype", "bfloat16")
    assert_same_bits(after.params, before.params)
    assert (tmp_path / "exported" / "model.safetensors").stat().st_size < 90_000
    logits = logits_of(after.config.model, after.params, 288, (wanted := expected("qwen3"))["tokens"])
    assert normwise_error(logits, wanted["logits"]) < 1e-5


OTHERS = {
    "nsa": SMALL,
    "a pattern with experts, untied": dataclasses.replace(
        SMALL,
        num_layers=4,
        pattern=("nsa", "full"),
        moe=MoEConfig(num_routed=2, expert_dim=8, first_dense=2),
        tie_embeddings=False,
    ),
    "the paper's layout": dataclasses.replace(SMALL, compression="mlp", share_kv=False, qkv_bias=True),
}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id=name, marks=pytest.mark.exhaustive if "paper" in name else ())
        for name, model in OTHERS.items()
    ],
)
def test_a_model_that_transformers_does_not_know_comes_back_bit_for_bit(model, tmp_path, capsys):
    train_runs.write_corpus(tmp_path / "corpus")
    data = DataConfig(path=str(tmp_path / "corpus"), sequence_length=64, batch_size=8)
    save_untrained(TrainConfig(model, data, OptimizerConfig(warmup_steps=0), run_dir=tmp_path / "run"))
    before, after = there_and_back(tmp_path / "run", tmp_path)
    assert_same_bits(after.params, before.params)
    assert after.config.model == before.config.model
    assert after.config.data.sequence_length == 64
    assert (after.tokenizer.vocab_size, after.tokenizer.eos_id, after.tokenizer.pad_id) == (258, 256, 257)
    assert "this trainer's own format, because no family that transformers knows has" in capsys.readouterr().out
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    config["model"]["embed_dim"], config["model"]["more"] = "wide", 1
    (tmp_path / "exported" / "config.json").write_text(json.dumps(config))
    assert main(["import", str(tmp_path / "exported"), "--out", str(tmp_path / "damaged")]) == 2
    assert "model: expected the settings of a model, but unknown setting model.more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"rope_scaling": RopeScaling("yarn", 2.0, 64)}, "model.rope_scaling.kind = yarn"),
        ({"attention": "nsa"}, "attention = nsa"),
        ({"num_layers": 2, "pattern": ("full", "window")}, "attention = full+window"),
        ({"v_head_dim": 16}, "model.v_head_dim = 16"),
        ({"moe": MoEConfig(num_routed=4)}, "model.moe.num_routed = 4"),
        ({"qk_norm": True, "norm_eps": 1e-5}, "model.qk_norm with model.norm_eps = 1e-05"),
        ({"qk_norm": True, "qkv_bias": True}, "model.qkv_bias = True and model.qk_norm = True"),
        ({"qk_norm": True, "attention": "window"}, "model.qk_norm = True with attention = window"),
    ],
)
def test_the_export_says_what_no_family_has(change, reason):
    family, found = family_of(dataclasses.replace(SMALL, **{"attention": "full", **change}))
    assert (family is None) == bool(reason)
    assert reason in found


def test_the_byte_tokenizer_has_the_same_ids_as_a_file():
    file, own = HuggingFaceTokenizer(byte_tokenizer(), "bytes"), ByteTokenizer()
    text = "def f(x):\n\treturn 'naïve 東京 <|endoftext|>\x00\x7f'"
    assert file.encode(text).tolist() == own.encode(text).tolist()
    assert file.decode(own.encode(text)) == text
    assert file.token_bytes.tolist() == own.token_bytes.tolist()
    assert (file.vocab_size, file.bos_id, file.eos_id, file.pad_id) == (258, 256, 256, 257)


def test_a_model_trained_on_conversations_takes_the_trainers_template_along(tmp_path):
    assert main(["import", str(MODELS / "smollm2"), "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / chat_template.FILE).unlink()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["format"] = "sharegpt"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    before, after = there_and_back(tmp_path / "run", tmp_path)
    talk = [chat.Message("system", "be brief"), chat.Message("user", "a  'b'\n"), chat.Message("assistant", "c")]
    template = chat_template.load(tmp_path / "again")
    assert template.eos_token == "<|im_end|>"
    # Parts are tokenized by themselves in training, and all in one here.
    own = chat.encode_prompt(talk, before.tokenizer, before.config.data)
    assert after.tokenizer.decode(template.encode_prompt(talk, after.tokenizer)) == before.tokenizer.decode(own)
    assert template.encode_prompt(talk, after.tokenizer)[:2] == own[:2]
