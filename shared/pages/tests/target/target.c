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
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <fcntl.h>

#define PAGE 4096ul
#define RW (PROT_READ | PROT_WRITE)
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
static struct { char *at; unsigned long pages; } region[16];
static uint64_t state = 88172645463325252ul;
static atomic_int racing;
static unsigned long raced;

static uint64_t next(void) { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return state; }

static void fail(const char *what) { perror(what); exit(1); }

static void *check(void *at, const char *what) { if (at == MAP_FAILED) fail(what); return at; }

// Fills a page with bytes that no other fill repeats.
static void fill(char *page) { for (unsigned i = 0; i < PAGE / 8; i++) ((volatile uint64_t *)page)[i] = next(); }

static void *race(void *id) {
    unsigned long n = region[(long)id].pages;
    uint64_t r = 12345;
    while (atomic_load(&racing)) { r = r * 6364136223846793005ul + 1; *(volatile uint64_t *)(region[(long)id].at + (r >> 33) % n * PAGE) = r; raced++; }
    return 0;
}

static void *idle(void *unused) { char *own = malloc(300000); for (int i = 0; i < 70; i++) fill(own + i * PAGE); pause(); return own + (long)unused; }

static void childwork(int sig) { (void)sig; for (unsigned i = 0; i < 16 && i < region[0].pages; i++) fill(region[0].at + 2 * i % region[0].pages * PAGE); }

static int shares(void *unused) { (void)unused; for (;;) pause(); }

int main(int argc, char **argv) {
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
        else if (!strcmp(word, "shared")) { region[a].at = check(mmap(0, b * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0), word); region[a].pages = b; }
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
