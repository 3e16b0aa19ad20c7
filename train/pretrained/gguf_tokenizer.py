"""The tokenizer inside a GGUF file, as a tokenizers JSON file.

A file holds tokens, their kinds, and merges (`gpt2`: byte-level BPE) or scores (`llama`: SentencePiece's BPE with byte
fallback). How text is cut before the merges it says by a name only.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from train.pretrained.fields import Fields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens
SPACE = "\u2581"  # SentencePiece's


class Cut(NamedTuple):
    """How text is cut before byte-level merges."""

    pieces: str | None  # a regular expression whose matches are pieces; None: GPT-2's
    digits: bool = False  # every digit is a piece
    whole_first: bool = False  # a piece that is a token is not merged
    normalised: bool = False  # Unicode's NFC


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# By tokenizer.ggml.pre.
CUTS = {
    "gpt-2": Cut(None),
    "smollm": Cut(None, digits=True),
    "llama-bpe": Cut(WORDS + r"\p{N}{1,3}" + REST, whole_first=True),
    "qwen2": Cut(WORDS + r"\p{N}" + REST, normalised=True),
}


def read(fields: Fields) -> str:
    """The tokenizer of a GGUF file as a tokenizers JSON file.

    Raises:
      ValueError: naming file and field, where one is missing, unknown or does not fit the others.
    """
    model = fields.text("tokenizer.ggml.model")
    if model not in MODELS:
        raise fields.wrong("tokenizer.ggml.model", f"one of {', '.join(MODELS)}")
    tokens = _list(fields, "tokens", str, None)
    kinds = _list(fields, "token_type", int, len(tokens))
    if len(set(tokens)) != len(tokens):
        repeated = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(f"{fields.file}: tokenizer.ggml.tokens holds {repeated!r} twice: expected every token once")
    tokenizer = MODELS[model](fields, tokens, kinds)
    added = {CONTROL: True, USER_DEFINED: False}
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in added:
            tokenizer.add_tokens([AddedToken(token, special=added[kind], normalized=False)])
    if fields.flag("tokenizer.ggml.add_bos_token", model == "llama"):
        number = fields.values.get("tokenizer.ggml.bos_token_id")
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise fields.wrong("tokenizer.ggml.bos_token_id", f"0 to {len(tokens) - 1}, the tokens of the tokenizer")
        bos = tokens[number]
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, number)])
    return tokenizer.to_str()


def _byte_level(fields: Fields, tokens: Sequence[str], kinds: Sequence[int]) -> tokenizers.Tokenizer:
    pre = fields.text("tokenizer.ggml.pre")
    if pre not in CUTS:
        raise fields.wrong("tokenizer.ggml.pre", f"one of {', '.join(CUTS)}")
    cut = CUTS[pre]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for merge in _list(fields, "merges", str, None):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(f"{fields.file}: tokenizer.ggml.merges holds {merge!r}: expected two tokens that make one")
        merges.append((left, right))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=cut.whole_first))
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.pieces is not None:
        parts.append(pre_tokenizers.Split(Regex(cut.pieces), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pieces is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    if cut.normalised:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(fields: Fields, tokens: Sequence[str], kinds: Sequence[int]) -> tokenizers.Tokenizer:
    scores = _list(fields, "scores", float, len(tokens))
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    # Of all neighbours, SentencePiece merges those whose token has the highest score.
    ranked = []
    for token, kind, score in zip(tokens, kinds, scores, strict=True):
        if kind != NORMAL:
            continue
        for at in range(1, len(token)):
            left, right = vocab.get(token[:at]), vocab.get(token[at:])
            if left is not None and right is not None:
                ranked.append((-score, vocab[token], left, right))
    merges = [(tokens[left], tokens[right]) for _, _, left, right in sorted(ranked)]
    bpe = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    begin = [normalizers.Prepend(SPACE)] if fields.flag("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if begin else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return tokenizer


Builder = Callable[[Fields, Sequence[str], Sequence[int]], tokenizers.Tokenizer]
MODELS: dict[str, Builder] = {"gpt2": _byte_level, "llama": _sentence_piece}  # by tokenizer.ggml.model


def _list(fields: Fields, name: str, kind: type, length: int | None) -> list[Any]:
    """A list of a file's tokenizer, with an entry for each token where `length` says so."""
    name = f"tokenizer.ggml.{name}"
    values = fields.values.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{fields.file}: {name}: expected a list of {kind.__name__}")
    if length is not None and len(values) != length:
        raise ValueError(f"{fields.file}: {name} has {len(values)} entries: expected {length}, one for each token")
    return values
