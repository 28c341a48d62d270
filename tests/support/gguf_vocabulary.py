"""Tokenizer files as they are published, made from the vocabularies that llama.cpp keeps as GGUF."""

import json
from pathlib import Path

import gguf
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, decoders, models, pre_tokenizers

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
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
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _bytes(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


PRE_TOKENIZERS = {
    "gpt-2": [_bytes(True)],
    "mpt": [_bytes(True)],
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


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a model folder, as SentencePiece or as tokenizer.json."""
    fields = {f.name: f for f in gguf.GGUFReader(source).fields.values()}
    write = _write_sentencepiece if fields["tokenizer.ggml.model"].contents() == "llama" else _write_json
    write(fields, folder)


def _write_sentencepiece(fields: dict, folder: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    names = ("tokens", "scores", "token_type")
    pieces = zip(*(fields[f"tokenizer.ggml.{name}"].contents() for name in names), strict=True)
    added = {}
    for index, (piece, score, kind) in enumerate(pieces):
        if index >= 32000:
            added[str(index)] = {"content": piece, "special": True}
        else:
            model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {"add_bos_token": False, "bos_token": "<s>", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_json(fields: dict, folder: Path) -> None:
    tokens, kinds, pre, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "pre", "merges")
    )
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=[tuple(m.split(" ")) for m in merges],
            ignore_merges=pre == "llama-bpe",
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    inner.decoder = decoders.ByteLevel()
    marks = [tokenizers.AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k != NORMAL]
    inner.add_special_tokens([m for m, k in zip(marks, [k for k in kinds if k != NORMAL], strict=True) if k == CONTROL])
    inner.add_tokens([m for m, k in zip(marks, [k for k in kinds if k != NORMAL], strict=True) if k == USER_DEFINED])
    inner.save(str(folder / "tokenizer.json"))
