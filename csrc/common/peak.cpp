// The arithmetic ceiling of one SIMD level: 12 independent chains of multiply-adds in registers.
#include "peak.h"

#include "kernel.h"
#include "simd.h"

namespace vsod {
namespace VSOD_LEVEL {

namespace {

double multiply_add_loop(int64_t steps) {
  constexpr int kChains = 12;
  Vec<float> sum[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sum[c] = broadcast(float(c));  // different, so none is merged
#if defined(__AVX512BF16__)
  const __m512bh x = __m512bh(_mm512_set1_epi32(0x3f003f00));
  constexpr double kFlops = 4;
#else
  const Vec<float> x = broadcast(0.5f), y = broadcast(0.25f);
  constexpr double kFlops = 2;
#endif
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
#if defined(__AVX512BF16__)
      sum[c] = Vec<float>(_mm512_dpbf16_ps(__m512(sum[c]), x, x));
#else
      sum[c] = sum[c] * x + y;
#endif
    }
  }
  float total = 0;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) total += sum[c][0];
  volatile float sink = total;  // keeps the loop
  (void)sink;
  return kFlops * kLanes<float> * kChains * double(steps);
}

}  // namespace

extern const PeakLoop peak_loops[];
#if defined(__AVX512BF16__)
const PeakLoop peak_loops[] = {nullptr, nullptr, nullptr, multiply_add_loop};
#else
const PeakLoop peak_loops[] = {multiply_add_loop, nullptr, nullptr, multiply_add_loop};
#endif

}  // namespace VSOD_LEVEL
}  // namespace vsod
