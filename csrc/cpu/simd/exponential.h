// What sums of exponentials are made of.
#pragma once

#include "lanes.h"

namespace nirvana {
namespace NIRVANA_LEVEL {
namespace {

NIRVANA_INLINE Floats greater(Floats a, Floats b) { return select(a > b, a, b); }

// e^x for x <= 0, 0 below -87 (where e^x is 1e-38 of the largest term), NaN for NaN. Relative error at most 1.2e-7.
// Cody and Waite: x = n ln 2 + r, e^r from its Taylor series to r^7 / 7! (|r| <= 0.35: 2e-9), 2^n put together from bits.
NIRVANA_INLINE Floats exponential(Floats x) {
  // 1.5 * 2^23 + 127: adding it leaves the nearest integer in the low bits, with the bias of exponents.
  constexpr float kRound = 12583039.0f;
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  // ln 2 in two parts; n * 0.693359375 is exact.
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats tail = r * (1.0f / 5040) + 1.0f / 720;
  tail = tail * r + 1.0f / 120;
  tail = tail * r + 1.0f / 24;
  tail = tail * r + 1.0f / 6;
  tail = tail * r + 0.5f;
  const Floats value = (tail * r * r + r) + 1.0f;
  const Floats scale = bits_of<FloatRegister>((bits_of<IntRegister>(shifted) & 0xff) << 23);
  return select(x < -87.0f, all(0.0f), value * scale);
}

}  // namespace
}  // namespace NIRVANA_LEVEL
}  // namespace nirvana
