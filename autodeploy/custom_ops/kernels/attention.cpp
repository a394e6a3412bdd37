// Attention to caches of numbers as the model has them.
#include "attend.h"

static constexpr auto kernel_paged_attention = attend_over<float, bf16>;
KERNEL(paged_attention)
