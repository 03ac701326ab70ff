#include "levels.h"

#include <atomic>
#include <cstring>

namespace nirvana {

#define NIRVANA_DECLARE(level)                                                                  \
  namespace level {                                                                             \
  void row_sums(const Reduction&, int64_t, int64_t, int, double*, int64_t);                     \
  void column_sums(const Reduction&, int64_t, int64_t, int64_t, int64_t, int, double*, int64_t); \
  void divergence(const Matrix&, const Matrix&, int64_t, int64_t, double*);                     \
  void mixture_sums(const float*, int64_t, const Mixture&, MixtureSums*);                        \
  void mixture_density(const float*, int64_t, const Mixture&, double*);                         \
  bool compress(const char*, const uint16_t*, int64_t, int, char*, int64_t);                    \
  uint64_t checksum(const char*, const char*, int64_t);                                         \
  }
NIRVANA_DECLARE(baseline)
#ifdef NIRVANA_X86_LEVELS
NIRVANA_DECLARE(avx2)
NIRVANA_DECLARE(avx512)
#endif
#undef NIRVANA_DECLARE

namespace {

#define NIRVANA_KERNELS(level) \
  {#level, level::row_sums, level::column_sums, level::divergence, level::mixture_sums, level::mixture_density, \
   level::compress, level::checksum}
const Kernels kLevels[] = {
    NIRVANA_KERNELS(baseline),
#ifdef NIRVANA_X86_LEVELS
    NIRVANA_KERNELS(avx2),
    NIRVANA_KERNELS(avx512),
#endif
};
#undef NIRVANA_KERNELS

bool has(const char* level) {
#ifdef NIRVANA_X86_LEVELS
  // What setup.py lets the compiler use at each level.
  if (!std::strcmp(level, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (!std::strcmp(level, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return !std::strcmp(level, "baseline");
}

const Kernels* best() {
  const Kernels* found = nullptr;
  for (const Kernels& kernels : kLevels) {
    if (has(kernels.level)) found = &kernels;
  }
  return found;
}

std::atomic<const Kernels*> chosen{best()};

}  // namespace

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

std::vector<const char*> levels() {
  std::vector<const char*> names;
  for (const Kernels& kernels : kLevels) {
    if (has(kernels.level)) names.push_back(kernels.level);
  }
  return names;
}

bool force_level(const char* level) {
  for (const Kernels& kernels : kLevels) {
    if (!std::strcmp(level, kernels.level) && has(level)) {
      chosen = &kernels;
      return true;
    }
  }
  return false;
}

}  // namespace nirvana
