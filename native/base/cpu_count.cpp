#include "base/cpu_count.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace nybble {
namespace {

std::vector<int> affinity() {
    std::vector<int> cpus;
#if defined(__linux__)
    for (int capacity = 1024; capacity <= 1 << 16; capacity *= 2) {  // grows until the kernel's mask fits
        cpu_set_t* set = CPU_ALLOC(capacity);
        const std::size_t bytes = CPU_ALLOC_SIZE(capacity);
        CPU_ZERO_S(bytes, set);
        const bool known = sched_getaffinity(0, bytes, set) == 0;
        for (int cpu = 0; known && cpu < capacity; ++cpu) {
            if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
        }
        CPU_FREE(set);
        if (known) break;
    }
#endif
    return cpus;
}

bool read_number(const std::string& path, double& value) {
    std::ifstream file(path);
    return static_cast<bool>(file >> value);
}

int physical_cores(const std::vector<int>& cpus) {
    std::set<std::pair<int, int>> cores;
    for (const int cpu : cpus) {
        const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
        double package = 0;
        double core = 0;
        if (!read_number(topology + "physical_package_id", package) || !read_number(topology + "core_id", core)) {
            return static_cast<int>(cpus.size());  // unknown machine: count every CPU
        }
        cores.emplace(static_cast<int>(package), static_cast<int>(core));
    }
    return static_cast<int>(cores.size());
}

// CPUs allowed by one v2 folder's cpu.max ("max 100000" or "150000 100000"), or a large number.
double quota_v2(const std::string& folder) {
    std::ifstream file(folder + "/cpu.max");
    std::string quota;
    double period = 0;
    if (!(file >> quota >> period) || quota == "max" || period <= 0) return 1e9;
    std::istringstream text(quota);
    double microseconds = 0;
    return text >> microseconds && microseconds > 0 ? microseconds / period : 1e9;
}

double quota_v1(const std::string& folder) {
    double quota = 0;
    double period = 0;
    if (!read_number(folder + "/cpu.cfs_quota_us", quota) || !read_number(folder + "/cpu.cfs_period_us", period)) {
        return 1e9;
    }
    return quota > 0 && period > 0 ? quota / period : 1e9;
}

// The limit of a group and of every group above it. A container often sees its own group as the mount's root, while
// /proc/self/cgroup still shows the host's path: walking up to the root covers both.
template <class Quota>
double tightest(const std::string& mount, std::string path, Quota quota) {
    double limit = 1e9;
    for (;;) {
        limit = std::min(limit, quota(mount + path));
        const auto slash = path.find_last_of('/');
        if (path.empty() || slash == std::string::npos) return limit;
        path.resize(slash);
    }
}

double cgroup_quota() {
    double limit = 1e9;
    std::ifstream file("/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {  // "hierarchy:controllers:/path"
        const auto first = line.find(':');
        const auto second = line.find(':', first == std::string::npos ? first : first + 1);
        if (second == std::string::npos) continue;
        std::string controllers = ",";
        controllers.append(line, first + 1, second - first - 1).append(",");
        const std::string path = line.substr(second + 1);
        if (controllers == ",,") {
            limit = std::min(limit, tightest("/sys/fs/cgroup", path, quota_v2));
            limit = std::min(limit, tightest("/sys/fs/cgroup/unified", path, quota_v2));
        } else if (controllers.find(",cpu,") != std::string::npos) {
            limit = std::min(limit, tightest("/sys/fs/cgroup/cpu", path, quota_v1));
            limit = std::min(limit, tightest("/sys/fs/cgroup/cpu,cpuacct", path, quota_v1));
        }
    }
    return limit;
}

}  // namespace

int usable_cpus() {
    const auto cpus = affinity();
    if (!cpus.empty()) return static_cast<int>(cpus.size());
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int default_threads() {
    const auto cpus = affinity();
    const int cores = cpus.empty() ? usable_cpus() : physical_cores(cpus);
    return std::max(1, static_cast<int>(std::min<double>(cores, cgroup_quota())));
}

}  // namespace nybble
