// What this library was built with, told by the library itself.
#include "bindings/checks.h"

static std::string build_info() { return PGOLF_BUILD_INFO; }

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) { m.def("build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
