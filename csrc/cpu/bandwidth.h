#pragma once

#include <cstdint>

namespace nirvana {

// Limits that benchmarks compare with: reads two buffers of `bytes` once and returns a checksum, or copies one to the other.
uint64_t read_bytes(const char* first, const char* second, int64_t bytes, int threads);
void copy_bytes(const char* from, char* to, int64_t bytes, int threads);

}  // namespace nirvana
