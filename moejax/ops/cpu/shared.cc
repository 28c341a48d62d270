// All-to-all between processes of one machine, over memory that all of them have mapped.
//
// Each rank has an outbox of two halves, used in turn, and a count of how often it has filled it. A rank fills its
// outbox, increments its count, and waits until the counts of all ranks are as high; then it reads its part of every
// outbox. A half is written again two exchanges later: by then every rank has filled its outbox for the exchange in
// between, which it does after reading. Waiting ranks sleep on the bell (a futex), which the last rank to arrive rings
// once for all of them.

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <string>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t LINE = 64;       // bytes of a cache line, one for each count
constexpr int64_t PAGE = 4096;
constexpr int SPINS = 2000;        // looks before sleeping, where every rank can have a core of its own

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout = nullptr) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr, 0);
}

struct Arena {
  char* memory;
  int64_t size, outbox;  // bytes: of all, and of half an outbox
  int64_t ranks, me;
  int64_t timeout_s;
  uint32_t exchanges = 0;
  std::atomic<bool> aborted{false};

  static int64_t head(int64_t ranks) { return ((ranks + 1) * LINE + PAGE - 1) / PAGE * PAGE; }
  std::atomic<uint32_t>* filled(int64_t rank) const {
    return reinterpret_cast<std::atomic<uint32_t>*>(memory + rank * LINE);
  }
  std::atomic<uint32_t>* bell() const { return filled(ranks); }
  char* half(int64_t rank, uint32_t exchange) const {
    return memory + head(ranks) + (2 * rank + exchange % 2) * outbox;
  }
  bool all_filled(uint32_t exchanges) const {
    for (int64_t rank = 0; rank < ranks; ++rank)
      if (static_cast<int32_t>(filled(rank)->load() - exchanges) < 0) return false;
    return true;
  }
  void ring() const {
    bell()->fetch_add(1);
    futex(bell(), FUTEX_WAKE, INT_MAX);
  }
};

Arena* current = nullptr;

// Whether all ranks have arrived before the exchange was aborted.
bool wait(const Arena& arena) {
  bool spins = std::thread::hardware_concurrency() >= static_cast<unsigned>(arena.ranks);
  for (int i = 0; spins && i < SPINS; ++i) {
    if (arena.all_filled(arena.exchanges)) return true;
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }
  timespec began, now, nap{1, 0};
  clock_gettime(CLOCK_MONOTONIC, &began);
  while (true) {
    uint32_t rung = arena.bell()->load();
    if (arena.aborted.load()) return false;
    if (arena.all_filled(arena.exchanges)) return true;
    futex(arena.bell(), FUTEX_WAIT, rung, &nap);
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec - began.tv_sec > arena.timeout_s) return false;
  }
}

// Chunk `i` of x goes to rank i; chunk `i` of got came from rank i.
ffi::Error Exchange(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> got) {
  Arena* arena = current;
  if (arena == nullptr) return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "no exchange is connected");
  int64_t n = arena->ranks, me = arena->me, bytes = x.size_bytes(), chunk = bytes / n;
  if (bytes % n || bytes > arena->outbox)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "an exchange of " + std::to_string(bytes) + " bytes between " + std::to_string(n) +
                          " ranks, with room for " + std::to_string(arena->outbox));
  const char* from = static_cast<const char*>(x.untyped_data());
  char* to = static_cast<char*>(got->untyped_data());
  uint32_t exchange = arena->exchanges++;
  for (int64_t rank = 0; rank < n; ++rank)
    std::memcpy((rank == me ? to : arena->half(me, exchange)) + rank * chunk, from + rank * chunk, chunk);
  arena->filled(me)->store(arena->exchanges);
  if (arena->all_filled(arena->exchanges)) {
    arena->ring();
  } else if (!wait(*arena)) {
    return ffi::Error(ffi::ErrorCode::kAborted, arena->aborted.load() ? "the exchange was aborted"
                                                                      : "the exchange waited too long for the others");
  }
  for (int64_t i = 1; i < n; ++i) {
    int64_t rank = (me + i) % n;
    std::memcpy(to + rank * chunk, arena->half(rank, exchange) + me * chunk, chunk);
  }
  return ffi::Error::Success();
}

}  // namespace

extern "C" {

// Memory of the file for `ranks` outboxes of twice `outbox` bytes, or null (see errno). All ranks pass the same sizes.
void* moejax_arena_open(int file, int64_t outbox, int64_t ranks, int64_t me, int64_t timeout_s) {
  outbox = (outbox + PAGE - 1) / PAGE * PAGE;
  int64_t size = Arena::head(ranks) + 2 * ranks * outbox;
  if (ftruncate(file, size)) return nullptr;
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) return nullptr;
  return new Arena{static_cast<char*>(memory), size, outbox, ranks, me, timeout_s};
}

// The arena of the exchanges that follow in this process; null for none.
void moejax_arena_use(void* arena) { current = static_cast<Arena*>(arena); }

// Makes every wait in this process fail, now and later. Threads of other processes wake, check, and sleep again.
void moejax_arena_abort(void* arena) {
  auto* it = static_cast<Arena*>(arena);
  it->aborted.store(true);
  it->ring();
}

void moejax_arena_close(void* arena) {
  auto* it = static_cast<Arena*>(arena);
  if (current == it) current = nullptr;
  munmap(it->memory, it->size);
  delete it;
}

}  // extern "C"

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_exchange, Exchange,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
