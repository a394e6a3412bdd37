// How work is split among threads: by each call for itself, or in a team that makes all the calls of a step (step.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include <omp.h>
#include <sched.h>

// A range of tasks: its owner takes them from the front, who is done with his own from the back.
struct alignas(64) Share {
    std::atomic<uint64_t> bounds{0};  // first, and behind the last in the upper half

    void set(uint64_t first, uint64_t last) { bounds.store(last << 32 | first, std::memory_order_relaxed); }

    int64_t take(bool is_mine) {
        uint64_t now = bounds.load(std::memory_order_relaxed);
        while (true) {
            const uint64_t first = now & 0xffffffff, last = now >> 32;
            if (first >= last) return -1;
            const uint64_t rest = is_mine ? last << 32 | (first + 1) : (last - 1) << 32 | first;
            if (bounds.compare_exchange_weak(now, rest, std::memory_order_relaxed)) return int64_t(is_mine ? first : last - 1);
        }
    }
};

// Defined in step.cpp: all libraries of kernels have the same.
class Team;
extern constinit thread_local Team* team;  // that this thread is in
extern constinit thread_local int me;      // its number there

// Threads that make the same calls at the same time, and meet wherever one needs what another has done.
class Team {
  public:
    int size = 1;

    explicit Team(int64_t most) : shares(new Share[most]) {}

    // Goes on when all have come. Who waits long lets others have the core.
    void meet() {
        const uint32_t now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(size)) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int64_t waits = 0; round.load(std::memory_order_acquire) == now; waits++)
            waits > PATIENCE ? void(sched_yield()) : pause();
    }

    // What the first thread has; the others wait for it.
    template <typename T>
    T& of_first(T& mine) {
        if (me == 0) given = &mine;
        meet();
        return *static_cast<T*>(given);
    }

    // Calls body(i) for each i below count. Each thread begins with its own share, in ascending order.
    template <typename Body>
    void share_out(int64_t count, Body body) {
        shares[me].set(count * me / size, count * (me + 1) / size);
        for (int64_t i; (i = shares[me].take(true)) >= 0;) body(i);
        for (int other = 1; other < size; other++)
            for (int64_t i; (i = shares[(me + other) % size].take(false)) >= 0;) body(i);  // nothing yet, if that one has not begun
        meet();
    }

  private:
    static constexpr int64_t PATIENCE = 1 << 14;
    alignas(64) std::atomic<uint32_t> arrived{0};
    alignas(64) std::atomic<uint32_t> round{0};
    std::unique_ptr<Share[]> shares;
    void* given = nullptr;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
};

// Calls work() on each thread of the team, on those of a new one where there is none, or just so when one thread is enough.
template <typename Work>
inline void in_team(int64_t num_threads, Work work) {
    if (team || num_threads <= 1) return work();
    Team made(num_threads);
#pragma omp parallel num_threads(int(num_threads))
    {
#pragma omp single
        made.size = omp_get_num_threads();
        team = &made, me = omp_get_thread_num();
        work();
        team = nullptr, me = 0;
    }
}

// Calls body(first, last) on each thread with its part of [0, count).
template <typename Body>
inline void parallel(int64_t num_threads, int64_t count, Body body) {
    const auto part = [&](int64_t i, int64_t threads) { body(count * i / threads, count * (i + 1) / threads); };
    if (team) {
        const int64_t threads = std::max<int64_t>(1, std::min<int64_t>({num_threads, count, team->size}));
        if (me < threads) part(me, threads);
        return team->meet();
    }
    if (num_threads <= 1 || count <= 1) return part(0, 1);
#pragma omp parallel num_threads(int(std::min(num_threads, count)))
    part(omp_get_thread_num(), omp_get_num_threads());
}

// On each thread of a team, or on the only one: calls body(i) for each i below count, in turn with the others.
template <typename Body>
inline void share_out(int64_t count, Body body) {
    if (team) return team->share_out(count, body);
    for (int64_t i = 0; i < count; i++) body(i);
}

// The same by so many threads; one that is done early takes what others have left.
template <typename Body>
inline void share_out(int64_t num_threads, int64_t count, Body body) {
    in_team(std::min(num_threads, count), [&] { share_out(count, body); });
}
