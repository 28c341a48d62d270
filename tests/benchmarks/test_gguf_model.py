"""A model written as GGUF has the numbers that it had, where llama.cpp looks for them."""

import dataclasses

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from benchmarks.gguf_model import write_gguf
from moejax.config.config_values import ConfigError
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.models import DENSE, MIXTRAL, model_folder

WIDE = dataclasses.replace(MIXTRAL, moe=dataclasses.replace(MIXTRAL.moe, d_expert=64), stop_tokens=(0,))


@pytest.mark.parametrize(("form", "error"), [("bfloat16", 0.004), ("Q8_0", 0.008), ("Q4_0", 0.13)])
def test_tensors_are_those_of_the_model(tmp_path, form, error):
    params = model_folder(tmp_path / "m", WIDE)
    (tmp_path / "m/tokenizer.json").write_text(byte_tokenizer().format.inner.to_str())
    write_gguf(tmp_path / "m", tmp_path / "m.gguf", form)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {each.name: dequantize(each.data, each.tensor_type) for each in reader.tensors}
    layer, heads = params.segments[0][0], WIDE.n_heads * WIDE.d_head

    def near(name, values):
        np.testing.assert_allclose(found[name], values, rtol=0, atol=error * np.abs(values).max(), err_msg=name)

    near("blk.1.ffn_up_exps.weight", layer.moe.experts.gate_up[1][:, 64:])
    near("blk.2.ffn_down_exps.weight", layer.moe.experts.down[2])
    query = layer.qkv[0][: WIDE.d_head]  # the halves that moejax rotates are neighbours in GGUF
    half = WIDE.d_head // 2
    near("output.weight", params.embed if params.head is None else params.head)
    np.testing.assert_array_equal(found["blk.0.ffn_gate_inp.weight"], layer.moe.router[0])
    first = found["blk.0.attn_q.weight"][: WIDE.d_head]
    np.testing.assert_allclose(first[::2], query[:half], rtol=0, atol=error * np.abs(query).max())
    np.testing.assert_allclose(first[1::2], query[half:], rtol=0, atol=error * np.abs(query).max())
    assert found["blk.0.attn_q.weight"].shape == (heads, WIDE.d_model)


def test_a_model_of_other_layers_is_refused(tmp_path):
    model_folder(tmp_path / "m", DENSE)
    with pytest.raises(ConfigError, match="only 'moe' is written"):
        write_gguf(tmp_path / "m", tmp_path / "m.gguf", "Q8_0")
