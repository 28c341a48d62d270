// The gated delta rule and its kin on a CPU; see moejax/model/delta_net.py.
//
// One head of one chain of segments at a time. The state of a head lies in a buffer of the thread, and its rows are added
// one after the other: each number of a row's output is one sum over the keys, from the first to the last, whatever else
// is in the step.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "spread.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t TILE = 32, EMPTY = -1, CHAINED = -2;

// Adds one row to the state [Dk, Dv], of which each key decays by itself (every is 1) or all by one factor (0); out [Dv].
// If corrects, it adds the difference between the row's value and what the state has for its key.
void advance(float* __restrict state, const float* __restrict q, const float* __restrict k, const float* __restrict v,
             const float* decay, int64_t every, float rate, bool corrects, float* __restrict change,
             float* __restrict out, int64_t Dk, int64_t Dv) {
  std::fill_n(change, Dv, 0.0f);
  for (int64_t i = 0; i < Dk; ++i) {
    float* row = state + i * Dv;
    const float factor = decay[i * every];
    for (int64_t j = 0; j < Dv; ++j) row[j] *= factor;
    if (corrects)
      for (int64_t j = 0; j < Dv; ++j) change[j] += row[j] * k[i];
  }
  for (int64_t j = 0; j < Dv; ++j) change[j] = (v[j] - change[j]) * rate;
  std::fill_n(out, Dv, 0.0f);
  for (int64_t i = 0; i < Dk; ++i) {
    float* row = state + i * Dv;
    for (int64_t j = 0; j < Dv; ++j) row[j] += k[i] * change[j];
    for (int64_t j = 0; j < Dv; ++j) out[j] += row[j] * q[i];
  }
}

}  // namespace

// Outputs [R, V, Dv] and new states [Z, V, Dk, Dv]; see moejax.config.delta_inputs for the arguments.
ffi::Error DeltaRule(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                     ffi::Buffer<ffi::F32> decay, ffi::Buffer<ffi::F32> rate, ffi::Buffer<ffi::F32> states,
                     ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> source, ffi::ResultBuffer<ffi::F32> out,
                     ffi::ResultBuffer<ffi::F32> new_states, int64_t decode, int64_t corrects) {
  int64_t K = k.dimensions()[1], Dk = k.dimensions()[2], V = v.dimensions()[1], Dv = v.dimensions()[2];
  int64_t L = states.dimensions()[0], held = states.dimensions()[1], Z = source.dimensions()[0];
  int64_t at = layer.typed_data()[0], size = Dk * Dv;
  int64_t factors = decay.dimensions()[2], every = factors > 1 ? 1 : 0;
  if (factors != 1 && factors != Dk) return ffi::Error::InvalidArgument("delta_rule: no such number of decays");
  if (at < 0 || at >= L) return ffi::Error::InvalidArgument("delta_rule: no such layer");
  const int32_t* from = source.typed_data();
  std::vector<int64_t> chains;  // first segments of chains
  for (int64_t z = 0; z < Z; ++z)
    if (z == 0 || z < decode || from[z] != CHAINED) chains.push_back(z);
  chains.push_back(Z);
  spread(pool, (chains.size() - 1) * V, 1, 1, [&](int64_t first, int64_t last) {
    std::vector<float> state(size), change(Dv);
    for (int64_t job = first; job < last; ++job) {
      int64_t chain = job / V, head = job % V, key = head / (V / K), begin = chains[chain];
      if (from[begin] >= 0)
        std::copy_n(states.typed_data() + ((at * held + std::min<int64_t>(from[begin], held - 1)) * V + head) * size,
                    size, state.data());
      else
        std::fill(state.begin(), state.end(), 0.0f);
      for (int64_t z = begin; z < chains[chain + 1]; ++z) {
        int64_t row = z < decode ? z : decode + TILE * (z - decode), rows = z < decode ? 1 : TILE;
        for (int64_t r = row; r < row + rows; ++r) {
          int64_t one = r * V + head, keys = (r * K + key) * Dk;
          float written = rate.typed_data()[one];
          if (written < 0.0f) {  // padding
            std::fill_n(out->typed_data() + one * Dv, Dv, 0.0f);
            continue;
          }
          advance(state.data(), q.typed_data() + keys, k.typed_data() + keys, v.typed_data() + one * Dv,
                  decay.typed_data() + one * factors, every, written, corrects, change.data(),
                  out->typed_data() + one * Dv, Dk, Dv);
        }
        std::copy(state.begin(), state.end(), new_states->typed_data() + (z * V + head) * size);
      }
    }
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_delta_rule, DeltaRule,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("decode")
                                  .Attr<int64_t>("corrects"));
