// The arena. Regions are never freed: threadgroup variables are allocated once per worker and used again.
#include "memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace {
constexpr size_t kGap = 1 << 20;
constexpr size_t kPage = 4096;
constexpr size_t kThreadgroupRoom = 256 << 20;

char* arena;
size_t arena_bytes;
size_t arena_used = kGap;
std::vector<Region*> regions;
std::mutex lock;

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
}  // namespace

std::string Region::element(const char* address) const {
  long offset = address - start;
  long size = static_cast<long>(granule);
  long index = offset >= 0 ? offset / size : -((-offset + size - 1) / size);
  return "element " + std::to_string(index) + " of " + name;
}

std::string Region::label() const {
  switch (space) {
    case Space::kConstant: return name + " (constant)";
    case Space::kThreadgroup: return name + " (threadgroup)";
    default: return name + " (device)";
  }
}

void reserve_arena(size_t bytes, size_t count) {
  arena_bytes = whole_pages(bytes) + (count + 2) * (kGap + kPage) + kThreadgroupRoom;
  arena = static_cast<char*>(
      mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (arena == MAP_FAILED) {
    perror("memory for the kernel's buffers");
    exit(2);
  }
}

Region* allocate_region(const std::string& name, Space space, size_t bytes, size_t granule) {
  std::lock_guard<std::mutex> guard(lock);
  if (arena_used + whole_pages(bytes) + kGap > arena_bytes) {
    fprintf(stderr, "threadgroup variables need more than %zu bytes\n", kThreadgroupRoom);
    exit(2);
  }
  auto* region = new Region{name, space, arena + arena_used, bytes, granule ? granule : 1, false, 0};
  arena_used += whole_pages(bytes) + kGap;
  memset(region->start, 0xFF, bytes);
  regions.push_back(region);
  return region;
}

bool in_arena(const char* address) { return address >= arena && address < arena + arena_bytes; }

Region* find_region(const char* address) {
  for (Region* region : regions)
    if (region->contains(address)) return region;
  return nullptr;
}

Region* nearest_region(const char* address) {
  Region* nearest = nullptr;
  long best = 0;
  for (Region* region : regions) {
    long distance = address < region->start ? region->start - address : address - (region->start + region->bytes);
    if (!nearest || distance < best) {
      nearest = region;
      best = distance;
    }
  }
  return nearest;
}

const std::vector<Region*>& all_regions() { return regions; }
