#include "base/roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "base/memory.h"
#include "dispatch/kernels.h"

namespace nybble {
namespace {

// Many short bursts, of which the best counts: so that some fall between whatever else the machine is doing.
constexpr int kPeakRepeats = 30, kReadRepeats = 8;
constexpr long kPeakIterations = 4'000'000;
constexpr size_t kReadBytes = size_t{384} << 20;  // far larger than a cache; shared out over the threads

using Clock = std::chrono::steady_clock;

// Runs work(thread) on all threads at once, and gives the seconds from the first start to the last end.
double timed(int threads, const std::function<void(int)>& work) {
    std::atomic<int> ready{0};
    std::vector<Clock::time_point> starts(threads), ends(threads);
    auto body = [&](int thread) {
        ++ready;
        while (ready < threads) std::this_thread::yield();
        starts[thread] = Clock::now();
        work(thread);
        ends[thread] = Clock::now();
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
    body(0);
    for (std::thread& other : others) other.join();
    const auto span = *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
    return std::max(std::chrono::duration<double>(span).count(), 1e-9);
}

}  // namespace

Roofline measure_roofline(Isa isa, int threads) {
    const Kernels& table = kernels(isa);
    threads = std::max(threads, 1);
    Roofline best;
    std::vector<double> operations(threads);
    // The emulated products of the generic instance are slow, so it gets fewer of them.
    const long iterations = isa == Isa::generic ? kPeakIterations / 40 : kPeakIterations;
    for (int repeat = 0; repeat < kPeakRepeats; ++repeat) {
        const double seconds =
            timed(threads, [&](int thread) { operations[thread] = table.int8_peak_loop(iterations); });
        double total = 0;
        for (double count : operations) total += count;
        best.int8_gops = std::max(best.int8_gops, total / seconds * 1e-9);
    }

    const size_t share = kReadBytes / static_cast<size_t>(threads) / 4096 * 4096;
    std::vector<Buffer<uint8_t>> buffers(threads);  // in huge pages, as the weights are
    std::vector<uint64_t> checksums(threads);
    timed(threads, [&](int thread) {  // each thread touches its own pages first
        buffers[thread] = Buffer<uint8_t>(share);
        std::memset(buffers[thread].data(), thread + 1, share);
    });
    for (int repeat = 0; repeat < kReadRepeats; ++repeat) {
        const double seconds =
            timed(threads, [&](int thread) { checksums[thread] = table.read_loop(buffers[thread].data(), share); });
        best.read_gb_per_s = std::max(best.read_gb_per_s, static_cast<double>(share) * threads / seconds * 1e-9);
    }
    volatile uint64_t keep = checksums[0];
    (void)keep;
    return best;
}

}  // namespace nybble
