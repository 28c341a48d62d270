"""vLLM's gRPC service with the messages gateways use."""

import hashlib
import io
import zipfile
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

pytest.importorskip("smg_grpc_proto", reason="needs moejax[vllm]")

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as stubs
from smg_grpc_proto.generated import common_pb2 as common

from serving.api.grpc.vllm import VllmEngine
from serving.auth.api_keys import ApiKeyFile
from serving.auth.limits import CallLimits
from serving.config import Settings
from serving.text.tokenizer import Message, Tokenizer
from serving.text.tokenizer_archive import tokenizer_archive
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve

pytestmark = pytest.mark.anyio
TINY = Path(__file__).parents[4] / "models" / "tiny"


def asking(*tokens: int, stream: bool = True, **sampling) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id="r",
        tokenized=pb.TokenizedInput(input_ids=tokens),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )


async def play(backend: FakeBackend, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with serve(backend, vllm=True) as server, grpc.aio.insecure_channel(server.address) as channel:
        return [response async for response in stubs.VllmEngineStub(channel).Generate(request)]


@pytest.mark.parametrize("stream", [True, False])
async def test_tokens_stream_and_come_whole_at_the_end(backend, stream):
    *chunks, last = await play(backend, asking(97, stream=stream, max_tokens=3, logprobs=0))
    assert last.complete.output_ids == [98, 99, 100]
    assert (last.complete.finish_reason, last.complete.prompt_tokens, last.complete.completion_tokens) == (
        "length",
        1,
        3,
    )
    assert list(last.complete.output_logprobs.token_logprobs) == [-0.5] * 3
    assert [t for c in chunks for t in c.chunk.token_ids] == ([98, 99, 100] if stream else [])
    assert [c.chunk.completion_tokens for c in chunks] == ([1, 2, 3] if stream else [])


async def test_each_of_n_answers_has_its_own_end(backend):
    answers = await play(backend, asking(97, stream=False, max_tokens=2, n=3))
    assert sorted(a.complete.index for a in answers) == [0, 1, 2]


async def test_a_stop_token_is_named(backend):
    (last,) = await play(backend, asking(97, stream=False, stop_token_ids=[99]))
    assert (last.complete.finish_reason, last.complete.matched_token_id) == ("stop", 99)


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(request_id="r"),
        asking(97, structural_tag="x"),
        asking(97, include_stop_str_in_output=True),
        asking(97, truncate_prompt_tokens=1),
        asking(97, temperature=-1),
        pb.GenerateRequest(text="a", media_refs=pb.MediaRefs()),
        pb.GenerateRequest(text="a", kv_transfer_params_json="{}"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(backend, request_):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await play(backend, request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert backend.requests == []


async def test_a_gateway_learns_what_it_needs(backend):
    async with serve(backend, vllm=True) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = stubs.VllmEngineStub(channel)
        assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        model = await stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.max_context_length, model.vocab_size) == ("fake", 256, 300)
        assert (await stub.GetServerInfo(pb.GetServerInfoRequest())).server_type == "vllm-grpc"
        load = (await stub.GetLoads(pb.GetLoadsRequest())).loads[0]
        assert (load.max_total_num_tokens, load.num_used_tokens) == (4 * 64 * 16, 48 * 16)
        backend.dead = {0, 1, 2, 3}
        assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Embed(pb.EmbedRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        names = [s.name async for answer in listed for s in answer.list_services_response.service]
        assert "vllm.grpc.engine.VllmEngine" in names


async def test_the_tokenizer_that_is_sent_makes_the_same_tokens(backend, tmp_path):
    used = Tokenizer.load(TINY)
    async with serve(backend, vllm=True) as server, grpc.aio.insecure_channel(server.address) as channel:
        server.processor.tokenizer = used
        chunks = [chunk async for chunk in stubs.VllmEngineStub(channel).GetTokenizer(common.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()]
    assert data == tokenizer_archive(used)
    zipfile.ZipFile(io.BytesIO(data)).extractall(tmp_path)
    sent, text = Tokenizer.load(tmp_path), "Good morrow, cousin. 1597 \u00e9"
    assert sent.encode(text) == used.encode(text)
    turns = [Message("user", text)]
    assert sent.chat(turns) == used.chat(turns)
    assert sent.info == used.info


async def test_a_method_that_is_missing_is_unimplemented_without_a_traceback(backend, caplog):
    async with serve(backend, vllm=True) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = stubs.VllmEngineStub(channel)
        for call in (stub.FlushCache(common.FlushCacheRequest()), stub.StartProfile(common.StartProfileRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [batch async for batch in stub.SubscribeKvEvents(common.SubscribeKvEventsRequest())]
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert [record for record in caplog.records if record.exc_info] == []
    assert set(vars(VllmEngine)) >= set(pb.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name)


async def test_the_service_is_guarded_like_ours_and_absent_unless_asked_for(tmp_path):
    keys = ApiKeyFile(tmp_path / "keys.json")
    keys.add("a")
    limits = CallLimits.of(Settings(api_keys=str(keys.path)))
    for options, code in (
        ({"vllm": True, "limits": limits}, grpc.StatusCode.UNAUTHENTICATED),
        ({}, grpc.StatusCode.UNIMPLEMENTED),
    ):
        async with serve(FakeBackend(), **options) as server, grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stubs.VllmEngineStub(channel).HealthCheck(pb.HealthCheckRequest())
            assert caught.value.code() is code
