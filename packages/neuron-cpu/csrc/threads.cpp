#include "threads.h"

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace neuron_cpu {
namespace {

constexpr int kMaxThreads = 256;
// Looks at memory before a thread goes to sleep: some tens of microseconds, what a layer's other work takes between two
// products.
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void futex_wait(std::atomic<uint32_t> *word, uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t> *word, int number) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(word), FUTEX_WAKE_PRIVATE, number, nullptr, nullptr, 0);
}

struct Pool {
    // High half: the number of the job; low half: tasks that nobody has claimed. A task is claimed by taking one away
    // while the job is the same, and a job does not end before its claimed tasks are done: whoever has claimed, and
    // nobody else, may read the fields below.
    alignas(64) std::atomic<uint64_t> claim{0};
    alignas(64) std::atomic<int64_t> remaining{0};
    alignas(64) std::atomic<uint32_t> job{0};
    std::atomic<uint32_t> sleepers{0};
    alignas(64) std::atomic<uint32_t> done{0};
    std::atomic<bool> caller_sleeps{false};
    std::atomic<Task> task{nullptr};
    std::atomic<void *> context{nullptr};
    std::atomic<int64_t> num_tasks{0};
    std::atomic<bool> ends{false};
    pthread_mutex_t caller = PTHREAD_MUTEX_INITIALIZER;
    pthread_t workers[kMaxThreads];
    int num_workers = 0;
};

Pool pool;

// Claims and does tasks of job `number` until none is left.
void work(uint32_t number, int thread) {
    uint64_t seen = pool.claim.load(std::memory_order_acquire);
    for (;;) {
        if (static_cast<uint32_t>(seen >> 32) != number) return;
        if (static_cast<uint32_t>(seen) == 0) return;
        if (!pool.claim.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
        int64_t index = pool.num_tasks.load(std::memory_order_relaxed) - static_cast<uint32_t>(seen);
        pool.task.load(std::memory_order_relaxed)(pool.context.load(std::memory_order_relaxed), index, thread);
        if (pool.remaining.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            pool.done.store(number, std::memory_order_seq_cst);
            if (pool.caller_sleeps.load(std::memory_order_seq_cst)) futex_wake(&pool.done, 1);
        }
        seen = pool.claim.load(std::memory_order_acquire);
    }
}

void free_scratch();

void *worker(void *argument) {
    int thread = static_cast<int>(reinterpret_cast<intptr_t>(argument));
    uint32_t last = 0;
    for (;;) {
        uint32_t number = pool.job.load(std::memory_order_seq_cst);
        for (int spin = 0; number == last && spin < kSpins; spin++) {
            relax();
            number = pool.job.load(std::memory_order_acquire);
        }
        while (number == last) {
            pool.sleepers.fetch_add(1, std::memory_order_seq_cst);
            futex_wait(&pool.job, last);
            pool.sleepers.fetch_sub(1, std::memory_order_seq_cst);
            number = pool.job.load(std::memory_order_seq_cst);
        }
        if (pool.ends.load(std::memory_order_acquire)) {
            free_scratch();
            return nullptr;
        }
        last = number;
        work(number, thread);
    }
}

uint32_t next_job() {
    uint32_t number = pool.job.load(std::memory_order_relaxed) + 1;
    return number == 0 ? 1 : number;
}

void announce(uint32_t number) {
    pool.job.store(number, std::memory_order_seq_cst);
    if (pool.sleepers.load(std::memory_order_seq_cst) > 0) futex_wake(&pool.job, INT_MAX);
}

void stop_workers() {
    if (pool.num_workers == 0) return;
    pool.ends.store(true, std::memory_order_release);
    announce(next_job());
    for (int index = 0; index < pool.num_workers; index++) pthread_join(pool.workers[index], nullptr);
    pool.num_workers = 0;
    pool.ends.store(false, std::memory_order_release);
}

// A child of fork() has this memory and none of the threads: it computes alone until it sets a number.
void forget_workers() {
    pool.num_workers = 0;
    pool.sleepers.store(0);
    pthread_mutex_init(&pool.caller, nullptr);
}

constexpr int kSlots = 5;

struct Scratch {
    void *memory[kSlots];
    int64_t num_bytes[kSlots];
};

thread_local Scratch own;

void free_scratch() {
    for (int slot = 0; slot < kSlots; slot++) {
        free(own.memory[slot]);
        own.memory[slot] = nullptr;
        own.num_bytes[slot] = 0;
    }
}

}  // namespace

void set_num_threads(int number) {
    static bool is_registered = false;
    pthread_mutex_lock(&pool.caller);
    if (!is_registered) is_registered = pthread_atfork(nullptr, nullptr, forget_workers) == 0;
    stop_workers();
    if (number > kMaxThreads) number = kMaxThreads;
    for (int index = 0; index < number - 1; index++) {
        void *argument = reinterpret_cast<void *>(static_cast<intptr_t>(index + 1));
        if (pthread_create(&pool.workers[index], nullptr, worker, argument) != 0) break;
        pool.num_workers = index + 1;
    }
    pthread_mutex_unlock(&pool.caller);
}

int num_threads() { return pool.num_workers + 1; }

void run_tasks(Task task, void *context, int64_t num_tasks) {
    if (num_tasks <= 1 || pool.num_workers == 0 || pthread_mutex_trylock(&pool.caller) != 0) {
        for (int64_t index = 0; index < num_tasks; index++) task(context, index, 0);
        return;
    }
    uint32_t number = next_job();
    pool.task.store(task, std::memory_order_relaxed);
    pool.context.store(context, std::memory_order_relaxed);
    pool.num_tasks.store(num_tasks, std::memory_order_relaxed);
    pool.remaining.store(num_tasks, std::memory_order_relaxed);
    pool.claim.store(static_cast<uint64_t>(number) << 32 | static_cast<uint32_t>(num_tasks), std::memory_order_release);
    announce(number);
    work(number, 0);
    for (int spin = 0; pool.done.load(std::memory_order_acquire) != number && spin < kSpins; spin++) relax();
    if (pool.done.load(std::memory_order_seq_cst) != number) {
        pool.caller_sleeps.store(true, std::memory_order_seq_cst);
        for (uint32_t seen = pool.done.load(std::memory_order_seq_cst); seen != number;
             seen = pool.done.load(std::memory_order_seq_cst))
            futex_wait(&pool.done, seen);
        pool.caller_sleeps.store(false, std::memory_order_seq_cst);
    }
    pthread_mutex_unlock(&pool.caller);
}

void *scratch(int slot, int64_t num_bytes) {
    if (own.num_bytes[slot] < num_bytes) {
        free(own.memory[slot]);
        own.memory[slot] = nullptr;
        own.num_bytes[slot] = 0;
        void *memory = nullptr;
        if (posix_memalign(&memory, 64, static_cast<size_t>(num_bytes)) != 0) return nullptr;
        own.memory[slot] = memory;
        own.num_bytes[slot] = num_bytes;
    }
    return own.memory[slot];
}

}  // namespace neuron_cpu
