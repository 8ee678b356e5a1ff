// A process that changes its memory on command, one command a line on its input, "ok" for each on its output.
//
// It is C and not Rust because it is made of system calls on raw memory, which the workspace's lints keep to one crate,
// and because a program without a runtime writes only what it is told to.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>

#define PAGE 4096ul
#define RW (PROT_READ | PROT_WRITE)
#define GUARD_INSTALL 102
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
static struct { char *at; unsigned long pages; int segment; } region[16];
static uint64_t state = 88172645463325252ul;
static atomic_int racing;
static unsigned long raced;

static uint64_t next(void) { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return state; }

static void fail(const char *what) { perror(what); exit(1); }

static void *check(void *at, const char *what) { if (at == MAP_FAILED) fail(what); return at; }

// Fills a page with bytes that no other fill repeats.
static void fill(char *page) { for (unsigned i = 0; i < PAGE / 8; i++) ((volatile uint64_t *)page)[i] = next(); }

// The memfd of region n has the descriptor MEMFD + n.
#define MEMFD 50ul

static void put(unsigned long id, unsigned long first, unsigned long count) {
    static char page[PAGE];
    for (unsigned long i = first; i < first + count; i++) {
        fill(page);
        if (pwrite(MEMFD + id, page, PAGE, i * PAGE) != (ssize_t)PAGE) fail("pwrite");
    }
}

static void *race(void *id) {
    unsigned long n = region[(long)id].pages;
    uint64_t r = 12345;
    while (atomic_load(&racing)) { r = r * 6364136223846793005ul + 1; *(volatile uint64_t *)(region[(long)id].at + (r >> 33) % n * PAGE) = r; raced++; }
    return 0;
}

static void *idle(void *unused) { char *own = malloc(300000); for (int i = 0; i < 70; i++) fill(own + i * PAGE); pause(); return own + (long)unused; }

static void childwork(int sig) { (void)sig; for (unsigned i = 0; i < 16 && i < region[0].pages; i++) fill(region[0].at + 2 * i % region[0].pages * PAGE); }

static int shares(void *unused) { (void)unused; for (;;) pause(); }

static void *crowd(void *unused) { pause(); return unused; }

// Maps, fills and unmaps, and starts processes that map, execute this program again and end: all of it over and over.
static void churn(void) {
    char *maps[4] = {0};
    for (unsigned long n = 0;; n++) {
        char **map = &maps[next() % 4];
        if (*map) munmap(*map, 20 * PAGE);
        *map = check(mmap(0, 20 * PAGE, RW, ANON, -1, 0), "churn");
        for (int i = 0; i < 20; i++) fill(*map + i * PAGE);
        pid_t child = n % 4 == 3 ? vfork() : fork();
        if (child < 0) fail("churn");
        if (!child && n % 2) { execl("/proc/self/exe", "target", "brief", (char *)0); _exit(1); }
        if (!child) {
            state += getpid();
            for (int i = 0; i < 10; i++) fill(*map + i * PAGE);
            _exit(0);
        }
        if (n % 3) while (waitpid(-1, 0, 0) > 0);
    }
}

// Reads from a file into the pages of a region, several at a time, past the page cache and over and over.
static void *read_directly(void *id) {
    enum { DEPTH = 16, BLOCKS = 256 };
    unsigned long n = region[(long)id].pages;
    char *at = region[(long)id].at;
    int file = open(".", O_TMPFILE | O_RDWR, 0600);
    for (unsigned i = 0; i < BLOCKS; i++) { fill(at); if (write(file, at, PAGE) != (ssize_t)PAGE) fail("write"); }
    if (fsync(file) || fcntl(file, F_SETFL, O_DIRECT)) fail("O_DIRECT");
    aio_context_t ring = 0;
    if (syscall(SYS_io_setup, DEPTH, &ring)) fail("io_setup");
    struct iocb requests[DEPTH], *list[DEPTH];
    struct io_event events[DEPTH];
    uint64_t r = 54321;
    for (;;) {
        for (int i = 0; i < DEPTH; i++) {
            r = r * 6364136223846793005ul + 1;
            requests[i] = (struct iocb){ .aio_fildes = file, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_nbytes = PAGE,
                .aio_buf = (uintptr_t)(at + (r >> 33) % n * PAGE), .aio_offset = (r >> 20) % BLOCKS * PAGE };
            list[i] = &requests[i];
        }
        if (syscall(SYS_io_submit, ring, DEPTH, list) != DEPTH) fail("io_submit");
        if (syscall(SYS_io_getevents, ring, DEPTH, DEPTH, events, 0) != DEPTH) fail("io_getevents");
        raced++;
    }
    return 0;
}

// Requests that end when something is written to the descriptors 100, 101, …
static void wait_for_writes(unsigned long count) {
    aio_context_t ring = 0;
    if (syscall(SYS_io_setup, 64, &ring)) fail("io_setup");
    for (unsigned long i = 0; i < count; i++) {
        int ends[2];
        if (pipe(ends) || dup2(ends[0], 200 + i) < 0 || dup2(ends[1], 100 + i) < 0) fail("pipe");
        struct iocb *request = calloc(1, sizeof *request);
        request->aio_fildes = 200 + i; request->aio_lio_opcode = IOCB_CMD_POLL; request->aio_buf = POLLIN;
        if (syscall(SYS_io_submit, ring, 1, &request) != 1) fail("io_submit");
    }
}

static void let_trace(void) {
    int ready[2];
    char done;
    if (pipe(ready)) fail("pipe");
    pid_t traced = getpid(), child = fork();
    if (child < 0) fail("fork");
    if (!child) { if (ptrace(PTRACE_SEIZE, traced, 0, 0)) _exit(1); if (write(ready[1], "x", 1) != 1) _exit(1); for (;;) pause(); }
    close(ready[1]);
    if (read(ready[0], &done, 1) != 1) fail("PTRACE_SEIZE");
}

// Asks to be told of touches of missing pages, and never answers.
static void hold_faults(unsigned long a) {
    struct uffdio_api api = { .api = UFFD_API };
    struct uffdio_register reg = { .range = { (uintptr_t)region[a].at, region[a].pages * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &reg)) fail("userfaultfd");
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "brief")) { char *own = malloc(40 * PAGE); for (int i = 0; i < 39; i++) fill(own + i * PAGE); return 0; }
    char line[256], word[32];
    unsigned long a, b, c;
    pthread_t thread;
    state += getpid();
    if (argc > 1) { puts("ok"); fflush(stdout); }
    while (fgets(line, sizeof line, stdin)) {
        a = b = c = 0;
        if (sscanf(line, "%31s %lu %lu %lu", word, &a, &b, &c) < 1) continue;
        char *at = a < 16 ? region[a].at : 0;
        if (!strcmp(word, "map")) { region[a].at = check(mmap(0, b * PAGE, RW, ANON, -1, 0), word); region[a].pages = b; madvise(region[a].at, b * PAGE, MADV_NOHUGEPAGE); }
        else if (!strcmp(word, "thp")) { char *m = check(mmap(0, b * PAGE + (2 << 20), RW, ANON, -1, 0), word); region[a].at = (char *)(((uintptr_t)m + (2 << 20) - 1) & ~((2ul << 20) - 1)); region[a].pages = b; if (madvise(region[a].at, b * PAGE, MADV_HUGEPAGE)) fail(word); }
        else if (!strcmp(word, "aligned")) { char *m = check(mmap(0, b * PAGE + (2 << 20), RW, ANON, -1, 0), word); region[a].at = (char *)(((uintptr_t)m + (2 << 20) - 1) & ~((2ul << 20) - 1)); region[a].pages = b; madvise(m, b * PAGE + (2 << 20), MADV_NOHUGEPAGE); }
        else if (!strcmp(word, "marks")) { if (open("/proc/self/pagemap", O_RDONLY) < 0) fail(word); }
        else if (!strcmp(word, "shared")) { region[a].at = check(mmap(0, b * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0), word); region[a].pages = b; }
        else if (!strcmp(word, "memfd")) {
            int f = memfd_create("a memfd", MFD_ALLOW_SEALING);
            if (f < 0 || dup2(f, MEMFD + a) < 0 || close(f) || ftruncate(MEMFD + a, b * PAGE)) fail(word);
            region[a].at = check(mmap(0, b * PAGE, RW, MAP_SHARED, MEMFD + a, 0), word); region[a].pages = b;
        }
        // Gone with those who have it attached, whatever becomes of this program.
        else if (!strcmp(word, "segment")) {
            region[a].segment = shmget(IPC_PRIVATE, b * PAGE, IPC_CREAT | 0600); region[a].pages = b;
            region[a].at = check(shmat(region[a].segment, 0, 0), word);
            if (shmctl(region[a].segment, IPC_RMID, 0)) fail(word);
        }
        else if (!strcmp(word, "attach")) { region[b] = region[a]; region[b].at = check(shmat(region[a].segment, 0, c ? SHM_RDONLY : 0), word); }
        else if (!strcmp(word, "detach")) { if (shmdt(at)) fail(word); }
        else if (!strcmp(word, "glimpse")) { char *m = check(shmat(region[a].segment, 0, 0), word); for (unsigned long i = b; i < b + c; i++) fill(m + i * PAGE); if (shmdt(m)) fail(word); }
        else if (!strcmp(word, "pwrite")) put(a, b, c);
        else if (!strcmp(word, "glance")) { char *m = check(mmap(0, region[a].pages * PAGE, RW, MAP_SHARED, MEMFD + a, 0), word); for (unsigned long i = b; i < b + c; i++) { *(volatile char *)(m + i * PAGE); fill(m + i * PAGE); } if (munmap(m, region[a].pages * PAGE)) fail(word); }
        else if (!strcmp(word, "restore")) { static char page[PAGE]; for (unsigned long i = b; i < b + c; i++) { memcpy(page, at + i * PAGE, PAGE); put(a, i, 1); if (pwrite(MEMFD + a, page, PAGE, i * PAGE) != (ssize_t)PAGE) fail(word); } }
        else if (!strcmp(word, "cut")) { if (ftruncate(MEMFD + a, b * PAGE + 7) || ftruncate(MEMFD + a, region[a].pages * PAGE)) fail(word); }
        else if (!strcmp(word, "hollow")) { if (fallocate(MEMFD + a, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, b * PAGE, c * PAGE)) fail(word); }
        else if (!strcmp(word, "reader")) { char path[32]; snprintf(path, sizeof path, "/proc/self/fd/%lu", MEMFD + b); int f = open(path, O_RDONLY); region[a].at = check(mmap(0, region[b].pages * PAGE, PROT_READ, MAP_SHARED, f, 0), word); region[a].pages = region[b].pages; close(f); }
        else if (!strcmp(word, "seal")) { if (fcntl(MEMFD + a, F_ADD_SEALS, (int)b)) fail(word); }
        else if (!strcmp(word, "copy")) { region[b].at = check(mmap(0, region[a].pages * PAGE, RW, MAP_PRIVATE, MEMFD + a, 0), word); region[b].pages = region[a].pages; }
        else if (!strcmp(word, "putter")) { pid_t child = fork(); if (child < 0) fail(word); if (!child) { state += getpid() + raced; put(a, b, c); _exit(0); } raced++; if (waitpid(child, 0, 0) < 0) fail(word); }
        else if (!strcmp(word, "low")) { region[a].at = check(mmap((void *)0x100000, b * PAGE, RW, ANON | MAP_FIXED, -1, 0), word); region[a].pages = b; madvise(region[a].at, b * PAGE, MADV_NOHUGEPAGE); }
        else if (!strcmp(word, "file")) { int f = open("/proc/self/exe", O_RDONLY); region[a].at = check(mmap(0, b * PAGE, RW, MAP_PRIVATE, f, 0), word); region[a].pages = b; close(f); }
        else if (!strcmp(word, "write")) for (unsigned long i = b; i < b + c; i++) fill(at + i * PAGE);
        else if (!strcmp(word, "zero")) memset(at + b * PAGE, 0, c * PAGE);
        else if (!strcmp(word, "read")) for (unsigned long i = b; i < b + c; i++) *(volatile char *)(at + i * PAGE);
        else if (!strcmp(word, "dontneed")) { if (madvise(at + b * PAGE, c * PAGE, MADV_DONTNEED)) fail(word); }
        else if (!strcmp(word, "protect")) { if (mprotect(at + b * PAGE, c * PAGE, PROT_NONE)) fail(word); }
        else if (!strcmp(word, "unmap")) { if (munmap(at + b * PAGE, c * PAGE)) fail(word); }
        else if (!strcmp(word, "replace")) { if (munmap(at, region[a].pages * PAGE)) fail(word); check(mmap(at, region[a].pages * PAGE, RW, ANON | MAP_FIXED, -1, 0), word); madvise(at, region[a].pages * PAGE, MADV_NOHUGEPAGE); }
        else if (!strcmp(word, "resize")) { region[a].at = check(mremap(at, region[a].pages * PAGE, b * PAGE, MREMAP_MAYMOVE), word); region[a].pages = b; }
        else if (!strcmp(word, "onto")) { check(mremap(at, region[a].pages * PAGE, region[a].pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, region[b].at), word); region[b].pages = region[a].pages; region[a].at = 0; }
        else if (!strcmp(word, "brk")) { char *heap = sbrk(a * PAGE); if (heap == (char *)-1) fail(word); for (unsigned long i = 0; i < a; i++) fill(heap + i * PAGE); }
        else if (!strcmp(word, "thread")) { if (pthread_create(&thread, 0, idle, 0)) fail(word); }
        else if (!strcmp(word, "orphans")) { pid_t child = fork(); if (child < 0) fail(word); if (!child) { signal(SIGUSR1, childwork); if (pthread_create(&thread, 0, crowd, 0)) fail(word); pthread_exit(0); } }
        else if (!strcmp(word, "numbers")) { int f = open("/proc/sys/kernel/ns_last_pid", O_WRONLY); if (dprintf(f, "%lu", a) < 1) fail(word); close(f); }
        else if (!strcmp(word, "crowd")) {
            pthread_attr_t small;
            pthread_attr_init(&small);
            pthread_attr_setstacksize(&small, PTHREAD_STACK_MIN);
            for (unsigned long i = 0; i < a; i++) if (pthread_create(&thread, &small, crowd, 0)) fail(word);
        }
        else if (!strcmp(word, "guard")) { if (madvise(at + b * PAGE, c * PAGE, GUARD_INSTALL)) fail(word); }
        else if (!strcmp(word, "churn")) { pid_t child = fork(); if (child < 0) fail(word); if (!child) { state += getpid(); churn(); } }
        else if (!strcmp(word, "direct")) { if (pthread_create(&thread, 0, read_directly, (void *)a)) fail(word); }
        else if (!strcmp(word, "requests")) wait_for_writes(a);
        else if (!strcmp(word, "traced")) let_trace();
        else if (!strcmp(word, "userfaultfd")) hold_faults(a);
        else if (!strcmp(word, "io_uring")) { struct io_uring_params params = {0}; if (syscall(SYS_io_uring_setup, 8, &params) < 0) fail(word); }
        else if (!strcmp(word, "race")) { atomic_store(&racing, 1); if (pthread_create(&thread, 0, race, (void *)a)) fail(word); }
        else if (!strcmp(word, "stop")) { atomic_store(&racing, 0); pthread_join(thread, 0); }
        else if (!strcmp(word, "fork")) { signal(SIGUSR1, childwork); pid_t child = fork(); if (child < 0) fail(word); if (!child) { state += getpid(); childwork(0); for (;;) pause(); } }
        else if (!strcmp(word, "brief")) { pid_t child = fork(); if (child < 0) fail(word); if (!child) { state += getpid() + raced; for (unsigned long i = b; i < b + c; i++) fill(at + i * PAGE); _exit(0); } raced++; if (waitpid(child, 0, 0) < 0) fail(word); }
        else if (!strcmp(word, "double")) { region[b].at = check(mremap(at, 0, region[a].pages * PAGE, MREMAP_MAYMOVE), word); region[b].pages = region[a].pages; }
        else if (!strcmp(word, "punch")) { if (madvise(at + b * PAGE, c * PAGE, MADV_REMOVE)) fail(word); }
        else if (!strcmp(word, "readonly")) { if (mprotect(at + b * PAGE, c * PAGE, PROT_READ)) fail(word); }
        else if (!strcmp(word, "clonevm")) { char *stack = malloc(65536); if (clone(shares, stack + 65536, CLONE_VM | SIGCHLD, 0) < 0) fail(word); }
        else if (!strcmp(word, "exec")) { execl("/proc/self/exe", "target", "again", (char *)0); fail(word); }
        else { fprintf(stderr, "unknown: %s", line); exit(1); }
        puts("ok"); fflush(stdout);
    }
    return 0;
}
