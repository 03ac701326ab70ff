#pragma once

#include <cstdint>
#include <vector>

#define NIRVANA_INLINE inline __attribute__((always_inline))

namespace nirvana {

// The codes are part of the interface to Python.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

NIRVANA_INLINE int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Bits of the masks that Python sends; sums stand in their order.
enum Statistic : int {
  kTaylor = 1,      // sum |g w|
  kSigned = 2,      // sum g w
  kNtk = 4,         // sum |g|
  kFisher = 8,      // sum (g w)^2
  kMagnitude = 16,  // sum |w|
  kSquared = 32,    // sum w^2
};
constexpr int kStatistics = 6;

struct Matrix {
  const char* data;
  DType dtype;
  int64_t row_stride;  // in elements

  NIRVANA_INLINE const char* at(int64_t row, int64_t column) const {
    return data + (row * row_stride + column) * element_size(dtype);
  }
};

// One reduction: the sums over groups of `group` rows (axis 0) or columns (axis 1) are added to out, fp32
// [statistics, units].
struct Reduction {
  Matrix weight;
  Matrix grad;  // the weight again where no statistic asks for a gradient
  int64_t rows;
  int64_t columns;
  int axis;
  int64_t group;
  float* out;
};

// Runs all reductions of `table` over `threads` threads; those that share an `out` are added in the order of the table.
//
// The order of every sum depends on the shape alone: see levels.h.
void group_saliency(const std::vector<Reduction>& table, int statistics, int threads);

}  // namespace nirvana
