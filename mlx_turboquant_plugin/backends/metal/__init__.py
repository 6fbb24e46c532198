"""The kernels in Metal, and their launches."""
