#include "base/thread_pool.h"

#include <chrono>
#include <stdexcept>

#include "base/cpu_count.h"

namespace nybble {
namespace {

constexpr auto kSpinTime = std::chrono::milliseconds(1);
constexpr int kPausesPerCheck = 32;
constexpr int kPausesBeforeYield = 1024;  // some tens of microseconds, longer than a balanced phase makes us wait

inline void pause_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) : size_(threads), crowded_(threads > usable_cpus()) {
    if (threads < 1) throw std::invalid_argument("a thread pool needs at least one thread");
    shares_ = std::vector<Share>(static_cast<std::size_t>(threads));
    threads_.reserve(static_cast<std::size_t>(threads - 1));
    try {
        for (int index = 1; index < threads; ++index) {
            threads_.emplace_back([this, index] { worker_main(index); });
        }
    } catch (...) {  // no more threads to be had: send home the ones that started
        stop_ = true;
        region_.fetch_add(1);
        region_.notify_all();
        for (auto& thread : threads_) thread.join();
        throw;
    }
}

ThreadPool::~ThreadPool() {
    stop_ = true;
    region_.fetch_add(1);
    region_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void ThreadPool::run_erased(Body body, void* context) {
    const std::lock_guard lock(run_mutex_);
    Worker worker(*this, 0);
    if (size_ == 1) {
        body(context, worker);
        return;
    }
    body_ = body;
    context_ = context;
    region_.fetch_add(1);
    region_.notify_all();
    body(context, worker);
    barrier();  // nobody uses `context` after this
}

void ThreadPool::worker_main(int index) {
    Worker worker(*this, index);
    std::uint32_t seen = 0;
    for (;;) {
        wait_for_change(region_, seen);
        ++seen;  // a new region cannot start before this worker has finished the last one
        if (stop_) return;
        body_(context_, worker);
        barrier();
    }
}

void ThreadPool::barrier() {
    if (size_ == 1) return;
    const std::uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        // Everybody has left the last parallel_for.
        for (Share& share : shares_) share.taken.store(0, std::memory_order_relaxed);
        phase_.fetch_add(1);  // publishes all of it
        phase_.notify_all();
    } else {
        wait_for_change(phase_, phase);
    }
}

void ThreadPool::wait_for_change(const Epoch& epoch, std::uint32_t old) const {
    using Clock = std::chrono::steady_clock;
    Clock::time_point start;
    for (int pauses = 1;; ++pauses) {
        if (epoch.load(std::memory_order_acquire) != old) return;
        pause_cpu();
        if (pauses % kPausesPerCheck != 0) continue;
        if (crowded_ || pauses >= kPausesBeforeYield) std::this_thread::yield();
        if (pauses == kPausesPerCheck) {
            start = Clock::now();
        } else if (Clock::now() - start > kSpinTime) {
            break;
        }
    }
    while (epoch.load(std::memory_order_acquire) == old) epoch.wait(old, std::memory_order_acquire);
}

}  // namespace nybble
