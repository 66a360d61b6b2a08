// The tables as a Python module; every function's first argument is the lane type's name.
#include "table.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

// TABLES(X), defined by the build, is X(name, whether this CPU can run it) for every table.
#define DECLARE(name, supported) extern const Table name;
#define ENTRY(name, supported) {&name, bool(supported)},
TABLES(DECLARE)

struct Entry {
  const Table* table;
  bool supported;
};

static const std::vector<Entry>& entries() {
  static const std::vector<Entry> all{TABLES(ENTRY)};
  return all;
}

static const Table& table(const std::string& name) {
  for (const Entry& e : entries()) {
    if (e.supported && e.table->name == name) return *e.table;
  }
  throw py::key_error(name);
}

static py::dtype element(const Table& t) {
  return t.element_size == 4 ? py::dtype::of<float>() : py::dtype::of<double>();
}

// The input as a contiguous array of the table's element type.
static py::array elements(const Table& t, const py::array& x) {
  bool right = x.dtype().itemsize() == t.element_size && x.dtype().kind() == 'f';
  if (!right) throw py::type_error("wrong element type");
  return py::array::ensure(x, py::array::c_style);
}

using Words = py::array_t<uint32_t, py::array::c_style>;
using Shape = std::vector<py::ssize_t>;

PYBIND11_MODULE(bnn_fast_headers, m) {
  // {name: (width, dtype)} of the lane types that this CPU can run
  m.def("lanes", [] {
    py::dict widths;
    for (const Entry& e : entries()) {
      if (e.supported) widths[e.table->name] = py::make_tuple(e.table->width, element(*e.table));
    }
    return widths;
  });
  m.def("elementary", [](const std::string& lane, const std::string& function, const py::array& x) {
    const Table& t = table(lane);
    py::array input = elements(t, x), y(element(t), Shape{x.size()});
    t.elementary(function.c_str(), input.data(), y.mutable_data(), x.size());
    return y;
  });
  m.def("on_word", [](const std::string& lane, const std::string& function, const Words& x) {
    const Table& t = table(lane);
    py::array y(element(t), Shape{x.size()});
    t.on_word(function.c_str(), x.data(), y.mutable_data(), x.size());
    return y;
  });
  m.def("philox", [](const std::string& lane, const Words& counters, uint32_t k0, uint32_t k1) {
    Words words(Shape{4, counters.shape(1)});
    table(lane).philox(counters.data(), k0, k1, words.mutable_data(), counters.shape(1));
    return words;
  });
  m.def("normal4", [](const std::string& lane, const Words& words) {
    const Table& t = table(lane);
    py::array normals(element(t), Shape{4, words.shape(1)});
    t.normal4(words.data(), normals.mutable_data(), words.shape(1));
    return normals;
  });
  m.def("draw", [](const std::string& lane, uint64_t seed, uint32_t stream, uint32_t sample, uint32_t row,
                   size_t n) {
    const Table& t = table(lane);
    if (n % (4 * t.width)) throw py::value_error("n must be a multiple of four times the width");
    py::array normals(element(t), Shape{static_cast<py::ssize_t>(n)});
    t.draw(seed, stream, sample, row, normals.mutable_data(), n);
    return normals;
  });
  m.def("spread", [](const std::string& lane, int scale, const py::array& rho) {
    const Table& t = table(lane);
    py::array input = elements(t, rho), four(element(t), Shape{4, rho.size()});
    t.spread(scale, input.data(), four.mutable_data(), rho.size());
    return four;
  });
  m.def("divergence", [](const std::string& lane, int scale, const py::array& mu, const py::array& rho,
                         const py::array& eps, double loc, double prior_scale) {
    const Table& t = table(lane);
    bool alike = mu.size() == rho.size() && eps.size() == rho.size();
    if (!alike) throw py::value_error("mu, rho, eps differ in size");
    py::array a = elements(t, mu), b = elements(t, rho), c = elements(t, eps);
    py::array four(element(t), Shape{4, rho.size()});
    t.divergence(scale, a.data(), b.data(), c.data(), loc, prior_scale, four.mutable_data(), rho.size());
    return four;
  });
}
