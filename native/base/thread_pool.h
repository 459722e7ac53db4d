// A small SPMD thread pool: every worker runs the same function and meets the others at barriers.
//
// A decode step is a few hundred short phases, so a phase change has to cost about a microsecond. Waiting threads
// therefore spin for about a millisecond before they sleep in the kernel; they yield while they spin, so a machine
// with fewer free cores than threads gets slow but never stuck.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace nybble {

class ThreadPool;

// One thread's view of a parallel region.
class Worker {
public:
    Worker(ThreadPool& pool, int index) : pool_(&pool), index_(index) {}
    int index() const { return index_; }
    int size() const;

    // Returns when every worker has arrived. Writes made before it are seen by everybody after it.
    void barrier();

    // Shares out [0, total) in pieces of `grain` and ends with a barrier. Every worker has a share of its own and takes
    // its pieces in order, so that what its cache fetches ahead is what it works on next; when it has none left, it
    // takes those of others. All workers must make the same calls in the same order. `body(begin, end)` must not throw.
    template <class Body>
    void parallel_for(std::int64_t total, std::int64_t grain, Body&& body);

private:
    ThreadPool* pool_;
    int index_;
};

class ThreadPool {
public:
    // `threads` includes the calling thread.
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }

    // Runs fn(Worker&) on every worker and returns when all are done. Callers take turns.
    // `fn` must not throw: an exception inside a region ends the program, as the other workers would wait for ever.
    template <class Fn>
    void run(Fn&& fn) {
        using Plain = std::remove_reference_t<Fn>;
        run_erased([](void* context, Worker& worker) noexcept { (*static_cast<Plain*>(context))(worker); },
                   const_cast<void*>(static_cast<const void*>(std::addressof(fn))));
    }

private:
    friend class Worker;
    using Body = void (*)(void*, Worker&) noexcept;
    using Epoch = std::atomic<std::uint32_t>;

    void run_erased(Body body, void* context);
    void worker_main(int index);
    void barrier();
    void wait_for_change(const Epoch& epoch, std::uint32_t old) const;

    int size_;
    bool crowded_;  // more threads than CPUs: yield from the start
    bool stop_ = false;
    Body body_ = nullptr;
    void* context_ = nullptr;
    std::mutex run_mutex_;
    std::vector<std::thread> threads_;
    alignas(64) Epoch region_{0};  // changes when a region starts
    alignas(64) Epoch phase_{0};   // changes when a barrier opens
    alignas(64) std::atomic<int> arrived_{0};
    struct alignas(64) Share {
        std::atomic<std::int64_t> taken{0};  // of the worker's share of the current parallel_for, by anybody
    };
    std::vector<Share> shares_;
};

inline int Worker::size() const { return pool_->size_; }
inline void Worker::barrier() { pool_->barrier(); }

template <class Body>
void Worker::parallel_for(std::int64_t total, std::int64_t grain, Body&& body) {
    if (pool_->size_ == 1) {
        if (total > 0) body(std::int64_t{0}, total);
        return;
    }
    const int workers = pool_->size_;
    for (int i = 0; i < workers; ++i) {
        const int owner = (index_ + i) % workers;
        const std::int64_t start = total * owner / workers, end = total * (owner + 1) / workers;
        std::atomic<std::int64_t>& taken = pool_->shares_[static_cast<std::size_t>(owner)].taken;
        while (start + taken.load(std::memory_order_relaxed) < end) {
            const std::int64_t begin = start + taken.fetch_add(grain, std::memory_order_relaxed);
            if (begin < end) body(begin, std::min(begin + grain, end));
        }
    }
    pool_->barrier();
}

}  // namespace nybble
