// k-means of sorted numbers: a cluster is a run of them, so that sums of prefixes are all it takes.
#pragma once

#include <cstdint>
#include <vector>

namespace nirvana {

class Clusters {
 public:
  // One cluster of all `sorted` numbers, which must outlive this.
  Clusters(const float* sorted, int64_t length);

  // One cluster more: the cut that lowers the sum of squares most, then Lloyd's steps until nothing moves.
  void split();

  int count() const { return static_cast<int>(cuts_.size()) - 1; }
  int64_t begin(int cluster) const { return cuts_[cluster]; }
  int64_t end(int cluster) const { return cuts_[cluster + 1]; }
  double mean(int cluster) const { return mean(begin(cluster), end(cluster)); }

 private:
  double mean(int64_t begin, int64_t end) const { return (sums_[end] - sums_[begin]) / static_cast<double>(end - begin); }
  bool lloyd();

  const float* sorted_;
  int64_t length_;
  std::vector<double> sums_;  // of the numbers before each
  std::vector<int64_t> cuts_, moved_;
};

}  // namespace nirvana
