// Runs one launch: JOB (written by launch.py) in, OUTPUTS (the output buffers, one after the other) and REPORT (JSON) out.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "findings.h"
#include "machine.h"
#include "monitor.h"

namespace {
constexpr uint32_t kJobVersion = 1;
const char* outputs_path;
const char* report_path;
std::vector<Region*> outputs;

template <class T> T read(FILE* file) {
  T value;
  if (fread(&value, sizeof value, 1, file) != 1) {
    fprintf(stderr, "the job file ends early\n");
    exit(2);
  }
  return value;
}

std::string read_bytes(FILE* file, size_t bytes) {
  std::string text(bytes, '\0');
  if (bytes && fread(text.data(), bytes, 1, file) != 1) {
    fprintf(stderr, "the job file ends early\n");
    exit(2);
  }
  return text;
}

Launch read_launch(FILE* file) {
  if (read<uint32_t>(file) != kJobVersion) {
    fprintf(stderr, "the job file is of another version\n");
    exit(2);
  }
  Launch launch;
  for (uint32_t& n : launch.grid) n = read<uint32_t>(file);
  for (uint32_t& n : launch.threadgroup) n = read<uint32_t>(file);
  for (int axis = 0; axis < 3; ++axis)  // as Metal does when the grid is smaller than one threadgroup
    if (launch.threadgroup[axis] > launch.grid[axis]) launch.threadgroup[axis] = launch.grid[axis];
  launch.order = static_cast<Order>(read<uint32_t>(file));
  launch.seed = read<uint32_t>(file);
  launch.workers = read<uint32_t>(file);
  launch.threadgroup_memory_limit = read<uint32_t>(file);
  return launch;
}

Region* read_buffer(FILE* file) {
  auto space = static_cast<Space>(read<uint32_t>(file));
  bool initialized = read<uint32_t>(file) != 0;
  auto bytes = read<uint64_t>(file);
  auto granule = read<uint32_t>(file);
  std::string name = read_bytes(file, read<uint32_t>(file));
  Region* region = allocate_region(name, space, bytes, granule);
  region->initialized = initialized;
  if (initialized && bytes && fread(region->start, bytes, 1, file) != 1) {
    fprintf(stderr, "the job file ends early\n");
    exit(2);
  }
  return region;
}

void write_results(double seconds, const Totals& totals, const std::string& counts) {
  if (FILE* file = fopen(outputs_path, "wb")) {
    for (const Region* region : outputs) fwrite(region->start, 1, region->bytes, file);
    fclose(file);
  }
  if (FILE* file = fopen(report_path, "w")) {
    fprintf(file, "{\"seconds\": %.6f, \"barriers\": %ld, \"threadgroups\": %ld, \"threadgroup_memory\": %zu,\n", seconds,
            totals.barriers, totals.threadgroups, totals.threadgroup_bytes);
    fprintf(file, "\"counts\": %s,\n\"findings\": %s}\n", counts.c_str(), findings_as_json().c_str());
    fclose(file);
  }
}

// A kernel that crashes: say where and keep what was found before. Not safe in a signal handler by the letter; the process
// ends here in any case.
void on_crash(int signal, siginfo_t* info, void* context) {
  auto pc = static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  const char* address = static_cast<const char*>(info->si_addr);
  report({"crash", nullptr, Place::at(pc)}, [&]() -> std::string {
    if (signal == SIGFPE) return "integer division by zero";
    if (signal == SIGILL) return "reached code that cannot be reached";
    Worker* worker = current_worker();
    if (worker && worker->lane().fiber.owns(address))
      return "a thread needs more than " + std::to_string(kStackBytes >> 10) + " KB of private memory";
    return "access to an address in no buffer, or a vector at an address that is no multiple of its size";
  });
  write_results(0, {}, "null");
  _exit(0);
}

void catch_crashes() {
  static char stack[64 << 10];  // a fiber's own stack may be what overflowed
  stack_t alternate{};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof stack;
  sigaltstack(&alternate, nullptr);
  struct sigaction action {};
  action.sa_sigaction = on_crash;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, nullptr);
}
}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: %s JOB OUTPUTS REPORT\n", argv[0]);
    return 2;
  }
  outputs_path = argv[2];
  report_path = argv[3];
  FILE* file = fopen(argv[1], "rb");
  if (!file) {
    perror(argv[1]);
    return 2;
  }
  Launch launch = read_launch(file);
  auto count = read<uint32_t>(file);
  reserve_arena(read<uint64_t>(file), count);
  std::vector<void*> buffers;
  for (uint32_t i = 0; i < count; ++i) {
    Region* region = read_buffer(file);
    buffers.push_back(region->start);
    if (region->space == Space::kOutput) outputs.push_back(region);
    monitor::buffer_added(region);
  }
  fclose(file);
  catch_crashes();
  auto start = std::chrono::steady_clock::now();
  Totals totals = run_launch(launch, buffers.data());
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::string counts = monitor::finish();
  write_results(seconds, totals, counts);
  return 0;
}

// Conversions to bfloat that clang calls and GCC's library has only since version 13.
extern "C" __bf16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  uint16_t high = static_cast<uint16_t>(nan ? (bits >> 16) | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  __bf16 result;
  memcpy(&result, &high, sizeof result);
  return result;
}
extern "C" __bf16 __truncdfbf2(double value) { return __truncsfbf2(static_cast<float>(value)); }
