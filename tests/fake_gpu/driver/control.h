// The functions by which Python controls the fake device, see device.py.
#pragma once

#include "device.h"

namespace fake {

// Runs a Triton kernel by the function that Python has set; without one nothing happens.
void run_kernel(CUfunction function, dim3 grid, const uint8_t* parameters);

}  // namespace fake
