"""Requests for moejax.v1.Inference: valid ones, and bytes that may be anything."""

from hypothesis import strategies as st

from serving.proto.moejax.v1 import inference_pb2


def asking(text: str = "a", **sampling) -> inference_pb2.GenerateRequest:
    """A request with this prompt and these sampling fields."""
    return inference_pb2.GenerateRequest(text=text, sampling=inference_pb2.SamplingParams(**sampling))


BYTES_OF_A_REQUEST = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda text, t, k, n, seed, stop, ids: asking(
            text, temperature=t, top_k=k, max_tokens=n, seed=seed, stop=stop, stop_token_ids=ids
        ).SerializeToString(),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.floats(width=32),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(-(2**63), 2**63 - 1),
        st.lists(st.text("ab", max_size=3), max_size=3),
        st.lists(st.integers(0, 2**32 - 1), max_size=3),
    ),
)
