// Python module nirvana._cpu: addresses, sizes and type codes in, nothing out. No torch headers, so that one build serves
// every release of torch; Python checks shapes, types and ranges before a call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "bandwidth.h"
#include "divergence.h"
#include "gather.h"
#include "levels.h"
#include "mixture.h"
#include "saliency.h"

namespace py = pybind11;
using nirvana::DType;
using nirvana::Matrix;

namespace {

template <typename Pointer>
Pointer address(int64_t value) {
  return reinterpret_cast<Pointer>(static_cast<uintptr_t>(value));
}

Matrix matrix(const int64_t* fields) {
  return {address<const char*>(fields[0]), static_cast<DType>(fields[1]), fields[2]};
}

// Rows of a table that Python sends as one flat list of integers.
template <typename Read>
auto rows_of(const std::vector<int64_t>& table, size_t fields, const Read& read) {
  if (table.size() % fields) throw std::invalid_argument("a table has rows of another length than this build expects");
  std::vector<decltype(read(table.data()))> rows;
  for (size_t i = 0; i < table.size(); i += fields) rows.push_back(read(&table[i]));
  return rows;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "C++ kernels for CPU tensors; called by nirvana.ops.backends.cpu";
  // Raised with every change of a signature below; Python refuses a build of another number.
  module.attr("INTERFACE") = 3;

  module.def(
      "group_saliency",
      // A row: weight (address, type, row stride), grad (the same), rows, columns, axis, group, address of out.
      [](const std::vector<int64_t>& table, int statistics, int threads) {
        const auto reductions = rows_of(table, 11, [](const int64_t* f) -> nirvana::Reduction {
          return {matrix(f), matrix(f + 3), f[6], f[7], static_cast<int>(f[8]), f[9], address<float*>(f[10])};
        });
        py::gil_scoped_release release;
        nirvana::group_saliency(reductions, statistics, threads);
      });

  module.def(
      "gather_slice",
      // A row: address, row stride in bytes, rows, bytes of a row, element size, address of out.
      [](const std::vector<int64_t>& table, int64_t kept, int64_t count, int axis, int64_t unit, int threads) {
        const auto gathers = rows_of(table, 6, [](const int64_t* f) -> nirvana::Gather {
          return {address<const char*>(f[0]), f[1], f[2], f[3], static_cast<int>(f[4]), address<char*>(f[5])};
        });
        py::gil_scoped_release release;
        nirvana::gather_slice(gathers, address<const int64_t*>(kept), count, axis, unit, threads);
      });

  module.def("kl_divergence", [](const std::vector<int64_t>& matrices, int64_t tokens, int64_t vocabulary, int64_t out,
                                 int64_t state, int threads) {
    const auto logits = rows_of(matrices, 3, matrix);
    py::gil_scoped_release release;
    nirvana::kl_divergence(logits.at(0), logits.at(1), tokens, vocabulary, address<float*>(out),
                           address<double*>(state), threads);
  });

  module.def("mixture_bounds", [](int64_t scores, int64_t low, int64_t high, int64_t components, int64_t units,
                                  int64_t length, int most, int64_t low_density, int threads) {
    py::gil_scoped_release release;
    nirvana::mixture_bounds(address<const float*>(scores), units, length, most, low_density, address<float*>(low),
                            address<float*>(high), address<int32_t*>(components), threads);
  });

  module.def("read_bytes", [](int64_t first, int64_t second, int64_t bytes, int threads) {
    py::gil_scoped_release release;
    return nirvana::read_bytes(address<const char*>(first), address<const char*>(second), bytes, threads);
  });
  module.def("copy_bytes", [](int64_t from, int64_t to, int64_t bytes, int threads) {
    py::gil_scoped_release release;
    nirvana::copy_bytes(address<const char*>(from), address<char*>(to), bytes, threads);
  });

  module.def("level", [] { return nirvana::kernels().level; });
  module.def("levels", [] { return nirvana::levels(); });
  module.def("force_level", &nirvana::force_level);
}
