#include "terms.h"

namespace nirvana {
namespace NIRVANA_LEVEL {
namespace {

// Rows that are walked together: the partial sums are loaded and stored once for all of them. Not 8: rows are often a
// multiple of 4 KB apart, so that the lines at one column fall into one 8-way set of the first-level cache (15 against 35
// GB/s at 4096 x 14336, fp32).
constexpr int kRows = 4;

// Sums of up to kRows rows for 16 columns: even and odd rows one after the other, then both.
template <typename Terms, typename Load>
NIRVANA_INLINE void add_rows(const Load& load, int rows, Floats* sums) {
  Floats odd[Terms::kCount] = {};
  for (int row = 0; row < rows; ++row) load(row, row % 2 ? odd : sums);
  for (int term = 0; term < Terms::kCount; ++term) sums[term] += odd[term];
}

template <typename Terms, typename W, typename G>
NIRVANA_INLINE void add_row_block(const char* w, int64_t w_step, const char* g, int64_t g_step, int rows, int64_t columns,
                                  int statistics, double* out, int64_t stride) {
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes, w += kLanes * W::kSize, g += kLanes * G::kSize) {
    Floats sums[Terms::kCount] = {};
    add_rows<Terms>(
        [&](int row, Floats* to) __attribute__((always_inline)) {
          Terms::add(W::load(w + row * w_step), G::load(g + row * g_step), to);
        },
        rows, sums);
    each_wanted<Terms>(statistics, [&](int s, int term) __attribute__((always_inline)) {
      double* to = out + s * stride + column;
      const Doubles total = read<Doubles>(to) + widen(sums[term]);
      std::memcpy(to, &total, sizeof total);
    });
  }
  if (column == columns) return;
  const int n = static_cast<int>(columns - column);
  Floats sums[Terms::kCount] = {};
  add_rows<Terms>(
      [&](int row, Floats* to) __attribute__((always_inline)) {
        Terms::add(load_first<W>(w + row * w_step, n), load_first<G>(g + row * g_step, n), to);
      },
      rows, sums);
  each_wanted<Terms>(statistics, [&](int s, int term) __attribute__((always_inline)) {
    double lanes[kLanes];
    const Doubles wide = widen(sums[term]);
    std::memcpy(lanes, &wide, sizeof lanes);
    for (int i = 0; i < n; ++i) out[s * stride + column + i] += lanes[i];
  });
}

template <typename Terms>
NIRVANA_INLINE void column_sums(const Reduction& r, int64_t first, int64_t last, int64_t left, int64_t right,
                                int statistics, double* out, int64_t stride) {
  with_types(r.weight.dtype, r.grad.dtype, [&](auto w_type, auto g_type) __attribute__((always_inline)) {
    using W = decltype(w_type);
    using G = decltype(g_type);
    const int64_t w_step = r.weight.row_stride * W::kSize, g_step = r.grad.row_stride * G::kSize;
    int64_t row = first;
    // The number of rows is a constant in the first call, so that its loops vanish.
    for (; row + kRows <= last; row += kRows) {
      add_row_block<Terms, W, G>(r.weight.at(row, left), w_step, r.grad.at(row, left), g_step, kRows, right - left,
                                 statistics, out, stride);
    }
    if (row < last) {
      add_row_block<Terms, W, G>(r.weight.at(row, left), w_step, r.grad.at(row, left), g_step,
                                 static_cast<int>(last - row), right - left, statistics, out, stride);
    }
  });
}

}  // namespace

void column_sums(const Reduction& r, int64_t first, int64_t last, int64_t left, int64_t right, int statistics,
                 double* out, int64_t stride) {
  if (statistics == kTaylor) {
    column_sums<TaylorTerm>(r, first, last, left, right, statistics, out, stride);
  } else {
    column_sums<AllTerms>(r, first, last, left, right, statistics, out, stride);
  }
}

}  // namespace NIRVANA_LEVEL
}  // namespace nirvana
