"""Every family: its numbers are those of transformers, from folders, from GGUF files and from runs."""

import dataclasses
import json
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gguf_files import write_gguf
from helpers.pretrained import MODELS, NAMES, expected, logits_of, parameters_of

from nsa_jax.testing import normwise_error
from train.__main__ import main
from train.checkpoints.saved import load_model
from train.config import DataConfig, TrainConfig
from train.data.chat import Message
from train.generation.generator import generate
from train.generation.sampling import Sampling
from train.pretrained import chat_template
from train.pretrained.read import read
from train.pretrained.run import tokenizer_of

TEXTS = [
    "def f(x): return 12345 + x  # it's\n\n\n  naïve 東京, the numbers",
    " the <s> </s> <|im_start|>user",
    "that\tthe  tokens'll\r\n",
]


def assert_same(actual, wanted):
    jax.tree.map(np.testing.assert_array_equal, actual, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    pretrained, wanted = read(MODELS / name), expected(name)
    vocab_size = wanted["logits"].shape[-1]
    actual = logits_of(pretrained.config, parameters_of(pretrained), vocab_size, wanted["tokens"])
    assert normwise_error(actual, wanted["logits"]) < 1e-5
    assert np.abs(actual - wanted["logits"]).max() < 1e-4 * np.abs(wanted["logits"]).max()


@pytest.mark.parametrize("name", NAMES)
def test_gguf_and_safetensors_hold_the_same_model(name, tmp_path):
    folder = read(MODELS / name)
    write_gguf(MODELS / name, tmp_path / "model.gguf")
    file = read(tmp_path / "model.gguf")
    assert (file.config, file.context_length) == (folder.config, folder.context_length)
    assert file.chat_template == folder.chat_template
    assert_same(parameters_of(file), parameters_of(folder))
    one, other = tokenizer_of(file), tokenizer_of(folder)
    assert (one.vocab_size, one.bos_id, one.eos_id) == (other.vocab_size, other.bos_id, other.eos_id)
    for text in TEXTS:
        ids = other.encode(text)
        assert one.encode(text).tolist() == ids.tolist()
        assert one.encode_markup(text).tolist() == other.encode_markup(text).tolist()
        assert one.decode(ids) == other.decode(ids)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_quantised_files_hold_what_gguf_dequantises(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    write_gguf(MODELS / "qwen3", tmp_path / "model.gguf", kind)
    actual, exact = parameters_of(read(tmp_path / "model.gguf")), parameters_of(read(MODELS / "qwen3"))

    def rounded(matrix):
        return gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)

    E = 32
    queries = rounded(np.asarray(exact["layers"]["attention"]["q_kernel"][1]).reshape(E, -1).T.copy())
    np.testing.assert_array_equal(actual["layers"]["attention"]["q_kernel"][1].reshape(E, -1), queries.T)
    np.testing.assert_array_equal(actual["embedding"][:288], rounded(np.asarray(exact["embedding"][:288])))
    assert_same(actual["layers"]["attention"]["k_norm_scale"], exact["layers"]["attention"]["k_norm_scale"])


@pytest.mark.parametrize("name", ["smollm2", "llama2", "mistral"])
def test_a_conversation_is_written_down_as_transformers_does(name):
    pretrained = read(MODELS / name)
    talk = [Message("user", "The sum of\nnumbers?"), Message("assistant", "12 "), Message("user", " and more")]
    template, tokenizer = pretrained.chat_template, tokenizer_of(pretrained)
    assert template.encode_prompt(talk, tokenizer) == expected(name)["prompt"].tolist()
    with pytest.raises(ValueError, match=r"prompt has '(</s>|<\|im_end\|>)': expected text without"):
        template.encode_prompt([Message("user", f"end it {template.eos_token}")], tokenizer)


def test_a_template_that_refuses_a_conversation_says_why(tmp_path):
    template = read(MODELS / "mistral").chat_template
    refusing = template.__class__("{{ raise_exception('no system') }}", "<s>", "</s>")
    for wrong in (refusing, template.__class__("{% for %}", None, None)):
        with pytest.raises(ValueError, match="the model's chat template does not take this conversation: "):
            wrong.render([Message("system", "a")])


@pytest.mark.parametrize(
    ("name", "template"), [("qwen2", "its own"), ("llama3", "none: generate --chat writes the trainer's")]
)
def test_an_import_is_a_run_that_generates_as_the_whole_model_would(name, template, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["import", str(MODELS / name), "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "2 layers of 32, 64 tokens of context" in printed
    assert f"chat template: {template}" in printed
    shutil.move(run, tmp_path / "moved")
    saved = load_model(tmp_path / "moved")
    assert_same(saved.params, parameters_of(read(MODELS / name)))
    tokens = [saved.tokenizer.bos_id, *saved.tokenizer.encode("the numbers").tolist()]
    text = generate(saved.params, saved.model, saved.tokenizer, "the numbers", Sampling(temperature=0.0, max_tokens=4))
    for _ in range(4):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        scores = logits_of(saved.config.model, saved.params, saved.tokenizer.vocab_size, padded)
        tokens.append(int(np.argmax(scores[0, len(tokens) - 1])))
    assert "the numbers" + saved.tokenizer.decode(tokens[-4:]) == text


def test_an_import_talks_by_its_own_template(tmp_path, capsys):
    assert main(["import", str(MODELS / "smollm2"), "--out", str(tmp_path / "run")]) == 0
    talk = ["--chat", "--prompt", "a", "b", "--max-tokens", "2"]
    capsys.readouterr()
    assert main(["generate", "--run", str(tmp_path / "run"), *talk]) == 0
    assert capsys.readouterr().out.startswith("> a\n")
    settings = json.loads((tmp_path / "run" / "chat_template.json").read_text())
    settings["template"] = "{{ raise_exception('not today') }}"
    (tmp_path / "run" / "chat_template.json").write_text(json.dumps(settings))
    assert main(["generate", "--run", str(tmp_path / "run"), *talk]) == 2
    assert "not today" in capsys.readouterr().err
    (tmp_path / "run" / "chat_template.json").write_text("[]")
    assert main(["generate", "--run", str(tmp_path / "run"), *talk]) == 2
    assert "chat_template.json: expected a chat template as import wrote it" in capsys.readouterr().err


def test_a_run_that_learns_no_conversations_keeps_the_template_that_it_starts_from(tmp_path):
    template = read(MODELS / "smollm2").chat_template
    (tmp_path / "old").mkdir()
    chat_template.save(template, tmp_path / "old")
    for number, (data_format, kept) in enumerate([("auto", template), ("sharegpt", None)]):
        run = tmp_path / str(number)
        run.mkdir()
        config = TrainConfig(data=DataConfig(format=data_format), run_dir=run)
        chat_template.inherit(config)
        assert chat_template.load(run) is None
        chat_template.inherit(dataclasses.replace(config, init_from=tmp_path / "old"))
        assert chat_template.load(run) == kept
    chat_template.inherit(TrainConfig(run_dir=tmp_path / "old", init_from=tmp_path / "gone"))


def test_rows_beyond_the_tokenizers_tokens_are_cut_off_and_tied_copies_are_taken_once(tmp_path):
    """As in files of Qwen, whose embedding has more rows, and in some that hold a tied output layer too."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(MODELS / "smollm2", tmp_path / "more")
    tensors = load_file(tmp_path / "more" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    longer = np.concatenate([embedding, np.full((100, 32), 7, np.float32)])
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = longer
    save_file(tensors, tmp_path / "more" / "model.safetensors")
    found = parameters_of(read(tmp_path / "more"))["embedding"]
    np.testing.assert_array_equal(found[:288], embedding)
    assert found.shape == (320, 32)
    assert (found[288:] == 7).all()
    assert jnp.all(parameters_of(read(MODELS / "smollm2"))["embedding"][288:] == 0)
    tensors["lm_head.weight"] = longer + 1
    save_file(tensors, tmp_path / "more" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight: expected model.embed_tokens.weight again, or none"):
        parameters_of(read(tmp_path / "more"))
