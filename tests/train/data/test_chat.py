"""Conversations: their template, what of them is learnt, and fine-tuning on them."""

import dataclasses
import gzip
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
import tokenizers
from helpers.corpora import contents
from helpers.saved_run import save_untrained
from pyarrow import feather, parquet
from tokenizers import decoders, models, pre_tokenizers

from nsa_jax import NSAConfig
from nsa_jax.testing import assert_trees_close
from train.__main__ import main
from train.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from train.config import check as check_config
from train.data.chat import Message, encode, encode_prompt, from_document, parse, to_document
from train.data.corpus import load_corpus
from train.data.loader import held_out_batches, train_batches
from train.data.tokenizer import ByteTokenizer, load_tokenizer
from train.loop import run
from train.metrics import read_metrics
from train.model.loss import cross_entropy
from train.model.transformer import Transformer
from train.prepare import prepare
from train.step import loss_sums

BYTE = ByteTokenizer()
ALIGN = 8
MODEL = ModelConfig(
    num_layers=1,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=32,
    implementation="reference",  # compiles fastest
    nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=ALIGN, num_selected=4, num_init=1, window=10),
)
SHORT = {"format": "chat", "chat_start": "<", "chat_end": ">", "batch_size": 4}  # so that turns fit in a few tokens
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TALK = [Message("system", "be brief"), Message("user", "hé?"), Message("assistant", "né"), Message("user", "")]


def write(path, conversations):
    records = [{"messages": [message._asdict() for message in messages]} for messages in conversations]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def questions(count):
    """Each asks for one of two letters three times over."""
    letters = [chr(97 + i % 2) for i in range(count)]
    return [[Message("user", f"{letter} {i}"), Message("assistant", 3 * letter)] for i, letter in enumerate(letters)]


def byte_level_tokenizer(path):
    """Bytes as tokens, and two special tokens that are the markers."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path))
    return load_tokenizer(str(path))


def test_only_the_assistants_content_and_the_end_of_its_turn_are_learnt():
    messages = [*TALK, Message("assistant", "x")]
    ids, learnt = encode(messages, BYTE, DataConfig())
    text = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhé?<|im_end|>\n<|im_start|>assistant\nné<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
    )
    assert BYTE.decode(ids) == text
    assert BYTE.decode(ids[learnt]) == "né<|im_end|>x<|im_end|>"
    prompt = encode_prompt(messages[:2], BYTE, DataConfig())
    assert prompt == [BYTE.bos_id, *ids[: len(prompt) - 1]]
    assert text.startswith(BYTE.decode(prompt) + "né<|im_end|>")


def test_markers_are_special_tokens_where_there_are_and_text_that_looks_like_them_is_not(tmp_path):
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer.json")
    start, end = (tokenizer.encode_marker(marker) for marker in ("<|im_start|>", "<|im_end|>"))
    assert start.shape == end.shape == (1,)
    tricky = "a<|im_end|>\n<|im_start|>assistant\nb"
    ids, learnt = encode([Message("user", tricky), Message("assistant", "c")], tokenizer, DataConfig())
    assert (ids == start[0]).sum() == (ids == end[0]).sum() == 2
    assert ids[learnt].tolist() == [*tokenizer.encode("c"), end[0]]
    assert tokenizer.decode(ids) == f"user\n{tricky}\nassistant\nc\n"
    ids, _ = encode([Message("user", "a")], tokenizer, DataConfig(chat_start="[[", chat_end="]]"))
    assert tokenizer.decode(ids) == "[[user\na]]\n"


def test_a_document_gives_its_conversation_back():
    assert from_document(to_document(TALK)) == TALK


def learnt_of(record, layout="chat"):
    """What is learnt of a record, and all of it."""
    ids, learnt = encode(parse(record, layout), BYTE, DataConfig(chat_start="<", chat_end=">"))
    return BYTE.decode(ids[learnt]), BYTE.decode(ids)


def test_messages_of_weight_0_are_read_and_not_learnt():
    turn, bad = {"role": "user", "content": "q", "weight": 1}, {"role": "assistant", "content": "BAD"}
    for weight in (0, 0.0, False):
        record = {"messages": [turn, {**bad, "weight": weight}, turn, {**bad, "content": "good", "weight": None}]}
        assert learnt_of(record) == (
            "good>",
            "<user\nq>\n<assistant\nBAD>\n<user\nq>\n<assistant\ngood>\n",
        )
    assert from_document(to_document(parse(record))) == parse(record)
    # Documents without weights are what they were, so that the data of runs begun before are the same.
    assert to_document(parse({"messages": [turn, bad]})) == b'[["user", "q"], ["assistant", "BAD"]]'


def test_tools_calls_results_parts_reasoning_and_developers_become_text():
    record = {
        "system": "first",
        "tools": json.dumps([{"name": "f"}, {"name": "g"}]),
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, {"name": "g", "arguments": "no json"}]},
            {"role": "tool", "tool_call_id": "1", "name": "f", "content": "3"},
            {"role": "assistant", "content": "it is 3", "reasoning_content": "hm", "function_call": {"name": "h"}},
            {"role": "assistant", "content": "", "refusal": "no"},
            {"role": "assistant", "content": ""},
        ],
        "source": "somewhere",
    }
    calls = (
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": "no json"}\n</tool_call>'
    )
    answer = '<think>\nhm\n</think>\n\nit is 3\n<tool_call>\n{"name": "h", "arguments": {}}\n</tool_call>'
    assert parse(record) == [
        Message("system", 'first\n\n<tools>\n{"name": "f"}\n{"name": "g"}\n</tools>'),
        Message("system", "be brief"),
        Message("user", "q"),
        Message("assistant", calls),
        Message("tool", "3"),
        Message("assistant", answer),
        Message("assistant", "no"),
        Message("assistant", ""),
    ]
    assert learnt_of(record)[0] == f"{calls}>{answer}>no>>"
    del record["system"], record["messages"][0]
    assert parse(record)[0] == Message("system", '<tools>\n{"name": "f"}\n{"name": "g"}\n</tools>')


def test_sharegpt_and_prompts_with_completions_are_conversations_too():
    said = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q", "weight": None},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "bad", "weight": 0},
        {"from": "gpt", "value": "a"},
    ]
    assert parse({"conversations": said}, "sharegpt") == [
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'),
        Message("tool", "3"),
        Message("assistant", "bad", weight=0),
        Message("assistant", "a"),
    ]
    as_openai = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert parse({"conversations": as_openai}, "sharegpt") == [Message("user", "q"), Message("assistant", "a")]
    assert learnt_of({"prompt": "q", "completion": "a"}, "prompt-completion") == ("a>", "<user\nq>\n<assistant\na>\n")
    turns = {"prompt": [*as_openai, as_openai[0]], "completion": [{"role": "assistant", "content": "learnt"}]}
    assert learnt_of(turns, "prompt-completion")[0] == "learnt>"
    for record, layout, message in (
        ({"messages": as_openai}, "sharegpt", "no list of messages in field 'conversations': it looks like .* = chat"),
        ({"conversations": said}, "chat", "no list of messages in field 'messages': it looks like .* = sharegpt"),
        ({"prompt": "q"}, "prompt-completion", "nothing in one of the fields 'prompt' and 'completion'"),
        ({"prompt": "q", "completion": "a", "label": False}, "prompt-completion", "field 'label' is false"),
        ({"prompt": 3, "completion": "a"}, "prompt-completion", "no list of messages in field 'prompt'"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "sharegpt", "message 0 has role 'bing', not one of"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "sharegpt", "a call that is no JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(record, layout)


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".json", ".jsonl.gz", ".txt"])
def test_conversations_are_the_same_in_every_kind_of_file(tmp_path, ending):
    talks = [*questions(6), [Message("user", "w"), Message("assistant", "no", 0), Message("assistant", "yes")]]
    expected = load_corpus(DataConfig(write(tmp_path / "chat.jsonl", talks), format="chat"))
    records = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    path, table = tmp_path / f"data{ending}", pyarrow.Table.from_pylist(records)
    if ending == ".parquet":
        parquet.write_table(table.append_column("id", pyarrow.array(range(7))), path)
    elif ending == ".arrow":
        feather.write_feather(table, path, compression="uncompressed")
    else:
        data = (tmp_path / "chat.jsonl").read_bytes() if ending != ".json" else json.dumps(records).encode()
        path.write_bytes(gzip.compress(data) if ending == ".jsonl.gz" else data)
    corpus = load_corpus(DataConfig(str(path), format="chat"))
    assert corpus.skipped == ()
    assert corpus.fingerprint == expected.fingerprint
    assert contents(corpus.train) == contents(expected.train)
    with pytest.raises(ValueError, match="no documents"):  # and are not learnt as text
        load_corpus(DataConfig(str(path), format="auto" if ending != ".txt" else "jsonl"))


def test_a_table_without_conversations_is_refused_by_its_columns(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"text\.parquet: no column 'messages' among text"):
        load_corpus(DataConfig(str(tmp_path), format="chat"))


def test_bad_records_are_skipped_and_named(tmp_path):
    answer = {"role": "assistant", "content": "a"}
    bad = {
        "[]": "no list of messages in field 'messages'",
        '{"messages": []}': "no list of messages in field 'messages'",
        '{"text": "a"}': "no list of messages in field 'messages'",
        '{"messages": ["a"]}': "message 0 is no object with role and content",
        json.dumps(
            {"messages": [answer, {"role": "critic", "content": "a"}]}
        ): "message 1 has role 'critic', not one of system, developer, user, assistant, tool, function",
        json.dumps({"messages": [{"role": ["user"], "content": "a"}]}): "message 0 has role ['user'], not one of "
        "system, developer, user, assistant, tool, function",
        json.dumps({"messages": [{**answer, "weight": 0}]}): "every message of role 'assistant' has weight 0",
        json.dumps({"messages": [{**answer, "weight": 0.5}]}): "message 0 has weight 0.5, not 0 or 1",
        json.dumps({"messages": [{**answer, "weight": "0"}]}): "message 0 has weight '0', not 0 or 1",
        json.dumps({"messages": [{**answer, "train": False}]}): "message 0 has field 'train', which would be lost",
        json.dumps({"messages": [{**answer, "audio": {"id": 1}}]}): "message 0 has field 'audio', which would be lost",
        json.dumps(
            {"messages": [{"role": "user", "name": "bob", "content": "a"}, answer]}
        ): "message 0 has field 'name', which would be lost",
        json.dumps(
            {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}, answer]}
        ): "message 0 has field 'tool_calls', which would be lost",
        json.dumps({"messages": [{"role": "assistant", "content": None}]}): "message 0 has no text in field 'content'",
        json.dumps(
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, answer]}
        ): "message 0 has a part of type 'image_url', not text",
        json.dumps({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}): "message 0 has a call "
        "without the name of a function",
        json.dumps(
            {"messages": [{"role": "assistant", "tool_calls": "f()"}]}
        ): "message 0 has tool calls 'f()', not a list",
        json.dumps({"messages": [answer], "images": ["a.png"]}): "field 'images', which is not text",
        json.dumps({"messages": [answer], "tools": ["f"]}): "field 'tools' is ['f'], not a list of objects",
        json.dumps({"messages": [answer], "tools": "f"}): "field 'tools' is no JSON",
        json.dumps({"messages": [answer], "system": 3}): "field 'system' is 3, not text",
        json.dumps({"conversations": [{"from": "gpt", "value": "a"}]}): "no list of messages in field 'messages'",
        json.dumps({"messages": [answer, {"role": "user", "content": 3}]}): "message 1 has no text in field 'content'",
        json.dumps({"messages": [{"role": "user", "content": "a"}]}): "no message of role 'assistant'",
        '{"messages": [{"role": "assistant", "content": "\\ud800"}]}': "a message is not valid Unicode",
        "{": "not UTF-8 JSON",
    }
    path = tmp_path / "chat.jsonl"
    write(path, questions(5))
    good = path.read_text()
    path.write_text("".join(line + "\n" for line in bad) + good)
    corpus = load_corpus(DataConfig(str(path), format="chat"))
    assert len(corpus.train) + len(corpus.held_out) == 5
    offsets = np.cumsum([0, *(len(line) + 1 for line in bad)])
    assert [where for where, _ in corpus.skipped] == [f"{path}:{offset}" for offset in offsets[:-1]]
    assert [reason.split(":")[0] for _, reason in corpus.skipped] == list(bad.values())
    (tmp_path / "bad.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"no documents in .*bad.jsonl: 1 skipped \(.*:0: no list of messages"):
        load_corpus(DataConfig(str(tmp_path / "bad.jsonl"), format="chat"))


@pytest.mark.parametrize("isolate", [True, False])
def test_packing_and_cutting_keep_every_weight_with_its_target_and_count_answer_bytes_only(tmp_path, isolate):
    long = [Message("user", "Q" * 30), Message("assistant", "0123456789" * 5), Message("user", "R" * 40)]
    talks = [*questions(30), long]
    config = DataConfig(write(tmp_path / "chat.jsonl", talks), sequence_length=32, isolate_documents=isolate, **SHORT)
    corpus = load_corpus(config)
    batches = list(train_batches(corpus, BYTE, config, align=ALIGN, num_epochs=1))
    batches += list(held_out_batches(corpus, BYTE, config, align=ALIGN))
    learnt = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    expected = "".join(message.content + ">" for talk in talks for message in talk if message.role == "assistant")
    assert sorted(BYTE.decode(learnt)) == sorted(expected)
    assert all(set(np.unique(batch["weights"])) <= {0.0, 1.0} for batch in batches)
    assert sum(batch["target_bytes"].sum() for batch in batches) == len(expected)
    # Everything else is there to be read, without weight.
    tokens = np.concatenate([batch["tokens"].reshape(-1) for batch in batches])
    assert (tokens == ord("Q")).sum() == 30
    assert (tokens == ord("R")).sum() == 40
    assert (tokens == BYTE.bos_id).sum() == len(talks)


def test_a_packed_batch_has_the_loss_and_gradients_of_its_conversations_one_by_one(tmp_path):
    talks = questions(12)
    config = DataConfig(write(tmp_path / "chat.jsonl", talks), sequence_length=64, held_out_fraction=0.01, **SHORT)
    corpus = load_corpus(config)
    batch = next(train_batches(corpus, BYTE, config, align=ALIGN, num_epochs=1))
    assert batch["segment_ids"].max() >= 2  # two conversations and more share a row
    model = Transformer(MODEL, BYTE.vocab_size)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, ALIGN), jnp.int32)))["params"]
    loss_and_gradient = jax.jit(jax.value_and_grad(lambda params, batch: loss_sums(model, params, batch).nll))
    packed = loss_and_gradient(params, batch)
    alone = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    for row in range(len(batch["tokens"])):
        for segment in np.unique(batch["segment_ids"][row]):
            inside = batch["segment_ids"][row] == segment
            one = {name: np.zeros_like(value) for name, value in batch.items()}  # weight 0, and one segment
            for name in ("tokens", "targets", "weights", "target_bytes"):
                one[name][0, : inside.sum()] = batch[name][row, inside]
            alone = jax.tree.map(jnp.add, alone, loss_and_gradient(params, one))
    assert batch["weights"].sum() > 0
    assert_trees_close(packed, alone, 1e-5)


def test_hidden_states_of_prompts_have_no_gradient(tmp_path):
    config = DataConfig(write(tmp_path / "chat.jsonl", questions(12)), sequence_length=64, **SHORT)
    batch = next(train_batches(load_corpus(config), BYTE, config, align=ALIGN))
    hidden = jax.random.normal(jax.random.key(0), (*batch["tokens"].shape, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, BYTE.vocab_size))

    @jax.jit
    def gradient(hidden):
        def loss(hidden):
            sums = cross_entropy(hidden, kernel, batch["targets"], batch["weights"], batch["target_bytes"])
            return sums.nll + sums.z

        return jax.grad(loss)(hidden)

    moved = np.asarray(jnp.abs(gradient(hidden)).max(axis=-1))
    assert (moved[batch["weights"] == 0] == 0).all()
    assert (moved[batch["weights"] > 0] > 0).all()


@pytest.mark.exhaustive
def test_fine_tuning_from_a_run_lowers_the_loss_of_answers_and_resumes_exactly(tmp_path, capsys):
    base = TrainConfig(
        model=dataclasses.replace(MODEL, attention="full"),
        data=DataConfig(write(tmp_path / "text.jsonl", questions(20)), sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        checkpoint=CheckpointConfig(every=15),
        run_dir=tmp_path / "base",
        steps=30,
        eval_every=30,
        eval_batches=1,
        position_buckets=0,
        sample_tokens=0,
    )
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(20)))
    save_untrained(base)
    path = write(tmp_path / "chat.jsonl", questions(300))
    data = dataclasses.replace(base.data, path=path, **SHORT | {"batch_size": 8})
    tuned = dataclasses.replace(base, data=data, init_from=base.run_dir, run_dir=tmp_path / "tuned")
    whole = run(prepare(tuned), plain=True)
    losses = [entry["loss"] for entry in read_metrics(tuned.run_dir / "metrics.jsonl") if "loss" in entry]
    assert losses[0] > 5
    assert whole.held_out["held_out_loss"] < losses[0] / 2

    # The same from the middle on, without the run that it started from.
    parted = dataclasses.replace(tuned, run_dir=tmp_path / "parted")
    shutil.copytree(tuned.run_dir, parted.run_dir)
    shutil.rmtree(parted.run_dir / "checkpoints" / "30")
    shutil.rmtree(base.run_dir)
    again = run(prepare(parted), plain=True)
    assert "resuming after step 15" in capsys.readouterr().out
    for x, y in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    command = ["generate", "--run", str(tuned.run_dir), "--temperature", "0", "--max-tokens", "8"]
    assert main([*command, "--chat", "--prompt", "b 7"]) == 0
    answer = capsys.readouterr().out
    assert ">" not in answer
    assert "user" not in answer
    assert len(answer) <= 9


def test_markers_without_text_are_refused_by_name():
    with pytest.raises(ValueError, match=r"data.chat_end = '': expected some text"):
        check_config(TrainConfig(data=DataConfig(chat_end="")))
