// A CUDA grid on the CPU: one fiber (ucontext) per CUDA thread, with the primitives of csrc/cuda/grid.cuh. The kernels compile
// against it unchanged.
//
//   emulated::launch(blocks, threads, seed, [&](const emulated::Grid& grid) { select_phases(grid, args, 0, phases); });
//
// Fibers run one at a time, from barrier to barrier, in an order drawn from `seed`. What that finds:
//   * a barrier that not all threads of its warp, block or grid reach, or reach at the same place of the source, or reach with the others
//   gone:
//     launch throws Deadlock, whose message says who waits where;
//   * results that depend on the order of threads or blocks: compare several seeds;
//   * storage read before it is written: shared storage starts as garbage;
//   * accesses out of bounds, with AddressSanitizer: stacks and shared storage are known to it;
//   * data races, with ThreadSanitizer: every CUDA thread is a thread of execution to it, and only what orders memory on a GPU orders it
//     here: barriers do, among their members; ballot, shuffle and relaxed atomics do not.
// What it does not emulate: two threads that run at the same moment, weak memory, limits of registers and shared storage.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

namespace emulated {

struct Deadlock : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr unsigned kWarpSize = 32;

// The emulator's own bookkeeping is shared by all fibers without any order that ThreadSanitizer could see; it is not what is tested. It
// writes within the life of an Unseen, or in functions that are not looked at: an Unseen takes longer than most of what it would hide.
#if defined(__SANITIZE_THREAD__)
#define EMULATED_UNSEEN __attribute__((no_sanitize_thread))
#else
#define EMULATED_UNSEEN
#endif
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  ~Unseen() {}
#endif
};

// Happens-before at a barrier (or at the launch's beginning and end), for ThreadSanitizer.
inline void publish([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(token);
#endif
}
inline void observe([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(token);
#endif
}

// An execution context: a fiber's, or the scheduler's. Tells the sanitizers of every switch.
class Context {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() {
    if (stack_ != nullptr) munmap(stack_, kStackBytes);
  }

  void start(void (*entry)()) {
    if (stack_ == nullptr) {
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stack_ = static_cast<char*>(memory);
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);  // what an abandoned fiber left behind
    fake_stack_ = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
    if (tsan_ == nullptr) tsan_ = __tsan_create_fiber(0);
#endif
    bottom_ = stack_;
    size_ = kStackBytes;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
    entered_ = false;
  }
  // Forgets a fiber that will not return, after it has published what it did.
  void abandon([[maybe_unused]] void* token, [[maybe_unused]] Context& scheduler) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
    publish(token);
    __tsan_switch_to_fiber(scheduler.tsan_, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(tsan_);
    tsan_ = nullptr;
#endif
  }
  void adopt_current_thread() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // Runs `to` until it switches back here. `last`: this context will not be resumed.
  void switch_to(Context& to, [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, to.bottom_, to.size_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    jump(to);
    arrive(to);
  }
  // The first thing a context does when it runs again, or for the first time; `from` is the one that ran before.
  void arrive([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &from.bottom_, &from.size_);
#endif
  }

 private:
  // swapcontext would do, but sets the signal mask, and AddressSanitizer's clears the shadow of the whole stack besides: four fifths of the
  // time of a test. For the same reason the sanitizers leave this function alone.
  __attribute__((noinline, no_sanitize_address, no_sanitize_thread, no_sanitize_undefined)) void jump(Context& to) {
    if (__builtin_setjmp(resume_) != 0) return;
    if (to.entered_) __builtin_longjmp(to.resume_, 1);
    to.entered_ = true;
    setcontext(&to.context_);
  }

  ucontext_t context_{};
  void* resume_[5];
  bool entered_ = true;  // what is made by start() begins anew; the scheduler is under way
  char* stack_ = nullptr;
  [[maybe_unused]] const void* bottom_ = nullptr;
  [[maybe_unused]] size_t size_ = 0;
  [[maybe_unused]] void* fake_stack_ = nullptr;
  [[maybe_unused]] void* tsan_ = nullptr;
};

class Machine;

class Grid {
 public:
  Grid(Machine& machine, unsigned id, unsigned block, unsigned thread, unsigned blocks, unsigned threads)
      : machine_(machine), id_(id), block_(block), thread_(thread), blocks_(blocks), threads_(threads) {}

  unsigned thread() const { return thread_; }
  unsigned threads() const { return threads_; }
  unsigned block() const { return block_; }
  unsigned blocks() const { return blocks_; }
  unsigned lane() const { return thread_ % kWarpSize; }
  unsigned warp() const { return thread_ / kWarpSize; }
  unsigned warps() const { return threads_ / kWarpSize; }

  using Where = std::source_location;
  void block_barrier(Where where = Where::current()) const;
  void grid_barrier(Where where = Where::current()) const;
  uint32_t ballot(bool predicate, Where where = Where::current()) const;
  template <class V>
  V shuffle(V value, unsigned lane, Where where = Where::current()) const;

  template <class V>
  V atomic_add(V* p, std::type_identity_t<V> v) const {
    return std::atomic_ref<V>(*p).fetch_add(v, std::memory_order_relaxed);
  }
  uint32_t atomic_or(uint32_t* p, uint32_t v) const { return std::atomic_ref<uint32_t>(*p).fetch_or(v, std::memory_order_relaxed); }
  template <class S>
  S& shared() const;

 private:
  Machine& machine_;
  unsigned id_, block_, thread_, blocks_, threads_;
};

class Machine {
 public:
  using Kernel = std::function<void(const Grid&)>;

  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  void run(unsigned blocks, unsigned threads, uint64_t seed, const Kernel& kernel) {
    if (blocks == 0 || threads == 0 || threads % kWarpSize != 0) throw std::invalid_argument("a grid of whole warps is expected");
    publish(&begin_);
    Unseen unseen;
    scheduler_.adopt_current_thread();
    unsigned count = blocks * threads;
    kernel_ = &kernel;
    random_.seed(seed);
    while (fibers_.size() < count) fibers_.emplace_back();
    shared_.clear();
    shared_.resize(blocks);
    warps_.assign(count / kWarpSize, {});
    barriers_[kWarpBarrier].assign(count / kWarpSize, State(kWarpSize));
    barriers_[kBlockBarrier].assign(blocks, State(threads));
    barriers_[kGridBarrier].assign(1, State(count));
    runnable_.resize(count);
    runnable_count_ = count;
    for (unsigned id = 0; id < count; ++id) {
      Fiber& fiber = fibers_[id];
      fiber.grid = std::make_unique<Grid>(*this, id, id / threads, id % threads, blocks, threads);
      fiber.waits = kNowhere;
      fiber.done = false;
      fiber.context.start(&Machine::entry);
      runnable_[id] = id;
    }
    unsigned done = 0;
    while (runnable_count_ > 0) {
      std::swap(runnable_[random_() % runnable_count_], runnable_[runnable_count_ - 1]);
      current_ = runnable_[--runnable_count_];
      scheduler_.switch_to(fibers_[current_].context);
      if (fibers_[current_].done) ++done;
    }
    if (done < count) {
      for (unsigned id = 0; id < count; ++id) fibers_[id].context.abandon(&end_, scheduler_);
    }
    observe(&end_);
    if (done == count) return;
    throw Deadlock(describe(count));
  }

  enum Barrier { kNowhere = -1, kWarpBarrier, kBlockBarrier, kGridBarrier };

  EMULATED_UNSEEN void wait(unsigned id, Barrier kind, unsigned group, const std::source_location& where) {
    State& barrier = barriers_[kind][group];
    unsigned *waiting = barrier.waiting.data(), *runnable = runnable_.data();
    if (kind != kWarpBarrier) publish(&barrier);
    Fiber& fiber = fibers_[id];
    fiber.waits = kind;
    fiber.where = where;
    waiting[barrier.count++] = id;
    bool complete = barrier.count == barrier.size;
    // Threads that meet at different places of the source are let through by today's hardware, and forbidden by CUDA.
    for (unsigned i = 0; complete && i < barrier.size; ++i) complete = same_place(fibers_[waiting[i]].where, where);
    if (complete) {
      for (unsigned i = 0; i < barrier.size; ++i) {
        fibers_[waiting[i]].waits = kNowhere;
        runnable[runnable_count_++] = waiting[i];
      }
      barrier.count = 0;
    }
    fiber.context.switch_to(scheduler_);
    if (kind != kWarpBarrier) observe(&barrier);
  }

  // A warp's exchange: every lane leaves a value and then reads those of the others. Two buffers in turn: no lane can be two
  // exchanges ahead of another.
  struct Exchange {
    uint64_t values[2][kWarpSize];
    uint8_t turn[kWarpSize];
  };
  EMULATED_UNSEEN const uint64_t* exchange(unsigned id, uint64_t value, const std::source_location& where) {
    unsigned lane = id % kWarpSize;
    Exchange& warp = warps_[id / kWarpSize];
    unsigned turn = warp.turn[lane];
    warp.turn[lane] ^= 1;
    warp.values[turn][lane] = value;
    wait(id, kWarpBarrier, id / kWarpSize, where);
    return warp.values[turn];
  }

  std::vector<std::byte>& shared(unsigned block) { return shared_[block]; }

 private:
  struct Fiber {
    Context context;
    std::unique_ptr<Grid> grid;
    Barrier waits = kNowhere;
    std::source_location where;
    bool done = false;
  };
  struct State {
    unsigned size, count = 0;
    std::vector<unsigned> waiting;

    explicit State(unsigned threads) : size(threads), waiting(threads) {}
  };

  EMULATED_UNSEEN static bool same_place(const std::source_location& a, const std::source_location& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
  }

  EMULATED_UNSEEN static void entry() {
    Machine& machine = instance();
    Fiber* fiber = &machine.fibers_[machine.current_];
    fiber->context.arrive(machine.scheduler_);
    observe(&machine.begin_);
    (*machine.kernel_)(*fiber->grid);
    publish(&machine.end_);
    fiber->done = true;
    fiber->context.switch_to(machine.scheduler_, true);
  }

  std::string describe(unsigned count) const {
    static const char* const names[] = {"warp exchange", "block barrier", "grid barrier"};
    std::string text = "deadlock:";
    unsigned returned = 0, lines = 0;
    for (unsigned id = 0; id < count; ++id) returned += fibers_[id].done;
    const Fiber* last = nullptr;
    for (unsigned id = 0; id < count && lines < 8; ++id) {
      const Fiber& fiber = fibers_[id];
      if (fiber.done || (last != nullptr && last->waits == fiber.waits && same_place(last->where, fiber.where))) continue;
      std::string file = fiber.where.file_name();
      text += " from block " + std::to_string(fiber.grid->block()) + " thread " + std::to_string(fiber.grid->thread()) +
              " on: " + names[fiber.waits] + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(fiber.where.line()) + ";";
      last = &fiber;
      ++lines;
    }
    return text + " " + std::to_string(returned) + " of " + std::to_string(count) + " threads have returned";
  }

  const Kernel* kernel_ = nullptr;
  std::mt19937_64 random_;
  std::deque<Fiber> fibers_;
  std::vector<unsigned> runnable_;  // as many of them as can run now
  unsigned runnable_count_ = 0;
  unsigned current_ = 0;
  Context scheduler_;
  std::vector<std::vector<std::byte>> shared_;
  std::vector<Exchange> warps_;
  std::vector<State> barriers_[3];
  char begin_ = 0, end_ = 0;  // by their addresses: what the host did before the launch, what the threads did for the host to see
};

inline void Grid::block_barrier(Where where) const { machine_.wait(id_, Machine::kBlockBarrier, block_, where); }
inline void Grid::grid_barrier(Where where) const { machine_.wait(id_, Machine::kGridBarrier, 0, where); }

EMULATED_UNSEEN inline uint32_t Grid::ballot(bool predicate, Where where) const {
  const uint64_t* values = machine_.exchange(id_, predicate, where);
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) bits |= static_cast<uint32_t>(values[lane]) << lane;
  return bits;
}

template <class V>
EMULATED_UNSEEN V Grid::shuffle(V value, unsigned lane, Where where) const {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  if (lane >= kWarpSize) throw std::out_of_range("shuffle: lane");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* values = machine_.exchange(id_, bits, where);
  std::memcpy(&value, &values[lane], sizeof value);
  return value;
}

template <class S>
S& Grid::shared() const {
  Unseen unseen;
  std::vector<std::byte>& storage = machine_.shared(block_);
  if (storage.empty()) storage.assign(sizeof(S), std::byte{0xcd});
  if (storage.size() != sizeof(S)) throw std::logic_error("shared: one type per kernel");
  return *reinterpret_cast<S*>(storage.data());
}

// Runs kernel(grid) for every thread of a grid; an exception thrown in the kernel ends the program.
inline void launch(unsigned blocks, unsigned threads, uint64_t seed, const Machine::Kernel& kernel) {
  Machine::instance().run(blocks, threads, seed, kernel);
}

}  // namespace emulated
