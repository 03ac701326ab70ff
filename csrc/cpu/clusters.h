// k-means of sorted numbers: a cluster is a run of them, so that sums of prefixes are all it takes.
#pragma once

#include <cstdint>
#include <vector>

namespace nirvana {

// Sorted numbers, which must outlive this, and the sums of all before each.
class Line {
 public:
  Line(const float* sorted, int64_t length);

  int64_t length() const { return length_; }
  float operator[](int64_t index) const { return sorted_[index]; }
  double mean(int64_t begin, int64_t end) const { return (sums_[end] - sums_[begin]) / static_cast<double>(end - begin); }
  // Index of the first number above `limit`.
  int64_t above(double limit) const;

 private:
  const float* sorted_;
  int64_t length_;
  std::vector<double> sums_;
};

class Clusters {
 public:
  // One cluster of all numbers of `line`, which must outlive this.
  explicit Clusters(const Line& line) : line_(&line), cuts_{0, line.length()} {}

  // Whether a cluster has different numbers.
  bool divisible(int cluster) const { return (*line_)[begin(cluster)] < (*line_)[end(cluster) - 1]; }
  // One cluster more: `cluster` is cut where that lowers the sum of squares most; then Lloyd's steps of all until
  // nothing moves.
  Clusters split(int cluster) const;

  int count() const { return static_cast<int>(cuts_.size()) - 1; }
  int64_t begin(int cluster) const { return cuts_[cluster]; }
  int64_t end(int cluster) const { return cuts_[cluster + 1]; }
  double mean(int cluster) const { return line_->mean(begin(cluster), end(cluster)); }

 private:
  bool lloyd();

  const Line* line_;
  std::vector<int64_t> cuts_, moved_;
};

}  // namespace nirvana
