// Gather-slice: one read and one write of each kept byte.
#include "gather.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <functional>

#include "levels.h"
#include "parallel.h"

namespace nirvana {
namespace {

// Kept units that follow each other: copied together.
struct Run {
  int64_t source;  // in units
  int64_t target;
  int64_t length;
};

std::vector<Run> runs_of(const int64_t* kept, int64_t count) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < count; ++i) {
    if (!runs.empty() && runs.back().source + runs.back().length == kept[i]) {
      ++runs.back().length;
    } else {
      runs.push_back({kept[i], i, 1});
    }
  }
  return runs;
}

// Fresh memory costs a page fault for every 4 KB, more than the copy itself; 2 MB pages cost nothing to speak of.
void ask_for_large_pages(char* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  // Only advice: a kernel without large pages refuses it, and nothing is lost.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Sixteen columns a word, bit c % 16 of word c / 16: for rising `kept`; empty for any other order.
std::vector<uint16_t> bits_of(const int64_t* kept, int64_t count, int64_t unit, int64_t columns) {
  if (std::adjacent_find(kept, kept + count, std::greater_equal<int64_t>()) != kept + count) return {};
  std::vector<uint16_t> bits((columns + 15) / 16);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t column = kept[i] * unit; column < (kept[i] + 1) * unit; ++column) bits[column / 16] |= 1 << column % 16;
  }
  return bits;
}

// Bytes written by one work item. Two threads that write to the same fresh 2 MB page at once both fill one with zeros, and
// one of them in vain: items of large results are larger than a page.
int64_t item_bytes(int64_t written) { return written >= int64_t{32} << 20 ? 4 << 20 : 1 << 18; }

template <typename Element>
void gather_elements(const char* from, const int32_t* columns, int64_t count, char* to) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * sizeof(Element), from + columns[i] * int64_t{sizeof(Element)}, sizeof(Element));
  }
}

// Outputs beyond this leave the caches before anybody reads them.
constexpr int64_t kBeyondCaches = 32 << 20;

// A copy that goes past the caches, which spares the memory a read of each line that is written: 35 instead of 28 GB/s for
// rows of 8 KB on a Zen 4.
void stream(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) & 15);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    for (int part = 0; part < 64; part += 16) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + part), value);
    }
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

void gather_rows(const std::vector<Gather>& table, const std::vector<Run>& runs, int64_t count, int64_t unit,
                 int threads) {
  // Pieces so small that one long run is shared by the threads too; short ones are dealt out together, or neighbouring
  // rows would be read by different cores, whose prefetchers then guess wrongly.
  struct Piece {
    const char* from;
    int64_t stride;
    char* to;
    int64_t rows;
    int64_t row_bytes;
  };
  std::vector<Piece> pieces;
  std::vector<size_t> items{0};  // where each begins among the pieces
  int64_t written = 0, filled = 0;
  for (const Gather& g : table) written += count * unit * g.row_bytes;
  const int64_t item_size = item_bytes(written);
  for (const Gather& g : table) {
    const int64_t step = std::max<int64_t>(1, item_size / g.row_bytes);
    for (const Run& run : runs) {
      for (int64_t row = 0; row < run.length * unit; row += step) {
        pieces.push_back({g.data + (run.source * unit + row) * g.row_stride, g.row_stride,
                          g.out + (run.target * unit + row) * g.row_bytes, std::min(step, run.length * unit - row),
                          g.row_bytes});
        filled += pieces.back().rows * g.row_bytes;
        if (filled >= item_size) {
          items.push_back(pieces.size());
          filled = 0;
        }
      }
    }
  }
  if (items.back() != pieces.size()) items.push_back(pieces.size());
  const bool far = written > kBeyondCaches;
  const auto copy = [far](char* to, const char* from, int64_t size) {
    if (far) {
      stream(to, from, size);
    } else {
      std::memcpy(to, from, size);
    }
  };
  parallel_for(static_cast<int64_t>(items.size()) - 1, 2 * written, threads, [&](int64_t item) {
    for (size_t index = items[item]; index < items[item + 1]; ++index) {
      const Piece& piece = pieces[index];
      if (piece.stride == piece.row_bytes) {
        copy(piece.to, piece.from, piece.rows * piece.row_bytes);
        continue;
      }
      for (int64_t row = 0; row < piece.rows; ++row) {
        copy(piece.to + row * piece.row_bytes, piece.from + row * piece.stride, piece.row_bytes);
      }
    }
#if defined(__SSE2__)
    if (far) _mm_sfence();  // streamed lines reach other cores in no order without it
#endif
  });
}

void gather_columns(const std::vector<Gather>& table, const std::vector<Run>& runs, const int64_t* kept, int64_t count,
                    int64_t unit, int threads) {
  const int64_t width = count * unit;
  // Long runs are copied as blocks; short ones element by element through a table, which needs no call each.
  const int64_t longest = *std::max_element(kept, kept + count) * unit + unit;
  const bool blocks = width >= static_cast<int64_t>(runs.size()) * 32 || longest > INT32_MAX;
  std::vector<int32_t> columns;
  std::vector<uint16_t> bits;
  if (!blocks) {
    int64_t widest = 0;
    for (const Gather& g : table) widest = std::max(widest, g.row_bytes / g.element_size);
    bits = bits_of(kept, count, unit, widest);
    columns.reserve(width);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < unit; ++j) columns.push_back(static_cast<int32_t>(kept[i] * unit + j));
    }
  }
  std::vector<int64_t> items{0}, steps;  // of each matrix: its first item, rows of an item
  int64_t bytes = 0, written = 0;
  for (const Gather& g : table) {
    bytes += g.rows * (g.row_bytes + width * g.element_size);
    written += g.rows * width * g.element_size;
  }
  for (const Gather& g : table) {
    steps.push_back(std::max<int64_t>(1, item_bytes(written) / (width * g.element_size)));
    items.push_back(items.back() + (g.rows + steps.back() - 1) / steps.back());
  }
  parallel_for(items.back(), bytes, threads, [&](int64_t item) {
    const int64_t index = std::upper_bound(items.begin(), items.end(), item) - items.begin() - 1;
    const Gather& g = table[index];
    const int64_t size = g.element_size, first = (item - items[index]) * steps[index];
    for (int64_t row = first; row < std::min(g.rows, first + steps[index]); ++row) {
      const char* from = g.data + row * g.row_stride;
      char* to = g.out + row * width * size;
      if (!bits.empty() && kernels().compress(from, bits.data(), g.row_bytes / size, static_cast<int>(size), to, width)) {
        continue;
      }
      if (!blocks && size <= 8) {
        switch (size) {
          case 1:
            gather_elements<uint8_t>(from, columns.data(), width, to);
            break;
          case 2:
            gather_elements<uint16_t>(from, columns.data(), width, to);
            break;
          case 4:
            gather_elements<uint32_t>(from, columns.data(), width, to);
            break;
          default:
            gather_elements<uint64_t>(from, columns.data(), width, to);
        }
        continue;
      }
      for (const Run& run : runs) {
        std::memcpy(to + run.target * unit * size, from + run.source * unit * size, run.length * unit * size);
      }
    }
  });
}

}  // namespace

void gather_slice(const std::vector<Gather>& table, const int64_t* kept, int64_t count, int axis, int64_t unit,
                  int threads) {
  for (const Gather& g : table) {
    const int64_t rows = axis == 0 ? count * unit : g.rows;
    ask_for_large_pages(g.out, rows * (axis == 0 ? g.row_bytes : count * unit * g.element_size));
  }
  const std::vector<Run> runs = runs_of(kept, count);
  if (axis == 0) {
    gather_rows(table, runs, count, unit, threads);
  } else {
    gather_columns(table, runs, kept, count, unit, threads);
  }
}

}  // namespace nirvana
