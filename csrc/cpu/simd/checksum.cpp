#include "lanes.h"

namespace nirvana {
namespace NIRVANA_LEVEL {

// Reads two buffers side by side, as the saliency kernels do, and does as little else as the compiler allows.
uint64_t checksum(const char* first, const char* second, int64_t bytes) {
  using Words = uint64_t __attribute__((vector_size(64)));
  Words chains[4] = {};
  int64_t i = 0;
  for (; i + 128 <= bytes; i += 128) {
    for (int half = 0; half < 2; ++half) {
      chains[2 * half] ^= read<Words>(first + i + 64 * half);
      chains[2 * half + 1] ^= read<Words>(second + i + 64 * half);
    }
  }
  const Words all = chains[0] ^ chains[1] ^ chains[2] ^ chains[3];
  uint64_t result = 0;
  for (int lane = 0; lane < 8; ++lane) result ^= all[lane];
  for (; i < bytes; ++i) result ^= static_cast<uint64_t>(static_cast<unsigned char>(first[i] ^ second[i]));
  return result;
}

}  // namespace NIRVANA_LEVEL
}  // namespace nirvana
