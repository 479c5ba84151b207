"""The update kernels in C++, and the module that compiles and caches them at first use."""
