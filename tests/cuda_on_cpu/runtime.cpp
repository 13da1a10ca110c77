// Runs the kernels that emulator.h lets g++ compile: one block at a time, each CUDA thread a fiber, all on the caller's
// thread. A unit built with -fsanitize=thread,undefined calls the hooks at the end of this file, for the sanitizers'
// own libraries are not linked: they check every load and store by CUDA's rules. For x86-64 Linux.
#define CUDA_ON_CPU_RUNTIME
#include "emulator.h"

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>
#include <xmmintrin.h>

// ---- what Python fills in and reads; __init__.py declares the same --------------------------------------------------
struct Report {
    char message[512];
    int in_thread;  // whether block and thread are set
    unsigned block[3], thread[3];
    int argument;  // -1: none
    long long index;
    const char* file;  // the place, if it is known as a line,
    int line;
    void *pc, *other_pc;  // or as an address in the unit: of the fault, and of the other access in a race
};
struct Launch {
    unsigned grid[3], block[3], shared_bytes;
    int check;
    uint64_t seed;
    double seconds;  // of CPU time, after which the kernel counts as endless
    Report report;
};
enum ArgumentKind { ARRAY = 1, WRITES = 2, UNINITIALISED = 4 };
struct Argument {
    void* data;  // an array's elements, or a scalar's value
    size_t bytes;
    unsigned item;  // bytes of an element
    int kind;
    const char* name;
};

namespace cuda_on_cpu {
const Thread* current;
dim3 grid_size, block_size;

namespace {
constexpr unsigned WARP = 32, MASKS = 8;  // MASKS: so many masks may a warp's collectives use in one block
constexpr size_t PAGE = 4096, STACK = 64 << 10;

enum State { RUNNING, AT_WARP, AT_BLOCK };
struct Copy {  // an asynchronous one, begun and not yet landed
    char *to, bytes[16];
    unsigned group;
    void* pc;
};
struct Fiber : Thread {
    unsigned index, warp, copy_groups;  // copy_groups: committed so far
    State state;
    std::vector<Copy> copies;
    Place place;  // of the barrier where it waits
    void* stack_pointer;
    char* stack;
};
struct Group {  // lanes that meet under one mask; two slots, for a lane may be one meeting ahead of another
    unsigned mask, arrived, slot, present[2];
    uint64_t value[2][WARP];
    Place place;
};
struct Warp {  // sets of lanes are bits
    unsigned lanes, alive, ready, at_block, epoch, group_count;
    Group groups[MASKS];
    Fiber* turn[WARP];
};
struct Block {
    unsigned id, serial;  // serial: counts the blocks of all launches
    unsigned alive, arrived, epoch;
    int votes[3], result[3];
    Place place;
    std::vector<Warp> warps;
    std::vector<Warp*> turn;
} block;

Launch* launch;
const Kernel* kernel;
std::vector<void*> kernel_arguments;
std::vector<Fiber*> fibers;
std::vector<unsigned> block_order;  // empty: 0, 1, 2...
unsigned first_serial;
bool failed, allocating, late;
void *scheduler_stack_pointer, *last_access;  // last_access: where in the unit, in check mode
uint64_t random_state;

Warp* running;  // the warp that has its turn,
unsigned place_in_turn;  // and the place in it of the fiber that runs

Fiber* me() { return static_cast<Fiber*>(const_cast<Thread*>(current)); }
uint64_t random_number() {  // SplitMix64, good from seeds 1, 2, 3 on
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}
template <class T> void shuffle_order(T* items, size_t n) {
    for (size_t i = n; i > 1; --i) std::swap(items[i - 1], items[random_number() % i]);
}

// ---- fibers ---------------------------------------------------------------------------------------------------------
// The switch saves what the calling convention preserves. MXCSR is the same for all.
extern "C" void cuda_on_cpu_switch(void** save_stack_pointer, void* next_stack_pointer);
__asm__(
    ".pushsection .text\n"
    ".hidden cuda_on_cpu_switch\n"
    ".globl cuda_on_cpu_switch\n"
    ".type cuda_on_cpu_switch, @function\n"
    "cuda_on_cpu_switch:\n"
    "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"
    ".size cuda_on_cpu_switch, . - cuda_on_cpu_switch\n"
    ".popsection\n");

void to_scheduler() { cuda_on_cpu_switch(&me()->stack_pointer, scheduler_stack_pointer); }
void resume(Fiber* fiber) {
    current = fiber;
    cuda_on_cpu_switch(&scheduler_stack_pointer, fiber->stack_pointer);
    current = nullptr;
}
// The next fiber of the warp that is ready, in its turn and then from the start again; null if none is.
Fiber* next_in_turn(unsigned from) {
    Warp& warp = *running;
    while (warp.ready) {
        for (unsigned i = from; i < warp.lanes; ++i) {
            if (!(warp.ready >> warp.turn[i]->lane & 1)) continue;
            place_in_turn = i;
            return warp.turn[i];
        }
        from = 0;
    }
    return nullptr;
}
// Whoever is next runs, without a way round by the scheduler.
void yield() {
    Fiber *mine = me(), *next = failed || late ? nullptr : next_in_turn(place_in_turn + 1);
    if (next == mine) return;
    if (!next) return to_scheduler();
    current = next;
    cuda_on_cpu_switch(&mine->stack_pointer, next->stack_pointer);
}

// ---- failures -------------------------------------------------------------------------------------------------------
// The first failure is told and ends the launch. A fiber that fails is left as it is; the next launch starts it anew.
struct Where : Place {
    void* pc = nullptr;
    Where(Place place = {nullptr, 0}) : Place(place) {}
    Where(void* pc) : Place{nullptr, 0}, pc(pc) {}
};
void tell(Where where, const char* format, va_list rest) {
    if (failed) return;
    failed = true;
    Report& report = launch->report;
    report.file = where.file;
    report.line = where.line;
    report.pc = where.pc;
    if (current) {
        const uint3 b = current->block, t = current->thread;
        report.in_thread = 1;
        report.block[0] = b.x, report.block[1] = b.y, report.block[2] = b.z;
        report.thread[0] = t.x, report.thread[1] = t.y, report.thread[2] = t.z;
    }
    vsnprintf(report.message, sizeof report.message, format, rest);
}
__attribute__((format(printf, 2, 3))) void fail(Where where, const char* format, ...) {
    va_list rest;
    va_start(rest, format);
    tell(where, format, rest);
    va_end(rest);
}
[[noreturn]] void leave() {
    to_scheduler();
    abort();  // never resumed
}
[[noreturn, gnu::format(printf, 2, 3)]] void fail_and_leave(Where where, const char* format, ...) {
    va_list rest;
    va_start(rest, format);
    tell(where, format, rest);
    va_end(rest);
    leave();
}

// ---- guarded memory -------------------------------------------------------------------------------------------------
// Every array ends at an unreadable page, less at most 15 bytes for its alignment, and has another such page before it.
// What surrounds it on its own pages holds NaNs that bear a number, which a launch must leave as they are: another
// array's surroundings, copied there, would bear another. Uninitialised memory holds 0xff, and so reads as NaN, or -1.
// All arrays lie in the middle of a reserve that no 32-bit index leads out of.
constexpr size_t RESERVE = size_t(64) << 30, CHUNK = 64 << 10;
constexpr int UNWRITTEN = 0xff;

// Who accessed a cell of memory, and when: barriers count the epochs of the block and of the warp.
enum Scope : uint8_t { ONE_THREAD, ONE_WARP, ONE_BLOCK, MANY_BLOCKS };
struct Stamp {
    void* pc;
    unsigned block, block_epoch, warp_epoch;  // block: its serial number
    uint16_t thread;
    bool atomic;
    Scope by;  // more than one thread where no barrier kept them apart; the rest of the stamp is the last one's
};
struct Shadow {
    Stamp write, read;
};
struct Region {
    char *pages, *lo, *hi;  // the readable pages, and the array in them
    size_t size;            // of the pages
    const char* name;
    int argument;   // -1: shared memory
    unsigned cell;  // bytes that one shadow stands for
    bool initialised, read_only;
    unsigned born;  // stamps of blocks before this one are of an earlier use of the memory
    std::vector<Shadow> shadow;
    std::vector<Stamp> copying;  // of each 16 bytes, the asynchronous copy under way to it; its pc is null if none is
    std::vector<uint32_t> surroundings;  // what they hold; as long as either side can be
};
char *arrays, *arrays_end;
std::vector<Region*> chunk_owner;  // of each chunk from `arrays` on
std::vector<Region*> free_regions;

[[noreturn]] void out_of_memory(const char* what) {
    perror(what);
    abort();
}
Region* new_region(size_t size) {
    if (!arrays) {
        void* p = mmap(nullptr, RESERVE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) out_of_memory("cuda_on_cpu: no address space");
        arrays = arrays_end = reinterpret_cast<char*>((uintptr_t(p) + RESERVE * 3 / 8) / CHUNK * CHUNK);
    }
    Region* region = new Region();
    region->pages = arrays_end + PAGE;
    region->size = size;
    static uint16_t count;
    region->surroundings.assign(2 * PAGE / sizeof(uint32_t), 0xffff0000u | count++);
    arrays_end += (size + 2 * PAGE + CHUNK - 1) / CHUNK * CHUNK;
    if (arrays_end > arrays + RESERVE / 4) out_of_memory("cuda_on_cpu: too many arrays");
    if (mprotect(region->pages, size, PROT_READ | PROT_WRITE)) out_of_memory("cuda_on_cpu: no memory");
    chunk_owner.resize(size_t(arrays_end - arrays) / CHUNK, region);
    return region;
}
// What the memory behind the array holds: a number starts at each multiple of its size.
const char* behind(const Region* r) {
    return reinterpret_cast<const char*>(r->surroundings.data()) + uintptr_t(r->hi) % sizeof(uint32_t);
}
// Memory at an address with that remainder modulo 16. All of its pages but the array itself is filled.
Region* allocate(size_t bytes, unsigned cell, size_t remainder) {
    allocating = true;
    const size_t size = (bytes + 16 + PAGE - 1) / PAGE * PAGE;
    size_t i = 0;
    while (i < free_regions.size() && free_regions[i]->size != size) ++i;
    if (i == free_regions.size()) free_regions.push_back(new_region(size));
    Region* region = free_regions[i];
    free_regions.erase(free_regions.begin() + long(i));
    char* end = region->pages + size;
    region->lo = end - (bytes + 15) / 16 * 16 + remainder;
    if (region->lo + bytes > end) region->lo -= 16;
    region->hi = region->lo + bytes;
    region->cell = cell;
    memcpy(region->pages, region->surroundings.data(), size_t(region->lo - region->pages));
    memcpy(region->hi, behind(region), size_t(end - region->hi));
    if (launch->check && region->shadow.size() <= bytes / cell) region->shadow.resize(bytes / cell + 1);
    allocating = false;
    return region;
}
void release(Region* region) {
    if (region->read_only) mprotect(region->pages, region->size, PROT_READ | PROT_WRITE);
    region->read_only = false;
    region->copying.clear();
    if (region->size > 16 << 20) {  // large memory is given back
        madvise(region->pages, region->size, MADV_DONTNEED);
        std::vector<Shadow>().swap(region->shadow);
    }
    free_regions.push_back(region);
}
Region* region_at(uintptr_t address) {
    const size_t chunk = (address - uintptr_t(arrays)) / CHUNK;
    return address >= uintptr_t(arrays) && chunk < chunk_owner.size() ? chunk_owner[chunk] : nullptr;
}
struct Text {
    char text[160];
};
// What lies at an address, in words. The report is given the argument and the index in it.
Text describe(uintptr_t address) {
    Text t;
    const Region* r = region_at(address);
    if (address < PAGE) {
        snprintf(t.text, sizeof t.text, "a null pointer");
    } else if (!r) {
        snprintf(t.text, sizeof t.text, "address %#zx, far from every array", address);
    } else {
        const long long cell = r->cell, size = (r->hi - r->lo) / cell, at = (long long)(address - uintptr_t(r->lo));
        const long long index = at < 0 ? -((-at + cell - 1) / cell) : at / cell;
        char what[80];
        if (r->argument < 0) snprintf(what, sizeof what, "shared memory '%s'", r->name);
        else snprintf(what, sizeof what, "argument %d '%s'", r->argument, r->name);
        snprintf(t.text, sizeof t.text, "%s, index %lld of %lld", what, index, size);
        if (!failed) launch->report.argument = r->argument, launch->report.index = index;
    }
    return t;
}
void check_surroundings(const Region* r) {
    if (memcmp(r->pages, r->surroundings.data(), size_t(r->lo - r->pages))) {
        describe(uintptr_t(r->lo) - 1);
        fail({}, "out-of-bounds write: something before the start of '%s'", r->name);
    } else if (memcmp(r->hi, behind(r), size_t(r->pages + r->size - r->hi))) {
        describe(uintptr_t(r->hi));
        fail({}, "out-of-bounds write: something behind the end of '%s'", r->name);
    }
}

// ---- the scheduler --------------------------------------------------------------------------------------------------
void release_warp(Warp& warp, Group& group) {
    group.present[group.slot] = group.arrived;
    group.slot ^= 1;
    warp.ready |= group.arrived;
    group.arrived = 0;
}
void clear_votes() {
    block.votes[COUNT] = block.votes[OR] = 0;
    block.votes[AND] = 1;
}
void release_block() {
    std::copy(block.votes, block.votes + 3, block.result);
    clear_votes();
    block.arrived = 0;
    block.epoch++;
    for (Warp& warp : block.warps) {
        warp.ready |= warp.at_block;
        warp.at_block = 0;
    }
}
void wait(State state, Place at) {
    block.warps[me()->warp].ready &= ~(state == RUNNING ? 0 : 1u << me()->lane);
    me()->state = state;
    me()->place = at;
    yield();
}
void thread_ends() {  // and is waited for no longer
    Warp& warp = block.warps[me()->warp];
    const unsigned bit = 1u << me()->lane;
    warp.alive &= ~bit;
    warp.ready &= ~bit;
    block.alive--;
    for (Group* g = warp.groups; g < warp.groups + warp.group_count; ++g)
        if (g->arrived && g->arrived == (g->mask & warp.alive)) release_warp(warp, *g);
    if (block.arrived && block.arrived == block.alive) release_block();
}
void fiber_main() {
    kernel->call(kernel_arguments.data());
    thread_ends();
    yield();
    abort();  // never resumed
}
void prepare(Fiber* fiber) {  // so that the next switch to it enters fiber_main
    void** top = reinterpret_cast<void**>(fiber->stack + STACK - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber->stack_pointer = top;
    fiber->copies.clear();
    fiber->copy_groups = 0;
}
Fiber* new_fiber() {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) out_of_memory("cuda_on_cpu: no memory for stacks");
    mprotect(memory, PAGE, PROT_NONE);  // a stack that overflows faults
    Fiber* fiber = new Fiber();
    fiber->stack = static_cast<char*>(memory) + PAGE;
    return fiber;
}
unsigned set_up_threads() {
    const unsigned threads = block_size.x * block_size.y * block_size.z;
    while (fibers.size() < threads) fibers.push_back(new_fiber());
    for (unsigned i = 0; i < threads; ++i) {
        fibers[i]->thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        fibers[i]->lane = i % WARP;
        fibers[i]->warp = i / WARP;
        fibers[i]->index = i;
    }
    return threads;
}
void set_up_block(unsigned id, unsigned threads) {
    block.id = id;
    block.serial++;
    block.alive = threads;
    block.arrived = block.epoch = 0;
    clear_votes();
    block.warps.resize((threads + WARP - 1) / WARP);
    block.turn.clear();
    const uint3 index = {id % grid_size.x, id / grid_size.x % grid_size.y, id / grid_size.x / grid_size.y};
    for (unsigned i = 0; i < threads; ++i) {
        Warp& warp = block.warps[i / WARP];
        if (i % WARP == 0) {
            warp.lanes = std::min(WARP, threads - i);
            warp.alive = warp.ready = ~0u >> (WARP - warp.lanes);
            warp.at_block = warp.epoch = warp.group_count = 0;
            block.turn.push_back(&warp);
        }
        Fiber* f = warp.turn[i % WARP] = fibers[i];
        f->block = index;
        f->state = RUNNING;
        prepare(f);
    }
}
void tell_deadlock() {
    static const char* const where[] = {"runs", "waits in a warp collective", "waits in __syncthreads"};
    char text[300] = "";
    Place first = {nullptr, 0};
    int used = 0, told = 0;
    for (const Warp& warp : block.warps) {
        for (const Fiber* f : std::vector<Fiber*>(warp.turn, warp.turn + warp.lanes)) {
            if (!(warp.alive >> f->lane & 1) || told == 3) continue;
            if (told++ == 0) first = f->place;
            used += snprintf(text + used, sizeof text - size_t(used), "; thread (%u,%u,%u) %s at line %d", f->thread.x,
                             f->thread.y, f->thread.z, where[f->state], f->place.line);
        }
    }
    fail(first, "deadlock in block %u: %u threads wait for ever, the others have ended%s", block.id, block.alive, text);
}
void tell_endless(void* pc) {
    fail(last_access ? last_access : pc, "the kernel has not ended after %g s of CPU time: an endless loop?",
         launch->seconds);
}
// Hostile on purpose: a warp runs as far as it can before the next one starts, and a thread before its neighbour; with
// a seed, in another order after each barrier.
void run_block(unsigned id, unsigned threads) {
    set_up_block(id, threads);
    while (block.alive) {
        bool ran = false;
        if (launch->seed) shuffle_order(block.turn.data(), block.turn.size());
        for (Warp* warp : block.turn) {
            if (launch->seed) shuffle_order(warp->turn, warp->lanes);
            running = warp;
            while (Fiber* first = next_in_turn(0)) {
                resume(first);
                if (late) tell_endless(nullptr);
                if (failed) return;
                ran = true;
            }
        }
        if (!ran) return tell_deadlock();
    }
}

// ---- faults ---------------------------------------------------------------------------------------------------------
constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
struct sigaction former_action[5];

// The fiber that faults goes on in leave(), on an empty stack, so that the launch ends in good order.
void on_signal(int number, siginfo_t* info, void* context) {
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    void* const pc = reinterpret_cast<void*>(registers[REG_RIP]);
    const uintptr_t address = uintptr_t(info->si_addr);
    if (number == SIGVTALRM) {  // comes again and again, so it may pass where leaving would do harm
        late = true;
        if (!current || allocating || failed) return;
        tell_endless(pc);
    } else if (!current) {  // no kernel's fault: it happens again, and is told as before
        for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &former_action[i], nullptr);
        return;
    } else if (number == SIGFPE) {
        fail(pc, "integer division by zero");
    } else if (number == SIGILL) {
        fail(pc, "__builtin_unreachable() or __builtin_trap() reached");
    } else if (info->si_code == SI_KERNEL) {  // what the CPU says to an aligned 16-byte instruction
        fail(pc, "misaligned access of 16 bytes, or an address that cannot be");
    } else if (uintptr_t(me()->stack) - address - 1 < PAGE) {
        fail(pc, "the thread's stack of %zu KiB is full", STACK >> 10);
    } else {
        const bool write = registers[REG_ERR] & 2;
        const Region* r = region_at(address);
        const bool inside = r && address >= uintptr_t(r->lo) && address < uintptr_t(r->hi);
        if (inside && write) fail(pc, "write through a pointer to const: %s", describe(address).text);
        else fail(pc, "out-of-bounds %s: %s", write ? "write" : "read", describe(address).text);
    }
    registers[REG_RIP] = greg_t(&leave);
    registers[REG_RSP] = greg_t(uintptr_t(me()->stack) + STACK - 64 - 8);
}
// While a kernel runs its faults are ours, and a timer ends it if it is endless.
struct Guard {
    stack_t former_stack;
    timer_t timer;
    unsigned former_csr = _mm_getcsr();
    explicit Guard(bool flush_denormals) {
        static char memory[64 << 10];  // a stack for on_signal, as the fiber's may be full
        stack_t stack{};
        stack.ss_sp = memory;
        stack.ss_size = sizeof memory;
        sigaltstack(&stack, &former_stack);
        struct sigaction action {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &action, &former_action[i]);
        sigevent event{};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = SIGVTALRM;
        event._sigev_un._tid = int(syscall(SYS_gettid));
        if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer)) out_of_memory("cuda_on_cpu: no timer");
        const time_t whole = time_t(launch->seconds);
        const itimerspec when{{0, 10'000'000}, {whole, long(1e9 * (launch->seconds - double(whole)))}};
        timer_settime(timer, 0, &when, nullptr);
        constexpr unsigned FTZ_DAZ = 0x8040;
        _mm_setcsr(flush_denormals ? former_csr | FTZ_DAZ : former_csr & ~FTZ_DAZ);
    }
    ~Guard() {
        _mm_setcsr(former_csr);
        timer_delete(timer);
        for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &former_action[i], nullptr);
        sigaltstack(&former_stack, nullptr);
    }
};

// ---- the check of every access --------------------------------------------------------------------------------------
bool live(const Stamp& stamp, const Region* region) { return stamp.block >= region->born; }
bool only_me(const Stamp& earlier, const Stamp& now) {
    return earlier.by == ONE_THREAD && earlier.thread == now.thread && earlier.block == now.block;
}
// Whether a barrier lies between an earlier access, perhaps by several threads, and now.
bool ordered(const Stamp& earlier, const Stamp& now) {
    if (earlier.block != now.block || earlier.by == MANY_BLOCKS) return false;
    if (earlier.block_epoch < now.block_epoch) return true;
    return earlier.by <= ONE_WARP && earlier.thread / WARP == now.thread / WARP &&
           earlier.warp_epoch < now.warp_epoch;
}
[[noreturn]] void tell_race(const char* what, const Stamp& other, const Stamp& now, uintptr_t address,
                            const char* missing = "barrier") {
    const unsigned order = other.block - first_serial, id = block_order.empty() ? order : block_order[order];
    const uint3 t = fibers[other.thread]->thread;
    launch->report.other_pc = other.pc;
    fail_and_leave(now.pc, "race: %s by thread (%u,%u,%u) of block (%u,%u,%u), with no %s between them: %s", what, t.x,
                   t.y, t.z, id % grid_size.x, id / grid_size.x % grid_size.y, id / grid_size.x / grid_size.y, missing,
                   describe(address).text);
}
// The stamp of an access together with an earlier one that no barrier keeps apart from it.
Stamp beside(const Stamp& earlier, Stamp now) {
    now.atomic &= earlier.atomic;
    now.by = std::max(now.by, earlier.by);
    if (earlier.block != now.block) now.by = MANY_BLOCKS;
    else if (earlier.thread / WARP != now.thread / WARP) now.by = std::max(now.by, ONE_BLOCK);
    else if (earlier.thread != now.thread) now.by = std::max(now.by, ONE_WARP);
    return now;
}
void check_cell(Region* region, Shadow& cell, uintptr_t address, bool write, const Stamp& now) {
    const bool written = live(cell.write, region), read = live(cell.read, region);
    if (!written && !region->initialised && (!write || now.atomic))
        fail_and_leave(now.pc, "read of memory never written: %s", describe(address).text);
    const bool after_writes = !written || ordered(cell.write, now), after_reads = !read || ordered(cell.read, now);
    const bool both_atomic = now.atomic && cell.write.atomic;
    if (!after_writes && !only_me(cell.write, now) && !both_atomic)
        tell_race(write ? "a write, after a write" : "a read, after a write", cell.write, now, address);
    if (write && !after_reads && !only_me(cell.read, now))
        tell_race("a write, after a read", cell.read, now, address);
    if (write) cell.write = after_writes ? now : beside(cell.write, now);
    else cell.read = after_reads ? now : beside(cell.read, now);
}
Stamp stamp(void* pc, bool atomic) {
    const Fiber* f = me();
    return {pc, block.serial, block.epoch, block.warps[f->warp].epoch, uint16_t(f->index), atomic, ONE_THREAD};
}
void access(uintptr_t address, size_t bytes, bool write, bool atomic, void* return_address) {
    if (!current) return;
    Region* region = region_at(address);
    if (!region) return;  // the thread's own variables, constants; from a wild pointer the access itself faults
    void* const pc = static_cast<char*>(return_address) - 1;  // in the call, not behind it
    last_access = pc;
    const uintptr_t lo = uintptr_t(region->lo), hi = uintptr_t(region->hi);
    if (address < lo || address + bytes > hi) {
        const uintptr_t outside = address < lo ? address : std::max(address, hi);
        fail_and_leave(pc, "out-of-bounds %s of %zu bytes: %s", write ? "write" : "read", bytes,
                       describe(outside).text);
    }
    const Stamp now = stamp(pc, atomic);
    if (!region->copying.empty()) {
        for (size_t i = (address - lo) / 16; i <= (address - lo + bytes - 1) / 16; ++i) {
            const char* what = write ? "a write, after a copy_async16 begun" : "a read, after a copy_async16 begun";
            if (region->copying[i].pc) tell_race(what, region->copying[i], now, address, "copy_async_wait and barrier");
        }
    }
    const size_t first = (address - lo) / region->cell, last = (address - lo + bytes - 1) / region->cell;
    for (size_t i = first; i <= last; ++i) check_cell(region, region->shadow[i], lo + i * region->cell, write, now);
}

// ---- barriers -------------------------------------------------------------------------------------------------------
bool same(Place a, Place b) { return a.line == b.line && a.file == b.file; }

// Waits for all live lanes of the mask. Each brings a value; those of slot *slot may be read after it.
// The last to come calls `complete`, while the others stand still.
const Group* meet(unsigned mask, uint64_t value, Place at, unsigned* slot, bool orders_memory,
                  void (*complete)(const Group&, Place) = nullptr) {
    Warp& warp = block.warps[me()->warp];
    const unsigned lane = me()->lane, bit = 1u << lane;
    if (!(mask & bit)) fail_and_leave(at, "lane %u calls a warp collective whose mask %#x leaves it out", lane, mask);
    Group* group = nullptr;
    for (Group* g = warp.groups; g < warp.groups + warp.group_count; ++g) {
        if (g->mask == mask) group = g;
        else if (g->arrived & mask)
            fail_and_leave(at, "warp collective with mask %#x while lanes %#x wait in another at line %d with mask %#x",
                           mask, g->arrived, g->place.line, g->mask);
    }
    if (!group) {
        if (warp.group_count == MASKS) fail_and_leave(at, "more than %u different masks in one warp", MASKS);
        group = &warp.groups[warp.group_count++];
        group->mask = mask;
        group->arrived = group->slot = 0;
    }
    if (group->arrived && !same(group->place, at))
        fail_and_leave(at, "warp collective while lanes %#x wait in another at line %d", group->arrived,
                       group->place.line);
    group->place = at;
    *slot = group->slot;
    group->value[*slot][lane] = value;
    group->arrived |= bit;
    const bool last = group->arrived == (mask & warp.alive);
    if (last && orders_memory && group->arrived == warp.alive) warp.epoch++;  // not by parts of a warp: too fine for us
    if (last && complete) complete(*group, at);
    if (last) release_warp(warp, *group);
    wait(last ? RUNNING : AT_WARP, at);
    return group;
}
}  // namespace

int sync_block(int predicate, Vote vote, Place at) {
    if (block.arrived && !same(block.place, at))
        fail_and_leave(at, "divergent barrier: others wait in the __syncthreads at line %d", block.place.line);
    block.place = at;
    block.votes[COUNT] += !!predicate;
    block.votes[OR] |= !!predicate;
    block.votes[AND] &= !!predicate;
    const bool last = ++block.arrived == block.alive;
    if (last) release_block();
    else block.warps[me()->warp].at_block |= 1u << me()->lane;
    wait(last ? RUNNING : AT_BLOCK, at);
    return block.result[vote];
}
void sync_warp(unsigned mask, Place at) {
    unsigned slot;
    meet(mask, 0, at, &slot, true);
}
unsigned ballot(unsigned mask, int predicate, Place at) {
    unsigned slot, result = 0;
    const Group* group = meet(mask, !!predicate, at, &slot, false);
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (group->present[slot] >> lane & 1) result |= unsigned(group->value[slot][lane]) << lane;
    return result;
}
static void copy_number(void* to, const void* from, size_t size) {  // its size known to the compiler where it is usual
    if (size == 4) memcpy(to, from, 4);
    else if (size == 8) memcpy(to, from, 8);
    else memcpy(to, from, size);
}
void shuffle(unsigned mask, void* value, size_t size, unsigned from_lane, Place at) {
    uint64_t word = 0;
    unsigned slot;
    copy_number(&word, value, size);
    const Group* group = meet(mask, word, at, &slot, false);
    if (!(group->present[slot] >> from_lane & 1))
        fail_and_leave(at, "shuffle from lane %u, which has ended or takes no part", from_lane);
    copy_number(value, &group->value[slot][from_lane], size);
}
void atomic_access(const void* p, unsigned size) {
    if (launch->check) access(uintptr_t(p), size, true, true, __builtin_return_address(0));
}
void stop(const char* why, Place at) { fail_and_leave(at, "%s", why); }

// ---- tensor cores ---------------------------------------------------------------------------------------------------
namespace {
float operand(bool pairs, unsigned word, int half) {
    const unsigned low = word << 16, high = word & 0xffff0000u, upper_19_bits = word & ~0x1fffu;
    const unsigned read = !pairs ? upper_19_bits : half ? high : low;
    float x;
    memcpy(&x, &read, sizeof x);
    return x;
}
// d += a b with d 16 x 8, by the tables of mma.m16n8k8 with .tf32 and mma.m16n8k16 with .bf16 in the PTX ISA. They
// differ only in what a register holds, a number or two with neighbouring k.
template <bool pairs> __attribute__((target("fma"))) void multiply_matrices(const Group& group, Place at) {
    if (~group.arrived)
        fail_and_leave(at, "mma without lanes %#x, which have ended or never were: all 32 take part", ~group.arrived);
    constexpr int each = pairs ? 2 : 1, depth = 8 * each;
    Fragments* lanes[WARP];
    for (unsigned i = 0; i < WARP; ++i) lanes[i] = reinterpret_cast<Fragments*>(group.value[group.slot][i]);
    float a[16][depth], b[depth][8];
    for (int lane = 0; lane < int(WARP); ++lane) {
        const int i = lane / 4, j = lane % 4;
        for (int half = 0; half < each; ++half) {
            for (int r = 0; r < 4; ++r)
                a[i + r % 2 * 8][(j + r / 2 * 4) * each + half] = operand(pairs, lanes[lane]->a[r], half);
            for (int r = 0; r < 2; ++r) b[(j + r * 4) * each + half][i] = operand(pairs, lanes[lane]->b[r], half);
        }
    }
    for (int row = 0; row < 16; ++row) {
        Fragments** const owners = lanes + row % 8 * 4;
        float d[8];
        for (int column = 0; column < 8; ++column) d[column] = owners[column / 2]->d[row / 8 * 2 + column % 2];
        for (int k = 0; k < depth; ++k)
            for (int column = 0; column < 8; ++column) d[column] = __builtin_fmaf(a[row][k], b[k][column], d[column]);
        for (int column = 0; column < 8; ++column) owners[column / 2]->d[row / 8 * 2 + column % 2] = d[column];
    }
}
}  // namespace
void multiply_fragments(bool pairs, Fragments* mine, Place at) {
    unsigned slot;
    meet(~0u, uintptr_t(mine), at, &slot, false, pairs ? multiply_matrices<true> : multiply_matrices<false>);
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------
// The source is read when the copy begins, and the destination written at the thread's wait, as late as can be. Between
// the two nobody may touch the destination.
namespace {
Region* end_of_copy(const char* which, const void* p, size_t bytes, bool shared, Place at) {
    const uintptr_t address = uintptr_t(p);
    Region* region = region_at(address);
    if (!region || (region->argument < 0) != shared)
        fail_and_leave(at, "copy_async16 %s %s memory: %s", which, shared ? "what is not shared" : "what is not global",
                       describe(address).text);
    if (address % 16)
        fail_and_leave(at, "copy_async16 %s a misaligned address, it needs a multiple of 16: %s", which,
                       describe(address).text);
    const uintptr_t lo = uintptr_t(region->lo), hi = uintptr_t(region->hi);
    if (address < lo || address + bytes > hi)
        fail_and_leave(at, "out-of-bounds %s of %zu bytes: %s", shared ? "write" : "read", bytes,
                       describe(address < lo ? address : std::max(address, hi)).text);
    return region;
}
}  // namespace
void begin_copy(void* to, const void* from, int bytes, Place at) {
    if (bytes < 0 || bytes > 16) fail_and_leave(at, "copy_async16 of %d bytes", bytes);
    Region* region = end_of_copy("to", to, 16, true, at);
    if (bytes) end_of_copy("from", from, size_t(bytes), false, at);
    Copy copy{static_cast<char*>(to), {}, me()->copy_groups, static_cast<char*>(__builtin_return_address(0)) - 1};
    if (launch->check) {
        if (bytes) access(uintptr_t(from), size_t(bytes), false, false, __builtin_return_address(0));
        const Stamp now = stamp(copy.pc, false);
        const size_t offset = size_t(copy.to - region->lo);
        allocating = true;
        region->copying.resize(size_t(region->hi - region->lo) / 16 + 1);
        allocating = false;
        Stamp& before = region->copying[offset / 16];
        if (before.pc)
            tell_race("a copy_async16, after another begun", before, now, uintptr_t(to), "copy_async_wait and barrier");
        for (size_t i = offset / region->cell; i <= (offset + 15) / region->cell; ++i) {
            Shadow seen = region->shadow[i];  // what a write would meet; it becomes one when it lands
            check_cell(region, seen, uintptr_t(region->lo) + i * region->cell, true, now);
        }
        before = now;
    }
    memcpy(copy.bytes, from, size_t(bytes));  // zeros follow
    allocating = true;
    me()->copies.push_back(copy);
    allocating = false;
}
void commit_copies() { me()->copy_groups++; }
void land_copies(int groups_left) {
    auto& copies = me()->copies;
    size_t landed = 0;
    for (; landed < copies.size(); ++landed) {
        const Copy& copy = copies[landed];
        if (uint64_t(copy.group) + unsigned(groups_left) >= me()->copy_groups) break;
        if (launch->check) {
            Region* region = region_at(uintptr_t(copy.to));
            region->copying[size_t(copy.to - region->lo) / 16].pc = nullptr;
            access(uintptr_t(copy.to), sizeof copy.bytes, true, false, static_cast<char*>(copy.pc) + 1);
        }
        memcpy(copy.to, copy.bytes, sizeof copy.bytes);
    }
    copies.erase(copies.begin(), copies.begin() + long(landed));
}

// ---- shared memory --------------------------------------------------------------------------------------------------
// A shared variable keeps its memory from block to block; a block's first thread to reach it makes it uninitialised.
namespace {
std::vector<Region*> shared_regions(1);  // by slot; slot 0 is the launch's dynamic memory
void* shared_region(unsigned slot, const char* name, size_t bytes, unsigned cell) {
    Region*& region = shared_regions[slot];
    if (!region) {
        region = allocate(bytes, cell, 0);
        region->name = name;
        region->argument = -1;
        region->initialised = false;
        region->born = 0;
    }
    if (region->born != block.serial) {
        region->born = block.serial;
        region->copying.clear();
        memset(region->lo, UNWRITTEN, bytes);
    }
    return region->lo;
}
}  // namespace
unsigned new_shared_slot() {
    allocating = true;
    shared_regions.push_back(nullptr);
    allocating = false;
    return unsigned(shared_regions.size() - 1);
}
void* shared_memory(unsigned slot, const char* name, size_t bytes, unsigned cell) {
    return shared_region(slot, name, bytes, cell);
}
void* dynamic_shared_memory(const char* name, unsigned cell) {
    if (!launch->shared_bytes)
        fail_and_leave({}, "'%s' is dynamic shared memory, of which the launch gives none", name);
    return shared_region(0, name, launch->shared_bytes, cell);
}

// ---- a launch -------------------------------------------------------------------------------------------------------
namespace {
bool is_array(const Argument& a) { return a.kind & ARRAY && a.data; }

// Arguments that start at one address are one array, as long as the longest: first[i] is the first of them.
bool merge(std::vector<Argument>& arguments, std::vector<size_t>& first) {
    const size_t count = arguments.size();
    for (size_t i = 0; i < count; ++i) {
        first.push_back(i);
        for (size_t j = 0; j < i && arguments[i].bytes; ++j) {
            Argument &a = arguments[j], &b = arguments[i];
            if (!is_array(a) || !is_array(b) || first[j] != j || a.data != b.data || !a.bytes) continue;
            first[i] = j;
            a.bytes = std::max(a.bytes, b.bytes);
            a.item = std::min(a.item, b.item);
            a.kind |= b.kind;
        }
    }
    for (size_t i = 0; i < count; ++i) {
        for (size_t j = 0; j < i; ++j) {
            const Argument &a = arguments[j], &b = arguments[i];
            if (!is_array(a) || !is_array(b) || first[j] != j || first[i] != i || !a.bytes || !b.bytes) continue;
            const uintptr_t a_start = uintptr_t(a.data), b_start = uintptr_t(b.data);
            if (a_start >= b_start + b.bytes || b_start >= a_start + a.bytes) continue;
            fail({}, "arguments %zu '%s' and %zu '%s' overlap, but start at different addresses", j, a.name, i, b.name);
            return false;
        }
    }
    return true;
}
void run(std::vector<Argument> arguments) {
    const size_t count = arguments.size();
    std::vector<size_t> first;
    if (!merge(arguments, first)) return;
    std::vector<Region*> regions(count, nullptr);
    std::vector<void*> pointers(count, nullptr);
    kernel_arguments.assign(count, nullptr);
    first_serial = block.serial + 1;
    bool has_float = false, has_double = false;
    for (size_t i = 0; i < count; ++i) {
        const Argument& a = arguments[i];
        const Parameter& parameter = kernel->parameters[i];
        has_float |= parameter.kind == 'f' && parameter.size == 4;
        has_double |= parameter.kind == 'f' && parameter.size == 8;
        kernel_arguments[i] = a.kind & ARRAY ? &pointers[i] : a.data;
        if (!is_array(a)) continue;
        if (first[i] == i) {
            Region* r = regions[i] = allocate(a.bytes, a.item, uintptr_t(a.data) % 16);
            r->name = a.name;
            r->argument = int(i);
            r->born = first_serial;
            r->initialised = !(a.kind & UNINITIALISED);
            if (r->initialised) memcpy(r->lo, a.data, a.bytes);
            else memset(r->lo, UNWRITTEN, a.bytes);
            r->read_only = !(a.kind & WRITES);
            if (r->read_only) mprotect(r->pages, r->size, PROT_READ);
        }
        pointers[i] = regions[first[i]]->lo;
    }
    if (shared_regions[0]) release(shared_regions[0]);
    shared_regions[0] = nullptr;

    const unsigned blocks = grid_size.x * grid_size.y * grid_size.z, threads = set_up_threads();
    block_order.clear();
    if (launch->seed) {
        for (unsigned i = 0; i < blocks; ++i) block_order.push_back(i);
        shuffle_order(block_order.data(), blocks);
    }
    {
        // CuPy compiles with -ftz=true, which is for float only; the CPU's switch is for double too.
        Guard guard(has_float || !has_double);
        for (unsigned i = 0; i < blocks && !failed; ++i) run_block(launch->seed ? block_order[i] : i, threads);
    }
    for (size_t i = 0; i < count; ++i) {
        Region* r = regions[i];
        if (!r) continue;
        if (!failed && !r->read_only) {
            memcpy(arguments[i].data, r->lo, arguments[i].bytes);
            check_surroundings(r);
        }
        release(r);
    }
    for (const Region* r : shared_regions)
        if (r && !failed && r->born >= first_serial) check_surroundings(r);
}
}  // namespace
}  // namespace cuda_on_cpu

// ---- what Python calls ----------------------------------------------------------------------------------------------
extern "C" int cuda_on_cpu_launch(const cuda_on_cpu::Kernel* kernel, Launch* launch, const Argument* arguments,
                                  int count) {
    using namespace cuda_on_cpu;
    cuda_on_cpu::kernel = kernel;
    cuda_on_cpu::launch = launch;
    failed = late = false;
    last_access = nullptr;
    launch->report = Report();
    launch->report.argument = -1;
    grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
    block_size = {launch->block[0], launch->block[1], launch->block[2]};
    random_state = launch->seed;
    run({arguments, arguments + count});
    if (!failed) return 0;
    Dl_info unit;
    dladdr(reinterpret_cast<const void*>(kernel->call), &unit);
    for (void** pc : {&launch->report.pc, &launch->report.other_pc})
        if (*pc) *pc = reinterpret_cast<void*>(uintptr_t(*pc) - uintptr_t(unit.dli_fbase));
    return 1;
}

// ---- what code built with -fsanitize=thread calls: a hook before each access ----------------------------------------
#define HOOKS(kind, bytes)                                                                   \
    void __tsan_##kind##read##bytes(void* p) {                                               \
        cuda_on_cpu::access(uintptr_t(p), bytes, false, false, __builtin_return_address(0)); \
    }                                                                                        \
    void __tsan_##kind##write##bytes(void* p) {                                              \
        cuda_on_cpu::access(uintptr_t(p), bytes, true, false, __builtin_return_address(0));  \
    }
extern "C" {
void __tsan_init() {}
HOOKS(, 1)
HOOKS(, 2)
HOOKS(, 4)
HOOKS(, 8)
HOOKS(, 16)
HOOKS(unaligned_, 2)
HOOKS(unaligned_, 4)
HOOKS(unaligned_, 8)
HOOKS(unaligned_, 16)
void __tsan_read_range(void* p, size_t bytes) {
    cuda_on_cpu::access(uintptr_t(p), bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
    cuda_on_cpu::access(uintptr_t(p), bytes, true, false, __builtin_return_address(0));
}

// ---- what code built with -fsanitize=undefined calls, on undefined behaviour ----------------------------------------
struct UndefinedAt {  // what g++ writes down at each such place, as far as we read it
    const char* file;
    uint32_t line, column;
    const struct {
        uint16_t kind, info;
        char name[1];
    }* type;
    unsigned char log_alignment;  // of type_mismatch only
};
#define UNDEFINED(name, parameters, ...)                             \
    void __ubsan_handle_##name parameters {                          \
        using namespace cuda_on_cpu;                                 \
        fail_and_leave(Place{at->file, int(at->line)}, __VA_ARGS__); \
    }
#define AT UndefinedAt *at
UNDEFINED(add_overflow, (AT, uintptr_t, uintptr_t), "integer overflow in +, type %s", at->type->name)
UNDEFINED(sub_overflow, (AT, uintptr_t, uintptr_t), "integer overflow in -, type %s", at->type->name)
UNDEFINED(mul_overflow, (AT, uintptr_t, uintptr_t), "integer overflow in *, type %s", at->type->name)
UNDEFINED(negate_overflow, (AT, uintptr_t), "integer overflow in -, type %s", at->type->name)
UNDEFINED(divrem_overflow, (AT, uintptr_t, uintptr_t), "integer division by zero, or overflow in it")
UNDEFINED(shift_out_of_bounds, (AT, uintptr_t, uintptr_t), "shift by a negative number or by too many bits")
UNDEFINED(out_of_bounds, (AT, intptr_t index), "index %zd is out of the bounds of %s", index, at->type->name)
UNDEFINED(load_invalid_value, (AT, intptr_t value), "%zd is no value of type %s", value, at->type->name)
UNDEFINED(builtin_unreachable, (AT), "__builtin_unreachable() reached")
UNDEFINED(missing_return, (AT), "the function ends without returning a value")
UNDEFINED(type_mismatch_v1, (AT, uintptr_t address), "misaligned access to %s, which needs a multiple of %d: %s",
          at->type->name, 1 << at->log_alignment, describe(address).text)
}
