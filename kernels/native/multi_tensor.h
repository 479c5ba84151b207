// The driver's choice of an instruction set.
#pragma once

#include "kernels.h"

namespace clr {

// The sets that were compiled in; null after the last.
extern const KernelSet* const kernel_sets[];

// The set whose kernels a step calls.
const KernelSet& kernel_set();

// Chooses a set by name; false if no set has the name. The CPU must have the instructions.
bool use(const char* name);

}  // namespace clr
