// Python module nirvana._cuda: addresses, sizes, type codes and a stream in, nothing out. No torch header, so that one
// build serves every release of torch, and no CUDA header, so that any C++ compiler builds this file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>

#include "launch.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

std::vector<nirvana::GatherMatrix> gather_matrices(const py::list& matrices) {
  std::vector<nirvana::GatherMatrix> result;
  for (const auto& item : matrices) {
    const auto fields = item.cast<py::tuple>();
    const auto address = [&](std::size_t i) { return fields[i].cast<Address>(); };
    const auto number = [&](std::size_t i) { return fields[i].cast<std::int64_t>(); };
    result.push_back({address(0), number(1), address(2), number(3), number(4)});
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.attr("INTERFACE") = 3;
  module.attr("TILES") = py::make_tuple(py::make_tuple(nirvana::kAxis0Rows, nirvana::kAxis0Columns),
                                        py::make_tuple(nirvana::kAxis1Rows, nirvana::kAxis1Columns));
  module.attr("FOLDS") = py::make_tuple(nirvana::kAxis0Fold, nirvana::kAxis1Fold);

  module.def("saliency", [](Address table, const std::vector<std::int64_t>& one, std::int64_t entries,
                            std::int64_t outputs, std::int64_t tiles, std::int64_t blocks, Address workspace,
                            int statistics, int device, Address stream) {
    py::gil_scoped_release release;
    nirvana::saliency(table, one, entries, outputs, tiles, blocks, workspace, statistics, {device, stream});
  });

  module.def("gather", [](const py::list& matrices, Address kept, int axis, std::int64_t unit, int device,
                          Address stream) {
    const auto converted = gather_matrices(matrices);
    py::gil_scoped_release release;
    nirvana::gather(converted, kept, axis, unit, {device, stream});
  });

  module.def("divergence_workspace", &nirvana::divergence_workspace);

  module.def("divergence", [](Address p, std::int64_t stride_p, int type_p, Address q, std::int64_t stride_q,
                              int type_q, std::int64_t tokens, std::int64_t vocabulary, Address out, Address state,
                              Address workspace, int device, Address stream) {
    py::gil_scoped_release release;
    nirvana::divergence({p, stride_p, type_p}, {q, stride_q, type_q}, tokens, vocabulary, out, state, workspace,
                        {device, stream});
  });
}
