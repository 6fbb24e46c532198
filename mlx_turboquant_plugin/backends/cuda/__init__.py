"""The kernels in CUDA, and their launches."""
