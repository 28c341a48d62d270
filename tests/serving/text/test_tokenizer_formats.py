"""Published tokenizers give the published ids, and their text comes back whole, token by token."""

import json
import shutil

import pytest
import tokenizers

from serving.errors import StartError
from serving.text.tokenizer import Detokenizer, Message, Tokenizer
from serving.text.tokenizer_formats import TOKENIZER_CONFIG, TokenizerSettings, load_tokenizer
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.gguf_vocabulary import write_tokenizer
from tests.support.published_assets import mistral_tokenizers, qwen3_tokenizer, vocabularies

TEXTS = (
    "Hello, world!  Two  spaces\nand a newline.",
    "Größe, 数学 und 🎉🎈 été",
    " leading",
    "def f(x):\n\treturn x**2",
)
TURNS = [Message("user", "Hi there"), Message("assistant", "Hello!"), Message("user", "Bye")]
MISTRAL_V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = {
    # As mistral-common 1.13.1 encodes TEXTS and TURNS.
    "tokenizer.model.v1": (
        32_000,
        (
            (1, 22557, 28725, 1526, 28808, 28705, 6005, 28705, 10599, 13, 391, 264, 633, 1081, 28723),
            (1, 1778, 28834, 9526, 28725, 28705, 28945, 29500, 640, 28705, 31862, 243, 162, 145, 139, 7166),
            (1, 28705, 5374),
            (1, 801, 285, 28732, 28744, 1329, 13, 12, 807, 1318, 348, 28750),
        ),
        None,
    ),
    "mistral_instruct_tokenizer_240323.model.v3": (
        32_768,
        (
            (1, 23325, 29493, 2294, 29576, 29473, 6773, 29473, 11367, 781, 1159, 1032, 1401, 1849, 29491),
            (1, 2546, 29602, 10294, 29493, 29473, 29713, 30268, 1408, 29473, 32630, 1011, 930, 913, 907, 7934),
            (1, 29473, 6142),
            (1, 1569, 1053, 29500, 29512, 2097, 781, 780, 1575, 2086, 1116, 29518),
        ),
        (1, 3, 16127, 1504, 4, 23325, 29576, 2, 3, 3231, 29474, 4),
    ),
    "tekken_240911.json": (
        131_072,
        (
            (1, 22177, 1044, 4304, 1033, 1032, 10638, 1032, 18971, 1010, 1421, 1261, 91924, 1046),
            (1, 20560, 1792, 9755, 1044, 43029, 1176, 12104, 1673, 119685, 1142, 1137, 1240, 1159, 1142, 1136, 5320),
            (1, 8924),
            (1, 3149, 1284, 4790, 3640, 3739, 2460, 1438, 1050),
        ),
        (1, 3, 37133, 2156, 4, 22177, 1033, 2, 3, 3606, 1101, 4),
    ),
}
SLOW = pytest.mark.slow


def golden(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Texts and ids of one of llama.cpp's vocabularies, made with the published tokenizer of that model."""
    base = vocabularies() / f"ggml-vocab-{name}.gguf"
    texts = base.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = base.with_suffix(".gguf.out").read_text().split("\n")
    return [(text, tuple(map(int, line.split()))) for text, line in zip(texts, lines, strict=False) if text]


def grown(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    growing = Detokenizer(tokenizer)
    parts = [*(growing.push(i) for i in ids), growing.flush()]
    assert not any("\ufffd" in part for part in parts)
    return "".join(parts)


@pytest.mark.parametrize(
    "name",
    [
        "llama-spm",
        "phi-3",
        "gpt-2",
        "starcoder",
        "deepseek-coder",
        *(pytest.param(n, marks=SLOW) for n in ("refact", "mpt", "llama-bpe", "deepseek-llm", "falcon")),
        *(pytest.param(n, marks=SLOW) for n in ("command-r", "qwen2", "qwen35")),
    ],
)
def test_ids_are_those_of_the_published_tokenizer(name, tmp_path):
    write_tokenizer(vocabularies() / f"ggml-vocab-{name}.gguf", tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    pairs = golden(name)
    assert len(pairs) > 30
    for text, ids in pairs:
        assert tokenizer.encode(text) == ids, text
        assert grown(tokenizer, ids) == tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def qwen3():
    return Tokenizer.load(qwen3_tokenizer())


def test_a_published_tokenizer_json_gives_the_golden_ids(qwen3):
    for text, ids in golden("qwen2"):  # Qwen3 kept the vocabulary of Qwen2
        assert qwen3.encode(text) == ids, text
        assert grown(qwen3, ids) == text


def test_special_tokens_have_ids_in_a_chat_and_no_text(qwen3):
    ids = qwen3.chat([Message("user", "Hi")])
    assert ids == (151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198)
    assert qwen3.decode(ids) == "user\nHi\nassistant\n"


def test_switches_and_tools_reach_the_template(qwen3):
    plain = qwen3.chat([Message("user", "Hi")])
    silent = qwen3.chat([Message("user", "Hi")], variables={"enable_thinking": False})
    assert silent[: len(plain)] == plain
    assert "<think>\n\n</think>" in qwen3.decode(silent)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    assert json.dumps(tool) in qwen3.decode(qwen3.chat([Message("user", "Hi")], tools=[tool]))


@pytest.fixture(scope="module", params=MISTRAL)
def mistral(request, tmp_path_factory):
    if "tekken" in request.param:
        pytest.importorskip("tiktoken", reason="tekken.json needs the extra moejax[tekken]")
    folder = tmp_path_factory.mktemp("mistral")
    name = "tekken.json" if "tekken" in request.param else "tokenizer.model"
    shutil.copy(mistral_tokenizers() / request.param, folder / name)
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "chat_template": MISTRAL_V3}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings))
    return Tokenizer.load(folder), MISTRAL[request.param]


def test_mistral_ids_are_those_of_mistral_common(mistral):
    tokenizer, (size, expected, chat) = mistral
    assert tokenizer.vocab_size == size
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer.encode(text) == ids
        assert grown(tokenizer, ids) == text
    if chat is not None:
        assert tokenizer.chat(TURNS) == chat


def test_the_bytes_of_published_tokens_make_the_text(mistral, qwen3):
    for tokenizer in (mistral[0], qwen3):
        for text in TEXTS:
            ids = tokenizer.encode(text)
            written = b"".join(map(tokenizer.token_bytes, ids)).decode()
            assert written in (tokenizer.decode(ids), f" {tokenizer.decode(ids)}")


def test_names_and_ids_of_tokens_belong_together(mistral):
    vocabulary, (size, *_) = mistral[0]._format, mistral[1]
    for name, index in (("<s>", 1), ("</s>", 2)):
        assert vocabulary.index(name) == index
        assert vocabulary.token(index) == name
    assert vocabulary.token(size) is None
    assert vocabulary.index("no such token at all") is None


def test_an_answer_keeps_the_space_it_begins_with(mistral):
    tokenizer, _ = mistral
    prompt, whole = tokenizer.encode("The capital of France is"), tokenizer.encode("The capital of France is Paris.")
    assert whole[: len(prompt)] == prompt
    growing = Detokenizer(tokenizer, prompt)
    assert "".join([*(growing.push(i) for i in whole[len(prompt) :]), growing.flush()]) == " Paris."


def test_an_answer_may_complete_a_character_of_the_prompt(mistral):
    tokenizer, _ = mistral
    ids = tokenizer.encode("Let us celebrate 🎈")
    for cut in range(len(ids) - 3, len(ids)):
        growing = Detokenizer(tokenizer, ids[:cut])
        assert "".join([*(growing.push(i) for i in ids[cut:]), growing.flush()]).strip() == "🎈"


def test_the_beginning_token_is_put_as_the_settings_say(tmp_path):
    shutil.copy(mistral_tokenizers() / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    for add, begins in ((True, True), (False, False), (None, True)):
        settings = {"bos_token": {"content": "<s>"}} | ({} if add is None else {"add_bos_token": add})
        (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps(settings))
        assert (Tokenizer.load(tmp_path).encode("a")[0] == 1) == begins


def test_settings_that_cannot_be_read_are_named(tmp_path):
    for text in ("{", "[]", '{"added_tokens_decoder": {"x": {}}}'):
        (tmp_path / TOKENIZER_CONFIG).write_text(text)
        with pytest.raises(StartError, match=r"tokenizer_config\.json cannot be read"):
            Tokenizer.load(tmp_path)


def test_a_broken_model_is_named(tmp_path):
    for name in ("tekken.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(StartError, match=f"{name} is no tokenizer"):
            load_tokenizer(tmp_path, None)
        (tmp_path / name).unlink()


@pytest.fixture
def byte_folder(tmp_path):
    """A folder with a tokenizer of bytes and the settings given to it."""

    def write(change=lambda inner: None, settings=None, **files):
        inner = byte_tokenizer().format.inner
        change(inner)
        (tmp_path / "tokenizer.json").write_text("\ufeff" + inner.to_str(), "utf-8")
        if settings is not None:
            (tmp_path / TOKENIZER_CONFIG).write_text("\ufeff" + json.dumps(settings), "utf-8")
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text("\ufeff" + text, "utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize(
    "change",
    [
        lambda inner: inner.enable_truncation(4),
        lambda inner: inner.enable_padding(length=200, pad_id=257, pad_token="<|stop|>"),
    ],
    ids=["truncation", "padding"],
)
def test_the_saved_state_of_a_training_never_acts(byte_folder, change):
    text = "abcabcabc"
    assert Tokenizer.load(byte_folder(change)).encode(text) == byte_tokenizer().encode(text)


def test_merges_are_never_left_out_at_random(tmp_path):
    model = tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=1.0)
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("abab") == (2, 2)


def test_special_tokens_of_the_map_are_used_as_transformers_does(byte_folder):
    config, mapped = (
        {"eos_token": "<|end|>"},
        json.dumps({"eos_token": {"content": "<|stop|>"}, "pad_token": "<|end|>"}),
    )
    folder = byte_folder(settings=config, special_tokens_map__json=mapped)
    assert TokenizerSettings.load(folder).special_tokens == {"eos_token": "<|stop|>", "pad_token": "<|end|>"}
    added = {"added_tokens_decoder": {"256": {"content": "<|end|>", "special": True}}}
    folder = byte_folder(settings=config | added, special_tokens_map__json=mapped)
    assert TokenizerSettings.load(folder).special_tokens == {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    (folder / "special_tokens_map.json").write_text("[")
    with pytest.raises(StartError, match="special_tokens_map"):
        TokenizerSettings.load(folder)


def test_further_templates_are_found_by_name(byte_folder, tmp_path):
    further = tmp_path / "additional_chat_templates"
    further.mkdir()
    (further / "tool_use.jinja").write_text("\ufefftools {{ tools | length }}", "utf-8")
    tokenizer = Tokenizer.load(byte_folder(settings={}, chat_template__jinja="plain"))
    assert tokenizer.decode(tokenizer.chat([Message("user", "x")])) == "plain"
    assert tokenizer.decode(tokenizer.chat([Message("user", "x")], tools=[{}, {}])) == "tools 2"


def test_a_template_given_at_the_start_takes_the_place_of_the_folder_s(byte_folder, tmp_path):
    folder = byte_folder(settings={"chat_template": "its own"}, mine__jinja="{{ messages[0].content }}!")
    tokenizer = Tokenizer.load(folder, chat_template=tmp_path / "mine.jinja")
    assert tokenizer.decode(tokenizer.chat([Message("user", "x")])) == "x!"
    assert tokenizer.info["chat_template"] == "{{ messages[0].content }}!"
    with pytest.raises(StartError, match=r"none\.jinja"):
        Tokenizer.load(folder, chat_template=tmp_path / "none.jinja")
    with pytest.raises(StartError, match="tool_call_parser is 'mine'"):
        Tokenizer.load(folder, tool_call_parser="mine")


def test_the_marks_of_a_format_have_text_where_they_are_looked_for(byte_folder):
    """As with Mistral and gpt-oss, whose marks are special tokens."""
    template = "{{ messages[0].content }}<think>"
    marks = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    tokenizer = Tokenizer.load(byte_folder(lambda inner: inner.add_special_tokens(marks), {"chat_template": template}))
    prompt = tokenizer.chat([Message("user", "x")])
    assert tokenizer.answer_parsing(prompt, (), True).inside_reasoning
    ids = tokenizer.format.encode("é</think>yes<|end|>", special=False)
    assert tokenizer.decode(ids) == "éyes"
    for marks, expected in ((False, "éyes"), (True, "é</think>yes")):
        growing = Detokenizer(tokenizer, prompt, marks=marks)
        assert "".join([*(growing.push(i) for i in ids), growing.flush()]) == expected
