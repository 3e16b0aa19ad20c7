"""Tokenizers: text survives the round trip, and every byte is counted once."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from train.data.tokenizer import load_tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "naïve café, 東京 🙂",
    "  two  spaces\t\ttabs ",
    "a </s> and <|endoftext|> in text",
]


def save_byte_level(path, special_tokens=("<|endoftext|>",)):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(path))
    return str(path)


def save_byte_fallback(path):
    """A SentencePiece-like file, as Llama 2 has: spaces are marks, unknown characters are bytes."""
    vocab = ["<unk>", "<s>", "</s>", "<pad>", "\u2581", *(f"<0x{i:02X}>" for i in range(256)), *"abcdefghij"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(path))
    return str(path)


def save_word_piece(path):
    vocab = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "play", "##ing", "##é"])}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module", params=["byte", "byte-level", "byte-fallback"])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save = {"byte": lambda _: "byte", "byte-level": save_byte_level, "byte-fallback": save_byte_fallback}
    return load_tokenizer(save[request.param](path))


# U+2581 stands for a space in SentencePiece files, and so cannot survive there.
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")) | st.sampled_from(TEXTS))
def test_any_text_survives_and_its_bytes_are_counted_once(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))
    np.testing.assert_array_equal(ids, tokenizer.encode(text.encode("utf-8")))


def test_special_tokens_have_no_bytes_and_no_text(tokenizer):
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int32
    assert (tokenizer.token_bytes[special] == 0).all()
    assert tokenizer.decode(special) == ""
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("abc"), tokenizer.eos_id]) == "abc"


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_spelled_out_in_text_are_text(tokenizer, text):
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert not np.isin(tokenizer.encode(text), special).any()


def test_cut_characters_decode_to_replacement_marks(tokenizer):
    ids = tokenizer.encode("東")
    assert len(ids) > 1  # else the test would show nothing
    assert "\ufffd" in tokenizer.decode(ids[:-1])


def test_a_copy_in_another_process_encodes_alike(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in TEXTS:
        np.testing.assert_array_equal(copy.encode(text), tokenizer.encode(text))
    assert copy == tokenizer


def test_byte_tokenizer_is_the_bytes():
    tokenizer = load_tokenizer("byte")
    np.testing.assert_array_equal(tokenizer.encode(b"a\xffb"), [97, 255, 98])
    assert tokenizer.decode([97, 255, 98]) == "a\ufffdb"


def test_word_piece_counts_the_text_of_the_token(tmp_path):
    tokenizer = load_tokenizer(save_word_piece(tmp_path / "t.json"))
    np.testing.assert_array_equal(tokenizer.token_bytes, [0, 0, 0, 0, 4, 3, 2])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)


def test_special_tokens_fall_back_on_end_of_text(tmp_path):
    tokenizer = load_tokenizer(save_byte_level(tmp_path / "t.json"))
    assert tokenizer.bos_id == tokenizer.pad_id == tokenizer.eos_id


def test_special_tokens_are_known_by_deepseeks_names(tmp_path):
    names = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
    tokenizer = load_tokenizer(save_byte_level(tmp_path / "t.json", names))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_added_tokens_that_are_not_special_count_their_bytes_and_ids_may_have_gaps(tmp_path):
    path = tmp_path / "t.json"
    save_byte_level(path)
    definition = json.loads(path.read_text())
    added = dict(definition["added_tokens"][0], id=1000, content="é--", special=False)
    definition["added_tokens"].append(added)
    path.write_text(json.dumps(definition))
    tokenizer = load_tokenizer(str(path))
    index = tokenizer.encode("é--")
    assert len(index) == 1
    assert tokenizer.token_bytes[index[0]] == 4
    assert index[0] < tokenizer.vocab_size


def test_missing_and_wrong_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer: gpt2 is not a file; expected \"byte\""):
        load_tokenizer("gpt2")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"wrong\.json is not a tokenizers JSON file"):
        load_tokenizer(str(wrong))
    wrong.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"cannot read .*wrong\.json"):
        load_tokenizer(str(wrong))
    definition = json.loads(Path(save_word_piece(wrong)).read_text())
    del definition["model"]["vocab"]["[UNK]"]
    definition["added_tokens"] = definition["added_tokens"][1:]
    wrong.write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*wrong\.json has no token for unknown text: WordPiece"):
        load_tokenizer(str(wrong))
    with pytest.raises(ValueError, match=r"data\.tokenizer: cannot read ~nobody_at_all/t\.json"):
        load_tokenizer("~nobody_at_all/t.json")
    with pytest.raises(ValueError, match=r"no_eos\.json has no end-of-text token; looked for <\|endoftext\|>"):
        load_tokenizer(save_byte_level(tmp_path / "no_eos.json", ["<other>"]))
