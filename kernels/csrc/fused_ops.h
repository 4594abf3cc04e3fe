#pragma once

#include <nanobind/nanobind.h>

// Adds the fused ops to the module.
void bind_fused_ops(nanobind::module_& m);
