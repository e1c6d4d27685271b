// What has no tensor in it, by pybind11: levels, scratch memory, build stamp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "build_stamp.h"
#include "cpu/levels.h"
#include "cpu/scratch.h"

namespace {

std::string level() {
  if (*lam::level_error() != '\0') throw std::runtime_error(lam::level_error());
  return lam::level_name(lam::active_level());
}

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (int i = 0; i < lam::kLevels; ++i)
    if (lam::level_available(static_cast<lam::Level>(i))) names.emplace_back(lam::level_name(static_cast<lam::Level>(i)));
  return names;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("level", level, "The instruction-set level in use; RuntimeError when LAM_CPU_LEVEL cannot be followed.");
  m.def("level_error", [] { return std::string(lam::level_error()); }, "Why LAM_CPU_LEVEL cannot be followed, or ''.");
  m.def("available_levels", available_levels, "Levels that this build has and this machine can run, least first.");
  m.def("release_scratch", lam::scratch_trim, "Give cached scratch memory back to the system; returns its bytes.");
  m.def("build_stamp", [] { return std::string(LAM_BUILD_STAMP); }, "JSON: what this library was built with.");
}
