// What is summed: the statistics of 16 pairs of weight and gradient.
#pragma once

#include "lanes.h"

namespace nirvana {
namespace NIRVANA_LEVEL {

// The kernels come in two forms: sum |g w| alone, which is what pruning asks for, and all six at once for every other set.
struct TaylorTerm {
  static constexpr int kCount = 1;
  static NIRVANA_INLINE void add(Floats w, Floats g, Floats* sums) { sums[0] += absolute(g * w); }
};

struct AllTerms {
  static constexpr int kCount = kStatistics;
  static NIRVANA_INLINE void add(Floats w, Floats g, Floats* sums) {
    const Floats product = g * w;
    sums[0] += absolute(product);
    sums[1] += product;
    sums[2] += absolute(g);
    sums[3] += product * product;
    sums[4] += absolute(w);
    sums[5] += w * w;
  }
};

// Calls write(row of the result, index among the terms) for each statistic asked for.
template <typename Terms, typename Write>
NIRVANA_INLINE void each_wanted(int statistics, const Write& write) {
  if (Terms::kCount == 1) return write(0, 0);
  int row = 0;
  for (int index = 0; index < kStatistics; ++index) {
    if (statistics >> index & 1) write(row++, index);
  }
}

}  // namespace NIRVANA_LEVEL
}  // namespace nirvana
