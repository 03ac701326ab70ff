#pragma once

#include <cstdint>

namespace nirvana {

constexpr int kMostComponents = 8;

// Component k at x: log of weight times density = offset - ((x - mean) scale)^2.
struct Mixture {
  int components;
  float mean[kMostComponents], scale[kMostComponents], offset[kMostComponents];
};

// Over all scores x, with t = (x - mean) scale and r = the component's share of the density at x.
struct MixtureSums {
  double log_likelihood;
  double mass[kMostComponents], first[kMostComponents], second[kMostComponents];  // sum r, sum r t, sum r t^2
};

// nirvana.ops.mixture_bounds of each row of fp32 [units, length]: low and high fp32 [units], components int32 [units].
// One thread works on a row, so that bits do not depend on their number.
void mixture_bounds(const float* scores, int64_t units, int64_t length, int most, int64_t low_density, float* low,
                    float* high, int32_t* components, int threads);

}  // namespace nirvana
