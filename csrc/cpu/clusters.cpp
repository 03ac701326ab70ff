#include "clusters.h"

#include <algorithm>

namespace nirvana {

namespace {

constexpr int kLloydSteps = 300;

}  // namespace

Line::Line(const float* sorted, int64_t length) : sorted_(sorted), length_(length) {
  sums_.resize(static_cast<size_t>(length) + 1);
  for (int64_t i = 0; i < length; ++i) sums_[i + 1] = sums_[i] + sorted[i];
}

int64_t Line::above(double limit) const { return std::upper_bound(sorted_, sorted_ + length_, limit) - sorted_; }

Clusters Clusters::split(int cluster) const {
  double best = -1;
  const int64_t left = begin(cluster), right = end(cluster);
  int64_t place = right;
  for (int64_t i = left + 1; i < right; ++i) {
    const double size = static_cast<double>(i - left) * static_cast<double>(right - i) / static_cast<double>(right - left);
    const double gap = line_->mean(left, i) - line_->mean(i, right);
    if (gap * gap * size > best) {
      best = gap * gap * size;
      place = i;
    }
  }
  Clusters more = *this;
  more.cuts_.insert(more.cuts_.begin() + cluster + 1, place);
  for (int step = 0; step < kLloydSteps && more.lloyd(); ++step) {
  }
  return more;
}

// Each number to the nearest mean. False where that changes nothing, or would leave a cluster without a number.
bool Clusters::lloyd() {
  moved_ = cuts_;
  for (int cluster = 1; cluster < count(); ++cluster) {
    moved_[cluster] = line_->above((mean(cluster - 1) + mean(cluster)) / 2);
  }
  for (int cluster = 0; cluster < count(); ++cluster) {
    if (moved_[cluster] >= moved_[cluster + 1]) return false;
  }
  if (moved_ == cuts_) return false;
  cuts_.swap(moved_);
  return true;
}

}  // namespace nirvana
