"""The update kernels, a folder for each language; installed as ``clr_optim.kernels``."""
