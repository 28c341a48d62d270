"""Tokenizer, Detokenizer and StopStrings."""

import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import InvalidRequest, StartError
from serving.text.tokenizer import Detokenizer, Message, StopStrings, Tokenizer
from serving.text.tokenizer_formats import HuggingFaceTokenizer
from simulation.byte_tokenizer import byte_tokenizer

BYTES = byte_tokenizer()


def merged() -> Tokenizer:
    """A trained byte-level BPE, whose tokens are of several bytes and end within characters."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["die Würde des Menschen ist unantastbar 数学 数字 🎉🎈 " * 3], trainer)
    return Tokenizer(HuggingFaceTokenizer(inner))


def fallback() -> Tokenizer:
    """SentencePiece's way: pieces with a marked space, and single bytes for what has no piece."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁the"]
    vocab = [(p, -float(i)) for i, p in enumerate(pieces)]
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    steps = tokenizers.decoders
    inner.decoder = steps.Sequence(
        [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    )
    return Tokenizer(HuggingFaceTokenizer(inner))


MERGED, FALLBACK = merged(), fallback()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ANY_TOKENIZER = st.sampled_from([BYTES, MERGED, FALLBACK])


def parts(tokenizer: Tokenizer, ids) -> list[str]:
    growing = Detokenizer(tokenizer)
    return [*(growing.push(i) for i in ids), growing.flush()]


@given(tokenizer=ANY_TOKENIZER, text=TEXT)
@settings(max_examples=300, deadline=None)
def test_text_grown_token_by_token_is_the_text_decoded_at_once(tokenizer, text):
    ids = tokenizer.encode(text)
    assert "".join(parts(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=TEXT)
def test_any_text_survives_bytes_and_back(text):
    assert "".join(parts(BYTES, BYTES.encode(text))) == text


@given(tokenizer=ANY_TOKENIZER, text=TEXT.filter(lambda t: "\ufffd" not in t))
@settings(deadline=None)
def test_no_part_has_half_a_character(tokenizer, text):
    assert not any("\ufffd" in part for part in parts(tokenizer, tokenizer.encode(text)))


@given(tokenizer=ANY_TOKENIZER, text=TEXT)
def test_the_bytes_of_tokens_make_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    written = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
    assert written.removeprefix(" ") == tokenizer.decode(ids).removeprefix(" ")  # one may put a space before a text


@given(ids=st.lists(st.integers(0, 261), max_size=30))
def test_bytes_that_are_no_character_are_shown_and_lose_nothing_else(ids):
    assert "".join(parts(BYTES, ids)) == BYTES.decode(ids)


def test_a_character_comes_with_its_last_byte():
    assert parts(BYTES, "é🎉".encode()) == ["", "é", "", "", "", "🎉", ""]


def reference(text: str, stops: list[str]) -> str:
    """Text before the stop string that is complete first, by looking at every prefix."""
    for end in range(len(text) + 1):
        ended = [s for s in stops if text[:end].endswith(s)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30)),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_split(text, stops, cuts):
    holding = StopStrings(stops)
    bounds = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    out = "".join(holding.push(text[a:b]) for a, b in itertools.pairwise(bounds))
    assert out + holding.flush() == reference(text, stops)
    assert (holding.matched is not None) == any(s in text for s in stops)


def test_text_that_may_begin_a_stop_string_is_held_until_it_is_certain():
    holding = StopStrings(["END"])
    assert [holding.push(t) for t in ("a E", "N", "x EN", "D more")] == ["a ", "", "ENx ", ""]
    assert holding.matched == "END"


def test_a_chat_ends_where_the_assistant_begins():
    ids = BYTES.chat([Message("user", "hi")])
    assert ids == (258, *b"hi", 256, 260)


def test_a_model_without_template_refuses_to_chat():
    with pytest.raises(InvalidRequest, match="no chat template"):
        byte_tokenizer(template=None).chat([Message("user", "hi")])


def test_a_template_can_refuse_a_conversation():
    refusing = byte_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        refusing.chat([Message("user", "hi")])


def test_a_template_cannot_leave_its_sandbox():
    escaping = byte_tokenizer(template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequest, match="unsafe"):
        escaping.chat([Message("user", "hi")])


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InvalidRequest, match=r"character 1 .* surrogate"):
        BYTES.encode("a\ud800")


def test_a_beginning_token_is_put_once():
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    inner.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(HuggingFaceTokenizer(inner), bos_token=0)
    assert tokenizer.encode("a") == (0, 1)
    assert tokenizer.encode("<s>a") == (0, 1)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(StartError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_broken_template_is_named_with_its_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text(BYTES.format.inner.to_str())
    (tmp_path / "chat_template.jinja").write_text("\n{% for %}")
    with pytest.raises(StartError, match=r"chat_template\.jinja, line 2"):
        Tokenizer.load(tmp_path)


@given(ids=st.lists(st.integers(128, 255), min_size=60, max_size=400))
@settings(deadline=None)
def test_bytes_without_end_that_are_no_character_are_not_held_back_for_ever(ids):
    growing = Detokenizer(BYTES)
    held = longest = 0
    for i in ids:
        held = 0 if growing.push(i) else held + 1
        longest = max(longest, held)
    assert longest < 64
    assert growing.flush() or held == 0


@given(tokenizer=ANY_TOKENIZER, prompt=TEXT, text=TEXT)
@settings(deadline=None)
def test_an_answer_after_a_prompt_is_the_rest_of_the_whole_text(tokenizer, prompt, text):
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    if whole[: len(before)] != before:
        return  # merged across the border: other tokens
    growing = Detokenizer(tokenizer, before)
    answer = "".join([*(growing.push(i) for i in whole[len(before) :]), growing.flush()])
    assert answer == tokenizer.decode(whole)[len(tokenizer.decode(before)) :]
