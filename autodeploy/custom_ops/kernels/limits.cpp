// How fast memory can be read: a loop that does nothing else.
#include "common.h"

constexpr int ACCUMULATORS = 8;  // sums that do not wait for each other
constexpr int64_t BLOCK = int64_t(ACCUMULATORS) * LANES;

// Adds up `count` floats, a multiple of 128, each read once; `total` is one float for each thread, a cache line apart.
EXPORT void autodeploy_read(const float* from, int64_t count, float* total, int64_t num_threads) {
    parallel(num_threads, count / BLOCK, [=](int64_t first, int64_t last) {
        Vec sums[ACCUMULATORS] = {};
        for (const float* at = from + first * BLOCK; at < from + last * BLOCK; at += BLOCK) {
            for (int i = 0; i < ACCUMULATORS; i++) sums[i] += load(at + i * LANES);
        }
        for (int i = 1; i < ACCUMULATORS; i++) sums[0] += sums[i];
        total[16 * omp_get_thread_num()] = sum(sums[0]);
    });
}
