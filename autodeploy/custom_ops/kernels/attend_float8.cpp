// Attention to caches of floats of 8 bits.
#include "attend.h"

template void attend(const Call<float, e4m3>& call, int64_t threads);
template void attend(const Call<bf16, e4m3>& call, int64_t threads);
