// Distributes work over the threads of a program, each on a core of its own.
//
// An operating system may wake a thread on the core of the thread that woke it, although another core is free, and leave
// it there for milliseconds: two threads that take turns on one core take twice as long. So the helper threads are kept
// off the core of the calling thread, which waits for them; they may run on any of the other cores.

#pragma once

#include <sched.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

constexpr int64_t PIECES = 8;       // of work for each thread, so that all end at about the same time
constexpr int64_t PATIENCE = 2000;  // spins before a waiting thread yields its core, some 40 microseconds

// The helper threads.
class Helpers {
 public:
  // The calling thread is a helper from now on, until it ends.
  void join() {
    thread_local Member member{*this};
    (void)member;
  }

  // Keeps all of them off the calling thread's core, unless there is no other core.
  void make_room() {
    int core = sched_getcpu();
    if (core < 0 || core == core_) return;
    std::lock_guard<std::mutex> hold(lock_);
    core_ = core;
    cpu_set_t others = all();
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) == 0) return;
    for (pid_t thread : threads_) {
      if (thread != gettid()) sched_setaffinity(thread, sizeof others, &others);
    }
  }

 private:
  struct Member {
    explicit Member(Helpers& helpers) : helpers(helpers), thread(gettid()) {
      std::lock_guard<std::mutex> hold(helpers.lock_);
      helpers.threads_.push_back(thread);
      helpers.core_ = -1;
    }
    ~Member() {
      std::lock_guard<std::mutex> hold(helpers.lock_);
      auto& threads = helpers.threads_;
      threads.erase(std::remove(threads.begin(), threads.end(), thread), threads.end());
    }
    Helpers& helpers;
    pid_t thread;
  };

  // The cores that the process was given.
  static const cpu_set_t& all() {
    static const cpu_set_t cores = [] {
      cpu_set_t found;
      CPU_ZERO(&found);
      sched_getaffinity(getpid(), sizeof found, &found);
      return found;
    }();
    return cores;
  }

  std::mutex lock_;
  std::vector<pid_t> threads_;
  std::atomic<int> core_{-1};
};

inline Helpers& helpers() {
  static Helpers* all = new Helpers;  // outlives every thread
  return *all;
}

// One spin of a thread that waits and keeps its core.
inline void relax() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

// Runs work(first, last) over [0, size) in pieces of at least `least` and a multiple of `grain`, on all threads. A free
// thread takes the next piece, the caller too, so that the caller waits only for pieces that have begun. It keeps its core
// at first: another thread that got the core would keep it for longer than a piece takes.
template <typename Work>
void spread(xla::ffi::ThreadPool& pool, int64_t size, int64_t grain, int64_t least, Work work) {
  int64_t threads = std::min(pool.num_threads(), size / std::max<int64_t>(least, 1));
  if (threads <= 1) return work(0, size);
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  int64_t piece = std::max(least, (size / (PIECES * threads) + grain - 1) / grain * grain);
  piece = (piece + grain - 1) / grain * grain;
  int64_t pieces = (size + piece - 1) / piece;
  auto shared = std::make_shared<Shared>();
  auto take = [shared, pieces, piece, size, &work] {
    for (int64_t i; (i = shared->next++) < pieces; ++shared->done) work(i * piece, std::min((i + 1) * piece, size));
  };
  helpers().make_room();
  for (int64_t i = 1; i < threads; ++i) {
    pool.Schedule([take] {
      helpers().join();
      take();
    });
  }
  take();
  for (int64_t turn = 0; shared->done < pieces; ++turn) {
    if (turn < PATIENCE)
      relax();
    else
      std::this_thread::yield();
  }
}
