#include "terms.h"

namespace nirvana {
namespace NIRVANA_LEVEL {
namespace {

constexpr int64_t kBlock = 2048;
// Independent accumulators: an addition takes four cycles and two start in each.
constexpr int kChains = 4;

template <typename Terms, typename W, typename G>
NIRVANA_INLINE void add_block(const char* w, const char* g, int n, Floats* sums) {
  constexpr int kStep = kChains * kLanes;
  Floats chains[kChains][Terms::kCount] = {};
  int i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int chain = 0; chain < kChains; ++chain) {
      const int at = i + chain * kLanes;
      Terms::add(W::load(w + at * W::kSize), G::load(g + at * G::kSize), chains[chain]);
    }
  }
  for (; i + kLanes <= n; i += kLanes) Terms::add(W::load(w + i * W::kSize), G::load(g + i * G::kSize), chains[0]);
  if (i < n) {
    Terms::add(load_first<W>(w + i * W::kSize, n - i), load_first<G>(g + i * G::kSize, n - i), chains[1]);
  }
  for (int term = 0; term < Terms::kCount; ++term) {
    sums[term] = (chains[0][term] + chains[1][term]) + (chains[2][term] + chains[3][term]);
  }
}

template <typename Terms>
NIRVANA_INLINE void row_sums(const Reduction& r, int64_t first, int64_t last, int statistics, double* sums,
                             int64_t stride) {
  with_types(r.weight.dtype, r.grad.dtype, [&](auto w_type, auto g_type) __attribute__((always_inline)) {
    for (int64_t row = first; row < last; ++row) {
      double totals[Terms::kCount] = {};
      for (int64_t column = 0; column < r.columns; column += kBlock) {
        const int n = static_cast<int>(smaller(kBlock, r.columns - column));
        Floats block[Terms::kCount];
        add_block<Terms, decltype(w_type), decltype(g_type)>(r.weight.at(row, column), r.grad.at(row, column), n, block);
        for (int term = 0; term < Terms::kCount; ++term) totals[term] += sum(block[term]);
      }
      each_wanted<Terms>(statistics, [&](int s, int term) { sums[s * stride + row] = totals[term]; });
    }
  });
}

}  // namespace

void row_sums(const Reduction& r, int64_t first, int64_t last, int statistics, double* sums,
                             int64_t stride) {
  if (statistics == kTaylor) {
    row_sums<TaylorTerm>(r, first, last, statistics, sums, stride);
  } else {
    row_sums<AllTerms>(r, first, last, statistics, sums, stride);
  }
}

}  // namespace NIRVANA_LEVEL
}  // namespace nirvana
