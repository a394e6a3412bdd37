// Attention to caches of floats of 8 bits.
#include "attend.h"

static constexpr auto kernel_paged_attention_float8 = attend_over<e4m3, e4m3>;
KERNEL(paged_attention_float8)
