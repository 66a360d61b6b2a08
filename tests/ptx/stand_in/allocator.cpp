// The CPU allocator while an operator runs on the stand-in runtime. It keeps a table of what is alive, so
// that an access of a kernel can be held against each buffer's exact bounds; fresh memory is all ones, a NaN
// in every floating-point type, and wide margins keep an address beyond one buffer from being one of the
// next.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace {

struct Allocation {
  uint64_t address;
  int64_t size, number;  // counted from the first: an address may come again
};

constexpr size_t kMargin = 64 << 10;  // a multiple of the alignment that torch and CUDA give
constexpr size_t kAlignment = 256;

std::mutex mutex;
std::map<void*, Allocation> alive;
int64_t allocated = 0;

void release(void* data) {
  if (data == nullptr) return;
  std::lock_guard<std::mutex> lock(mutex);
  alive.erase(data);
  std::free(static_cast<char*>(data) - kMargin);
}

struct TrackingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void *block = nullptr, *data = nullptr;
    if (size > 0) {
      if (posix_memalign(&block, kAlignment, size + 2 * kMargin)) throw std::bad_alloc();
      data = static_cast<char*>(block) + kMargin;
      std::memset(data, 0xff, size);
      std::lock_guard<std::mutex> lock(mutex);
      alive[data] = {reinterpret_cast<uint64_t>(data), static_cast<int64_t>(size), allocated++};
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

}  // namespace

extern "C" {

void stand_in_track(bool on) {
  static TrackingAllocator tracking;
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &tracking : usual);
}

// Writes at most `capacity` live allocations, in the order of their addresses, and returns how many there
// are.
int64_t stand_in_allocations(Allocation* out, int64_t capacity) {
  std::lock_guard<std::mutex> lock(mutex);
  int64_t written = 0;
  for (const auto& [data, allocation] : alive)
    if (written < capacity) out[written++] = allocation;
  return static_cast<int64_t>(alive.size());
}

}  // extern "C"
