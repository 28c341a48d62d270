"""Laws of what is read from a compiled program: loops count as often as they run, exchanges by their bytes."""

import re

import pytest

from moejax.runtime.compiled_cost import read_cost

PROGRAM = """\
HloModule jit_run_step, is_scheduled=true

%pages_condition (p.1: (s32[], s32[])) -> pred[] {
  %a = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %b = s32[]{:T(128)} get-tuple-element(%p.1), index=1
  ROOT %lt.1 = pred[]{:T(512)} compare(%a, %b), direction=LT, metadata={op_name="run/attention/lt"}
}

%pages_body (p.2: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %f.1 = (s32[]) fusion(%p.2), calls=%x, metadata={op_name="run/attention/while/body/add"} CYCLES 7
}

%layers_condition (p.3: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%layers_body (p.4: (s32[])) -> (s32[]) {
  %w.1 = (s32[]) while(%t), condition=%pages_condition, body=%pages_body, metadata={op_name="run/attention/while"}
  %e = f32[4,2,8]{2,1,0} all-to-all(%q), channel_id=1, dimensions={0}, metadata={op_name="run/dispatch/all_to_all"}
  %c = f32[8]{0} copy(%q) CYCLES 100
  %k = f32[8]{0} custom-call(%c), custom_call_target="tpu_custom_call", metadata={op_name="run/experts/pallas_call"}
  ROOT %r = (s32[]) tuple(%i)
}

ENTRY %main (p.5: s32[]) -> s32[] {
  %g = f32[8]{0} fusion(%p.5), kind=kLoop, calls=%y, metadata={op_name="run/embed/gather"} CYCLES 11
  %w.2 = (s32[]) while(%t0), condition=%layers_condition, body=%layers_body, metadata={op_name="run/while"}
  ROOT %out = s32[] get-tuple-element(%w.2), index=0
}
"""
PROGRAM = re.sub(r" CYCLES (\d+)", r', backend_config={"window_config":{"estimated_cycles":"\1"}}', PROGRAM)


@pytest.mark.parametrize("pages", [1, 3, 64])
def test_a_loop_counts_as_often_as_it_runs(pages: int) -> None:
    cost = read_cost(PROGRAM, {"attention": pages})
    assert cost.cycles == {"embed": 11, "attention": 5 * pages * 7, "rest": 5 * 100}
    assert cost.unknown_loops == 0


def test_a_loop_without_a_trip_count_counts_once_and_is_reported() -> None:
    cost = read_cost(PROGRAM, {})
    assert cost.cycles["attention"] == 5 * 7
    assert cost.unknown_loops == 1


def test_exchanges_count_by_their_bytes() -> None:
    cost = read_cost(PROGRAM, {"attention": 1})
    assert (cost.exchanges, cost.exchange_bytes) == (5, 5 * 4 * 2 * 8 * 4)


def test_kernels_are_counted_by_part() -> None:
    assert read_cost(PROGRAM, {"attention": 1}).kernels == {"experts": 5}


def test_seconds_follow_the_clock_of_the_device_and_an_unknown_one_has_none() -> None:
    cost = read_cost(PROGRAM, {"attention": 1})
    assert cost.seconds("TPU v5 lite")["rest"] == pytest.approx(500 / 1.5e9)
    assert cost.seconds("cpu") == {}
