// What choosing a token needs of a row of logits: its largest number, and the numbers that are large enough.
#include <utility>
#include <vector>

#include "common.h"

constexpr int64_t BLOCK = 64 * LANES;
constexpr int64_t FEW = 1 << 16;  // numbers for which waking a second thread costs more than it brings
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The largest of some numbers; not a number when one of them is.
template <typename T>
inline float largest_of(const T* x, int64_t count) {
    Vec top = all(LOWEST);
    IntVec odd{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Vec part = load(x + i);
        odd |= part != part;
        top = larger(top, part);
    }
    float found = largest(top);
    bool is_odd = false;
    for (int lane = 0; lane < LANES; lane++) is_odd |= odd[lane] != 0;
    for (; i < count; i++) {
        const float one = widen(x[i]);
        is_odd |= one != one;
        found = std::max(found, one);
    }
    return is_odd ? std::numeric_limits<float>::quiet_NaN() : found;
}

// The largest number of a row and where it is first; not a number when one of them is.
template <typename T>
inline std::pair<float, int64_t> first_largest(const T* x, int64_t count) {
    float highest = LOWEST;
    int64_t at = 0;
    for (int64_t start = 0; start < count && highest == highest; start += BLOCK) {
        const float found = largest_of(x + start, std::min(BLOCK, count - start));
        if (!(found <= highest)) highest = found, at = start;
    }
    while (highest == highest && widen(x[at]) != highest) at++;
    return {highest, at};
}

// The same of each row. With fewer rows than threads, each row is cut into parts. Without room for the values, a row whose largest number is
// not finite has -1 for where it is.
template <typename T>
void largest_of_rows(const T* x, float* values, int64_t* indices, int64_t rows, int64_t width, int64_t stride, int64_t threads) {
    if (rows * width < FEW) threads = 1;
    const int64_t parts = rows < threads ? threads : 1;
    std::vector<std::pair<float, int64_t>> found(rows * parts);
    parallel(threads, rows * parts, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t start = width * (i % parts) / parts, end = width * (i % parts + 1) / parts;
            found[i] = first_largest(x + i / parts * stride + start, end - start);
            found[i].second += start;
        }
    });
    for (int64_t row = 0; row < rows; row++) {
        std::pair<float, int64_t> best = found[row * parts];
        for (int64_t i = 1; i < parts && best.first == best.first; i++) {
            const auto& other = found[row * parts + i];
            if (!(other.first <= best.first)) best = other;
        }
        if (values) values[row] = best.first;
        indices[row] = values || std::isfinite(best.first) ? best.second : -1;
    }
}

static void kernel_largest_of_rows(const void* x, float* values, int64_t* indices, int64_t rows, int64_t width, int64_t stride,
                                   int64_t bytes, int64_t threads) {
    if (bytes == 2)
        largest_of_rows(static_cast<const bf16*>(x), values, indices, rows, width, stride, threads);
    else
        largest_of_rows(static_cast<const float*>(x), values, indices, rows, width, stride, threads);
}
KERNEL(largest_of_rows)

// Where numbers are at least that large, in ascending order; indices has room for all of them.
static void kernel_at_least(const float* x, float least, int64_t width, int64_t* indices, int64_t* count) {
    constexpr int64_t SOME = 8 * LANES;
    int64_t found = 0;
    for (int64_t start = 0; start < width; start += SOME) {
        const int64_t end = std::min(start + SOME, width);
        if (largest_of(x + start, end - start) < least) continue;
        for (int64_t i = start; i < end; i++) {
            indices[found] = i;
            found += x[i] >= least;
        }
    }
    *count = found;
}
KERNEL(at_least)
