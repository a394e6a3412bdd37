// Attention to caches of multiples of scales.
#include "attend.h"

template void attend(const Call<float, int8_t>& call, int64_t threads);
template void attend(const Call<bf16, int8_t>& call, int64_t threads);
