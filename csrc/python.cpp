// What needs Python objects: build information, the instruction set, progress and cancellation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>

#include "codecs/all.h"
#include "codecs/cyclic_tables.h"
#include "cpu/isa.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace {

// Called between chunks of long work. Lets Ctrl-C through and tells the callback how far we are.
PyObject* callback = nullptr;

void progress(int64_t done, int64_t total) {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals()) throw py::error_already_set();
  if (callback) py::reinterpret_borrow<py::object>(callback)(done, total);
}

rs::Isa isa_from(const std::string& name) {
  for (rs::Isa isa : {rs::Isa::generic, rs::Isa::avx2, rs::Isa::avx512})
    if (name == rs::isa_name(isa)) return isa;
  throw std::invalid_argument("isa must be generic, avx2 or avx512, got '" + name + "'");
}

// In the order of rs::Accuracy.
constexpr const char* kAccuracies[] = {"auto", "exact", "int8"};

const char* axis_name(rs::Axis axis) {
  constexpr const char* names[] = {"out", "in", "both", "shared"};
  return names[static_cast<int>(axis)];
}

// What each term of a codec looks like here: for doctor, and for the test that Python agrees.
py::list describe(const std::string& codec, int64_t out, int64_t in) {
  py::list terms;
  for (const rs::Term& term : rs::resolve(rs::Spec::parse(codec), {out, in})) {
    const rs::Row& row = term.row;
    py::list params;
    for (const rs::ParamSpec& p : row.params)
      params.append(py::make_tuple(term.prefix + p.name, axis_name(p.axis), p.sizes));
    py::dict entry;
    entry["name"] = row.name;
    entry["tile"] = py::make_tuple(row.tile.rows, row.tile.cols, row.tile.bytes);
    entry["params"] = params;
    entry["hadamard"] = py::make_tuple(row.out_block, row.in_block);
    entry["linear"] = row.linear ? row.linear_type : "panels";
    entry["linear_int8"] = row.linear_int8 != nullptr;
    entry["linear_max_batch"] = row.linear ? row.linear_max_m : 0;
    entry["fast_panels"] = row.decode_bf16 != nullptr;
    terms.append(entry);
  }
  return terms;
}

// Asks for 2 MB pages under a buffer that kernels stream: a product at batch 1 is bound by memory,
// and small pages cost it up to a third. Best effort; the last call moves pages that are already
// there.
void huge_pages(uintptr_t data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
  if (end <= begin) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, missing from older headers
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

template <class T>
std::vector<int> numbers(const T& table) {
  const auto* first = reinterpret_cast<const std::remove_all_extents_t<T>*>(&table);
  return {first, first + sizeof table / sizeof *first};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  rs::set_progress_hook(progress);
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = RS_COMPILER;
    info["torch"] = RS_TORCH;
    info["cuda"] = RS_CUDA;
    py::list codecs;
    for (const rs::CodecEntry& entry : rs::kCodecs) codecs.append(entry.name);
    info["codecs"] = codecs;
    return info;
  });
  m.def("isa", [] { return rs::isa_name(rs::current_isa()); });
  m.def("best_isa", [] { return rs::isa_name(rs::best_isa()); });
  m.def("set_isa", [](const std::string& name) { rs::set_isa(isa_from(name)); });
  m.def("accuracy", [] { return kAccuracies[static_cast<size_t>(rs::accuracy())]; });
  m.def("set_accuracy", [](const std::string& name) {
    const auto at = std::find(std::begin(kAccuracies), std::end(kAccuracies), name);
    if (at == std::end(kAccuracies)) throw std::invalid_argument("no accuracy: " + name);
    rs::set_accuracy(static_cast<rs::Accuracy>(at - std::begin(kAccuracies)));
  });
  m.def("describe", describe);
  m.def("cyclic_tables", [] {
    py::dict tables;
    tables["cyclic"] = numbers(rs::kCyclic);
    tables["cyclic16"] = numbers(rs::kCyclic16.at);
    tables["cyclic256"] = numbers(rs::kCyclic256.at);
    tables["cyclic_scalar"] = numbers(rs::kCyclicScalar);
    return tables;
  });
  m.def("huge_pages", huge_pages);
  m.def("set_progress", [](py::object f) {
    Py_XDECREF(callback);
    callback = f.is_none() ? nullptr : f.release().ptr();
  });
}
