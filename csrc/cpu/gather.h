#pragma once

#include <cstdint>
#include <vector>

namespace nirvana {

// One matrix and where its kept part goes. Bytes are moved, never interpreted: any element type.
struct Gather {
  const char* data;
  int64_t row_stride;  // in bytes
  int64_t rows;
  int64_t row_bytes;
  int element_size;
  char* out;  // contiguous
};

// Copies the kept units of each matrix, `unit` consecutive rows (axis 0) or columns (axis 1) each, in the order of `kept`.
void gather_slice(const std::vector<Gather>& table, const int64_t* kept, int64_t count, int axis, int64_t unit,
                  int threads);

}  // namespace nirvana
