"""Marks that tests of several folders share."""

import pytest

from autodeploy import Target
from autodeploy.custom_ops import cpp

has_bfloat16_kernels = not cpp.against_cpp(Target()) and cpp.isa() == "avx512_bf16"
needs_bfloat16_kernels = pytest.mark.skipif(not has_bfloat16_kernels, reason="needs a compiler and a CPU with AVX-512 BF16")
