"""The tokenizer of a GGUF file as it is published: SentencePiece (`tokenizer.model`) or `tokenizer.json`, with the
special tokens and the chat template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, decoders, models, pre_tokenizers

TokenizerFiles = Mapping[str, bytes]
"""Contents of files by name."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_MARKS = "!-/:-~！-／：-～‘-‟　-。"
CJK = "[一-龥ࠀ-一가-퟿]+"
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
"""Types of tokens in GGUF, as in SentencePiece."""
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}
"""The special tokens of SentencePiece where a file names none, as in llama.cpp."""


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _bytes(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


PRE_TOKENIZERS = {
    "gpt-2": [_bytes(True)],
    "mpt": [_bytes(True)],
    "olmo": [_bytes(True)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _bytes(True)],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), _bytes(True)],
    "refact": [pre_tokenizers.Digits(individual_digits=True), _bytes(True)],
    "llama-bpe": [_split(LLAMA3), _bytes(False)],
    "qwen2": [_split(QWEN), _bytes(False)],
    "qwen35": [_split(QWEN35), _bytes(False)],
    "command-r": [pre_tokenizers.Digits(individual_digits=True), _bytes(True)],
    "falcon": [_split(r"[\p{P}\$\+<=>\^~\|`]+"), _bytes(True), _split("[0-9][0-9][0-9]")],
    "deepseek-llm": [
        *(_split("[\r\n]"), _split(rf"\s?[{DEEPSEEK_LETTERS}]+"), _split(rf"\s?[{DEEPSEEK_MARKS}]+"), _split(r"\s+$")),
        *(_split(CJK), _split(r"\p{N}+"), _bytes(False)),
    ],
    "deepseek-coder": [
        *(_split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split(CJK), _split(r"\p{N}"), _bytes(False)),
    ],
}
"""How each model cuts text before the merges, from its published tokenizer.json."""


def tokenizer_files(fields: Mapping[str, Any], *, beside: Path | None = None) -> TokenizerFiles:
    """The tokenizer in the fields of a GGUF file; or the tokenizer.json in the folder `beside` the file, if there is
    one. Raises ValueError for a tokenizer that is not read or is of another model, KeyError for a field that is
    missing."""
    published = None if beside is None else beside / "tokenizer.json"
    published = published if published is not None and published.is_file() else None
    settings = _special_tokens(fields)
    begins = begins_texts(fields)
    if published is None and begins is not None:  # a published tokenizer says so itself
        settings["add_bos_token"] = begins
    found = {"tokenizer_config.json": json.dumps(settings).encode()}
    if "tokenizer.chat_template" in fields:
        found["chat_template.jinja"] = fields["tokenizer.chat_template"].encode()
    if published is not None:
        return found | {"tokenizer.json": _checked(published, fields)}
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    if kind == "llama":
        return found | {"tokenizer.model": _sentencepiece(fields)}
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"its tokenizer is {kind}/{pre}; read are llama and gpt2/ with {', '.join(PRE_TOKENIZERS)}. Put the "
            "model's own tokenizer.json beside the file, which is then used."
        )
    return found | {"tokenizer.json": _json(fields, pre)}


def begins_texts(fields: Mapping[str, Any]) -> bool | None:
    """Whether the begin token is put in front of every text: as the file says, else as llama.cpp does for this kind of
    tokenizer. None where neither says so."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    default = True if kind == "llama" or (kind, pre) == ("gpt2", "llama-bpe") else None
    stated = fields.get("tokenizer.ggml.add_bos_token", default)
    return None if stated is None else bool(stated)


def special_token(fields: Mapping[str, Any], name: str) -> int | None:
    """The id of a special token (`bos`, `eos`, `eot`, `eom`); None where there is none."""
    default = SENTENCEPIECE_IDS.get(name) if fields.get("tokenizer.ggml.model") == "llama" else None
    return fields.get(f"tokenizer.ggml.{name}_token_id", default)


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens as tokenizer_config.json has them."""
    found = {name: special_token(fields, name) for name in ("bos", "eos")}
    return {f"{name}_token": fields["tokenizer.ggml.tokens"][i] for name, i in found.items() if i is not None}


def _checked(published: Path, fields: Mapping[str, Any]) -> bytes:
    """The tokenizer.json beside a file. Raises ValueError unless it has as many tokens as the file, whose last ones may
    be unused."""
    content, tokens = published.read_bytes(), fields["tokenizer.ggml.tokens"]
    kinds = list(fields.get("tokenizer.ggml.token_type", ()))
    used = len(tokens)
    while used and kinds[used - 1 : used] == [UNUSED]:
        used -= 1
    try:
        size = tokenizers.Tokenizer.from_buffer(content).get_vocab_size()
    except Exception as error:  # the package has no other type
        raise ValueError(f"{published} beside it is no tokenizer: {error}") from error
    if not used <= size <= len(tokens):
        raise ValueError(
            f"its vocabulary has {used} tokens, and {published} beside it has {size}: that is of another model. Put "
            "the model's own tokenizer.json there, or none."
        )
    return content


def _sentencepiece(fields: Mapping[str, Any]) -> bytes:
    proto: Any = sentencepiece_model_pb2  # has no types
    model, kinds = proto.ModelProto(), list(fields["tokenizer.ggml.token_type"])
    for i, kind in enumerate(kinds):
        if kind == UNKNOWN and UNKNOWN in kinds[:i]:
            kinds[i] = CONTROL  # SentencePiece has one unknown token; llama.cpp calls some special tokens so too
    for piece, score, kind in zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], kinds, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString()


def _json(fields: Mapping[str, Any], pre: str) -> bytes:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
            ignore_merges=pre == "llama-bpe",
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    inner.decoder = decoders.ByteLevel()
    marks = {
        wanted: [
            tokenizers.AddedToken(token, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == wanted
        ]
        for wanted in (CONTROL, USER_DEFINED)
    }
    inner.add_special_tokens(marks[CONTROL])
    inner.add_tokens(marks[USER_DEFINED])
    return inner.to_str().encode()
