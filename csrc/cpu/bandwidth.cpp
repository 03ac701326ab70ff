#include "bandwidth.h"

#include <atomic>
#include <cstring>

#include "levels.h"
#include "parallel.h"

namespace nirvana {
namespace {

constexpr int64_t kChunk = 1 << 20;

}  // namespace

uint64_t read_bytes(const char* first, const char* second, int64_t bytes, int threads) {
  std::atomic<uint64_t> checksum{0};
  parallel_for((bytes + kChunk - 1) / kChunk, 2 * bytes, threads, [&](int64_t item) {
    const int64_t start = item * kChunk, size = std::min(kChunk, bytes - start);
    checksum ^= kernels().checksum(first + start, second + start, size);
  });
  return checksum;
}

void copy_bytes(const char* from, char* to, int64_t bytes, int threads) {
  parallel_for((bytes + kChunk - 1) / kChunk, 2 * bytes, threads, [&](int64_t item) {
    const int64_t start = item * kChunk;
    std::memcpy(to + start, from + start, std::min(kChunk, bytes - start));
  });
}

}  // namespace nirvana
