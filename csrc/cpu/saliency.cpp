// Many reductions as one list of work items: row blocks of each matrix, then totals of each unit.
#include "saliency.h"

#include <algorithm>

#include "levels.h"
#include "parallel.h"

namespace nirvana {
namespace {

// Rows of one item (axis 0): 64 x 14 336 fp32 pairs are 7 MB, and 576 rows still make 9 items.
constexpr int64_t kRowsPerItem = 64;
// One item of axis 1 reads whole rows, as memory likes it: strips of 4096 columns gave 27 instead of 35 GB/s at 4096 x
// 14336. 16 384 fp64 partial sums fit the second-level cache; those that go through memory are one for 128 elements.
constexpr int64_t kRowBlock = 128;
constexpr int64_t kStrip = 16384;
// Units whose totals are one item.
constexpr int64_t kUnitsPerItem = 4096;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sums of one reduction before they are added to its out.
struct Partial {
  std::vector<double> sums;  // [statistics, rows] (axis 0), [row blocks, statistics, columns] (axis 1)
  std::vector<float> units;  // [statistics, units]
  int64_t items;
  int64_t strips;
};

}  // namespace

void group_saliency(const std::vector<Reduction>& table, int statistics, int threads) {
  const int count = __builtin_popcount(static_cast<unsigned>(statistics));
  std::vector<Partial> partials(table.size());
  // Item i belongs to the reduction whose range of items holds it.
  std::vector<int64_t> sum_items{0}, unit_items{0};
  int64_t bytes = 0, partial_bytes = 0;
  for (size_t index = 0; index < table.size(); ++index) {
    const Reduction& r = table[index];
    Partial& partial = partials[index];
    const int64_t blocks = divided_up(r.rows, kRowBlock);
    const int64_t units = (r.axis == 0 ? r.rows : r.columns) / r.group;
    partial.strips = divided_up(r.columns, kStrip);
    if (r.axis == 0) {
      partial.items = divided_up(r.rows, kRowsPerItem);
      partial.sums.resize(count * r.rows);
    } else {
      partial.items = blocks * partial.strips;
      partial.sums.resize(blocks * count * r.columns);
    }
    partial_bytes += 8 * partial.sums.size();
    partial.units.resize(count * units);
    bytes += r.rows * r.columns * (element_size(r.weight.dtype) + element_size(r.grad.dtype));
    sum_items.push_back(sum_items.back() + partial.items);
    unit_items.push_back(unit_items.back() + divided_up(units, kUnitsPerItem));
  }
  const auto owner = [](const std::vector<int64_t>& items, int64_t item) {
    return std::upper_bound(items.begin(), items.end(), item) - items.begin() - 1;
  };

  parallel_for(sum_items.back(), bytes, threads, [&](int64_t item) {
    const int64_t index = owner(sum_items, item);
    const Reduction& r = table[index];
    Partial& partial = partials[index];
    item -= sum_items[index];
    if (r.axis == 0) {
      const int64_t first = item * kRowsPerItem;
      kernels().row_sums(r, first, std::min(r.rows, first + kRowsPerItem), statistics, partial.sums.data(), r.rows);
    } else {
      const int64_t block = item / partial.strips, left = item % partial.strips * kStrip;
      kernels().column_sums(r, block * kRowBlock, std::min(r.rows, (block + 1) * kRowBlock), left,
                  std::min(r.columns, left + kStrip), statistics, &partial.sums[block * count * r.columns + left],
                  r.columns);
    }
  });

  // fp64 over row blocks and over the group, rounded once.
  parallel_for(unit_items.back(), partial_bytes, threads, [&](int64_t item) {
    const int64_t index = owner(unit_items, item);
    const Reduction& r = table[index];
    Partial& partial = partials[index];
    const int64_t length = r.axis == 0 ? r.rows : r.columns, units = length / r.group;
    const int64_t first = (item - unit_items[index]) * kUnitsPerItem, last = std::min(units, first + kUnitsPerItem);
    const int64_t blocks = r.axis == 0 ? 1 : divided_up(r.rows, kRowBlock);
    std::vector<double> totals(last - first);
    for (int s = 0; s < count; ++s) {
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = (block * count + s) * length;
        for (int64_t unit = first; unit < last; ++unit) {
          double& total = totals[unit - first];
          for (int64_t i = unit * r.group; i < (unit + 1) * r.group; ++i) total += partial.sums[start + i];
        }
      }
      for (int64_t unit = first; unit < last; ++unit) {
        partial.units[s * units + unit] = static_cast<float>(totals[unit - first]);
      }
    }
  });

  // One after the other, because reductions may share an out. At most one value a unit: nothing beside the sums.
  for (size_t index = 0; index < table.size(); ++index) {
    for (size_t i = 0; i < partials[index].units.size(); ++i) table[index].out[i] += partials[index].units[i];
  }
}

}  // namespace nirvana
