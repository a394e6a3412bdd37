// Attention to caches of multiples of scales.
#include "attend.h"

static constexpr auto kernel_paged_attention_int8 = attend_over<int8_t, int8_t>;
KERNEL(paged_attention_int8)
