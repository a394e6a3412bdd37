// The calls of a recorded step, made by one team of threads from the first to the last: none is started or put to sleep in
// between.
#include "common.h"

constinit thread_local Team* team = nullptr;
constinit thread_local int me = 0;

struct Recorded {
    void (*function)(const Word*);
    const Word* words;
};

// calls [count]; threads: the most that any of them asks for.
static void kernel_run(const Recorded* calls, int64_t count, int64_t threads) {
    in_team(threads, [&] {
        for (int64_t i = 0; i < count; i++) calls[i].function(calls[i].words);
    });
}
KERNEL(run)
