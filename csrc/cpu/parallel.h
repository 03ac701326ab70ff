// Fixed work items over a few threads. Items never depend on the number of threads, so neither do the results.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace nirvana {

// Below this many bytes for each, fewer threads are faster: starting and joining a second one takes about 24 us.
constexpr int64_t kBytesPerThread = 1 << 19;

// Calls body(item) once for each item in [0, items). std::thread and not OpenMP: a second OpenMP runtime beside torch's
// would have its own pool of threads, fighting for the same cores.
template <typename Body>
void parallel_for(int64_t items, int64_t bytes, int threads, const Body& body) {
  const int64_t useful = std::min<int64_t>({static_cast<int64_t>(threads), items, bytes / kBytesPerThread});
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(item);
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < useful; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had (a limit of the container): those that started, and this one, do it all.
  }
  work();
  for (auto& thread : others) thread.join();
}

}  // namespace nirvana
