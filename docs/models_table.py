"""Writes the page of models: `python -m docs.models_table > docs/models.md`."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from moejax.checkpoint.families import SERVED_FAMILIES
from planner.inputs.published import FAMILIES, MODELS, NOT_READ
from planner.inputs.published.reader import decoder_fields, read_json_object

_PARITY = Path(__file__).with_name("results") / "parity.json"
_HEAD = """\
# Models

`moejax serve --model FOLDER` serves a published model from its folder: `config.json`, safetensors in one file or in
several with an index, and a tokenizer; or in Mistral's own format `params.json`, `consolidated*.safetensors` and
`tekken.json`.

```bash
moejax models                                                     # the families
moejax inspect ./Qwen3-30B-A3B --ranks 8 --data-type bfloat16     # parameters, bytes, KV cache, a first plan
moejax serve --model ./Qwen3-30B-A3B --ranks 8 --data-type bfloat16
```

## Families

| `model_type` | specialities | models in `configs/models/` | compared with `transformers` |
|---|---|---|---|
"""
_MIDDLE = """
Compared are logits at every position and greedy tokens, of small models that `transformers` writes itself, through
the step programs of so many ranks, and for some through a server with a process for each rank, undisturbed and with
the serving rank killed on the way: [parity](results/parity.md). `python -m benchmarks.published --configs FOLDER`
prints parameters, bytes and cache of every configuration under a folder.

Of models that also take images, sound or video the decoder of text is served: tensors of the other parts are not
read, and content of a message that is no text is refused with an error that names it.

A model with LongRoPE has factors for sequences up to its original context and others for longer ones. Keys in the
cache cannot change theirs when a sequence grows, so that it is served up to the original context, where its answers
are those of `transformers`. With `--max-context` beyond it one set of factors, that of long texts, serves every
length; the server says so when it starts.

DeepSeek-V3.2 and GLM-5 attend to the positions that an indexer chooses, 2,048 of them, and to all while there are no
more. Its keys are cached with the others, so that replicas, transfers and restorations have them too. Published
engines score in float8, moejax in float32; where two positions have the same score, the earlier is chosen. Attention
reads the whole context and leaves out what is not chosen: that is right, not yet fast.

Most layers of Qwen3-Next, Qwen3.5, LFM2, Nemotron 3, Kimi-Linear and Ling 3 have a state of the request in place of
keys and values of its positions: that of gated delta nets, of Mamba-2 or of Kimi delta attention, or the last inputs of
short convolutions. Rows are added to it one after the other
in prompts as in decode, so that a request that is computed again has the same bits
([0021](decisions/0021-states-of-layers.md)). A prompt begins behind what it has in common
with an earlier one, up to a snapshot of the state ([0031](decisions/0031-snapshots-of-states.md)). Of such models no KV
replica is kept, and they are served with `--tensor 1` and collocated ranks.

Layers with a window of MiMo-V2-Flash, Laguna, Step-3.5 and Gemma 4 have heads and a rotary embedding of their own. The
cache has rows of one width, that of the wider kind of layer; it keeps the positions before a window too.

Of Gemma 4 the model with experts (26B-A4B) and the dense 31B are served. E2B and E4B, which have inputs of each layer
by token and layers that share keys and values, are refused by the field that says so.

Of Mistral's own format (`mistral_format`, a name that only moejax has) fields are read as vLLM reads them with
`--config-format mistral`: YaRN with `apply_scale` false leaves scores as they are, gates are shares of a softmax over
the chosen experts, FP8 has a scale for each tensor. A folder that also has `config.json` and `model*.safetensors` is
read by these. Every text begins with `<s>` where no `tokenizer_config.json` says otherwise; conversations need a
`chat_template.jinja` beside, or `--chat-template`.

These are known and not read yet, because the decoder lacks a part:

| `model_type` | what the decoder lacks |
|---|---|
"""
_REST = """
## From the folder to the ranks

| | `moejax serve` (or `moejax convert SRC DST`) | `moejax serve --in-place` |
|---|---|---|
| first start | the folder is converted into the cache: an Orbax checkpoint with one file for each expert of each layer | all weights are read once and their checksums stored; no weight is written |
| disk space | a second copy of the weights | the checksums and a copy of the tokenizer |
| host store | tmpfs of at most `MOEJAX_STORE_MIB`, shared by all ranks of the host | the part of the files that the kernel keeps in memory |
| a rank reads | the files of its experts, and the weights that every rank has | the byte ranges of its experts, and the weights that every rank has |
| reloading a lost expert reads | the bytes of this expert | the bytes of this expert |

A conversion that was interrupted continues where it stopped; it holds one array in memory at a time. Both ways
compare the weights with checksums, and both distinguish missing weights from damaged ones.

## Data types

| published as | converted or read as | held by ranks (`--data-type`) |
|---|---|---|
| float32, bfloat16, float16 | the same type | float32, bfloat16, int8 with one scale for each output, or int4 with one for each group of 32 inputs |
| FP8 with a scale for each block, tensor, output or group (DeepSeek, compressed-tensors, modelopt, MXFP8; also powers of two for scales) | the number format of the model or of 16-bit scales | the same choice; with `published` as it is |
| int8 with a scale for each output or group, also with zero points (compressed-tensors) | the same | the same choice; with `published` as it is |
| MXFP4 (gpt-oss, compressed-tensors, quark) | bfloat16, exactly | the same choice; with `published` as it is |
| NVFP4 (modelopt, compressed-tensors) | the number format of the model | the same choice; with `published` as it is |
| int4 and int8 packed into words: compressed-tensors (`pack-quantized`), AWQ, GPTQ; groups, zero points, ordered groups | the number format of the scales | the same choice; with `published` as it is |

A GGUF file (`--model model.gguf`) is read as the folder that it was made of: config.json, tensors by their published
names, tokenizer and chat template, written once into the cache. Architectures: `llama` (with experts Mixtral), `olmoe`,
`qwen2`, `qwen2moe`, `qwen3`, `qwen3moe`. Q4_0, Q8_0, Q4_K, Q6_K and every other type that the `gguf` package widens become
float16; F32, F16 and BF16 stay. Another architecture, scaled rotary embeddings other than linear and YaRN, and a tokenizer
that is not known are refused by name; a `tokenizer.json` beside the file is used instead of the file's own. Where the file does
not say whether texts begin with the begin token, it is as in llama.cpp; the tokens that end a turn or a message stop too.

Routers, norms, biases and sums are float32 in every case, the KV cache unless `--kv-cache-type` says otherwise
([how](decisions/0027-a-narrow-cache-is-seen-as-it-is-kept.md)). All data types work with all families: a test
computes a step of every family in each of them. Each form is widened to the same bits as the tools that write it widen
it: `compressed-tensors` (FP8, int8, int4, NVFP4, MXFP4, MXFP8), `transformers` (block FP8, gpt-oss), AutoAWQ; GPTQ is
compared with its formula (`tests/moejax/checkpoint/quantized/`). Scales of activations and of the KV cache are not
used, which is said when a model is converted. What is not read (bitsandbytes, AWQ other than `gemm`, sparse formats,
pickled `.bin` files) is refused with an error that names it and what is read instead.

`--data-type auto`, the default, is the type that a model's own configuration names (`weights` in our config.json: int8
for `smollm2-moe`), and float32 for all others.

`--data-type published` keeps weights of four and eight bits as they are published, and takes the narrowest type that
represents all others: bfloat16 for bfloat16 and for other quantised forms, float32 for float32 and float16.

| form | bits of a weight, in the file and in a rank | kept as it is |
|---|---|---|
| MXFP4 | 4.25 | 4 bits of FP4 E2M1, an exponent of two for each group of 32 |
| NVFP4 | 4.5 | 4 bits of FP4 E2M1, an FP8 scale for each group of 16; a factor for each output, which the file has once for each tensor |
| int4 of `pack-quantized`, AWQ and GPTQ: groups of a multiple of 32, or whole rows | 4 + (16 + 4) / group; in a rank zero points have 8 bits | integers, bfloat16 or float16 scales, zero points |
| FP8 E4M3: blocks, tensors, outputs, groups of inputs (MXFP8) | 8 + those of the scale (32 / 128 ** 2 in blocks of 128 x 128, 8 / 32 in MXFP8) | 8 bits of FP8 E4M3, scales as they are; of tensors and outputs in a rank a float32 for each output |
| int8 of compressed-tensors and GPTQ: outputs, tensors, groups of inputs | 8 + (16 + 8) / group | integers, scales, zero points |

Ranks multiply four bits where they lie ([how](decisions/0020-int4-weights-have-exact-groups.md)), and eight bits as the
float32 numbers that they stand for, widened a few rows at a time
([how](decisions/0033-published-eight-bits-are-widened-in-the-tile.md)): experts, attention and dense layers, each where
all layers have it in the form that most experts have; the rest is bfloat16. Such a folder is read in place: a
conversion would widen it. Shards of heads (`--tensor`) end within groups, so attention is bfloat16 there; and with
`--dense sharded` everything is. Every matrix is checked when its checksum is recorded. Widened are ordered groups (GPTQ
with `desc_act`), of latent attention the half of `kv_b_proj` that takes queries to the latent where groups lie across
it (blocks need not), of four bits groups that are no multiple of 32 (NVFP4: 16) and scales in float32, and FP8 E5M2.

New weights of such a server (`moejax apply weights`) come in the same form, with the same scales and groups; others are
refused before anything is loaded, with both forms. Parity of experts (`--parity`) is made of these bits as they are.

Where ranks hold more bytes than are published, the server says both at the start: "is published in int4, 595.2 GiB;
ranks hold its weights in bfloat16, ...", and so does `moejax inspect --data-type published`. Of a folder in our own
form it says how that is stored. `moejax plan` counts the bytes of the published form.

`--data-type int4` rounds any model to int4, except embedding and head, which it holds in int8; of a small model that
costs 6 to 9 % more bits per byte ([results](results/README.md)), and converted int4 is rounded once more.

`--data-type int8` rounds each row to 254 steps of its largest number, so that a row of MXFP4 whose groups have very
different scales loses its smallest numbers; bfloat16 represents MXFP4 exactly.

## Errors before anything is served

The server refuses an architecture that it does not support, a field that is missing or contradicts another, a
truncated file, and a tensor that is missing, has another shape, or has no use in the configured model. The error
names the file, the tensor and both shapes:

```
model-00001-of-00002.safetensors: tensor model.layers.2.mlp.experts.7.gate_proj.weight has shape (24, 65), but config.json
says (24, 64) (it makes moe.experts.gate_up of layer 2, expert 7). The two belong to different models.
```

`moejax inspect` finds the same errors without serving.

## Tokenizers and chat templates

`tokenizer.json`, SentencePiece (`tokenizer.model`) and tekken (`tekken.json`, extra `tekken`) are read, with the
special tokens of `tokenizer_config.json` and `special_tokens_map.json`; truncation, padding and dropout that a
training saved in `tokenizer.json` never act. An answer stops at the `eos_token_id` of `config.json` and
`generation_config.json` and at the tokenizer's `eos_token`. A text that names a token beyond the model's vocabulary
is refused. JSON files and templates may begin with a byte-order mark. Of the weights, `model.safetensors` or the
files of its index are read; `consolidated.*` beside them is not. Where the extra `tekken` is not installed, a
`tokenizer.json` beside `tekken.json` is used instead. Chat templates, tool calls and reasoning:
[conversations](conversations.md).
"""  # noqa: E501


def page() -> str:
    """The page in Markdown."""
    lacking = NOT_READ
    return (
        _HEAD + _families() + _MIDDLE + "".join(f"| `{kind}` | {lacking[kind]} |\n" for kind in sorted(lacking)) + _REST
    )


def _families() -> str:
    compared, shipped = _compared(), _shipped()
    rows = (
        f"| `{kind}` | {FAMILIES[kind].about} | {', '.join(shipped[kind])} | {compared[kind]} |\n"
        for kind in FAMILIES
        if kind in SERVED_FAMILIES
    )
    return "".join(rows)


def _shipped() -> defaultdict[str, list[str]]:
    """The shipped configurations of each family."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(MODELS.glob("*.json")):
        found[decoder_fields(read_json_object(path), path.name)[0]].append(path.stem)
    return found


def _compared() -> defaultdict[str, str]:
    """How each family was compared: its configurations, ranks, and whether through a server."""
    records = json.loads(_PARITY.read_text())["records"]
    by_family = defaultdict(list)
    for record in records:
        by_family[record["family"]].append(record)
    return defaultdict(str, {family: _told(found) for family, found in by_family.items()})


def _told(records: list[dict[str, Any]]) -> str:
    models, ranks = {each["model"] for each in records}, sorted({each["ranks"] for each in records})
    served = "; through a server, also with its rank killed" if any("server" in each["way"] for each in records) else ""
    many = f"{len(models)} configuration{'s' if len(models) > 1 else ''}"
    return f"{many}, {len(records)} comparisons, on {_and(ranks)} ranks{served}"


def _and(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


if __name__ == "__main__":
    print(page(), end="")
