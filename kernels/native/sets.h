// The choice of an instruction set.
#pragma once

#include <cstring>

#include "kernels.h"

namespace clr {

// The sets that were compiled in; null after the last.
#define CLR_POINT_TO(name) &sets::name,
inline const KernelSet* const kernel_sets[] = {CLR_KERNEL_SETS(CLR_POINT_TO) nullptr};
#undef CLR_POINT_TO

// The set whose kernels a step calls.
inline const KernelSet* kernels = kernel_sets[0];

// Chooses a set by name; false if no set has the name. The CPU must have the instructions.
inline bool use(const char* name) {
    for (const KernelSet* const* set = kernel_sets; *set; ++set)
        if (!std::strcmp((*set)->name, name)) return kernels = *set, true;
    return false;
}

}  // namespace clr
