"""Marks that tests of several folders share."""

import pytest

from autodeploy import Target
from autodeploy.custom_ops import cpp

has_cpp_kernels = not cpp.against_cpp(Target())
needs_cpp_kernels = pytest.mark.skipif(not has_cpp_kernels, reason="needs a compiler")
has_byte_kernels = has_cpp_kernels and cpp.multiplies_bytes()
needs_byte_kernels = pytest.mark.skipif(not has_byte_kernels, reason="needs a compiler and a CPU with AVX2 or AVX-512 VNNI")
