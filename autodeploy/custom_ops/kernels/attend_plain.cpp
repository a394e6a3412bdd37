// Attention to caches of numbers as the model has them.
#include "attend.h"

template void attend(const Call<float, float>& call, int64_t threads);
template void attend(const Call<bf16, bf16>& call, int64_t threads);
