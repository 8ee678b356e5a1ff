/*
 * dirtier [MEBIBYTES [OPERATIONS [childless]]]: changes every kind of memory all the time and, on SIGUSR1, verifies all of
 * it.
 *
 * Kinds: private anonymous, transparent huge pages, brk heap, private file mapping, shared anonymous, memfd, mappings
 * that come and go, that move (mremap) and that are discarded (MADV_DONTNEED), read-only ones, and stacks. Several
 * processes (forked, each with its own copy of what is private) of several threads, and now and then a short-lived
 * child that checks what it inherited.
 *
 * MEBIBYTES: private anonymous memory, in every process (64). OPERATIONS: changes per thread and 10 ms (20). A childless
 * one starts no short-lived processes.
 *
 * The memfd is written to and read by its mapping and by its descriptor, now so and now so.
 *
 * What a page holds is a function of its place and of how often it was changed. That count is kept apart, by the one
 * thread that owns the page, so each page is verified by its owner while all the others go on. On SIGUSR1 it prints
 *   verdict NUMBER operations OPERATIONS bad PAGES
 * and before that a line for every kind and thread with bad pages.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, STRIDE = 32, PROCESSES = 3, THREADS = 2, SLOTS = 16, SLOT_PAGES = 64, HUGE = 2 << 20 };
enum { ANON, THP, HEAP, PRIVATE_FILE, SHARED_ANON, MEMFD, KINDS };

static const char *const KIND[KINDS] = { "anonymous", "huge", "heap", "private-file", "shared", "memfd" };

static char *base[KINDS];
static int memory; /* the memfd's descriptor */
static uint64_t pages[KINDS];
static uint32_t *count[KINDS]; /* private to each process, so forks diverge with their memory */

/* Shared by all processes; each thread writes only its own fields. */
struct report {
	_Atomic uint64_t operations, done, bad;
};
static struct {
	_Atomic uint64_t epoch; /* the number of the verification asked for */
	struct report of[PROCESSES][THREADS];
	_Atomic uint64_t bad_children;
} *board;

static volatile sig_atomic_t asked;

static void die(const char *what) {
	fprintf(stderr, "dirtier: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t next(uint64_t *s) {
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s;
}

static uint64_t word(uint64_t key, uint64_t page, uint32_t times, int at) {
	return ((key << 56) ^ (page << 32) ^ times) * 0x9E3779B97F4A7C15ull + (uint64_t)at;
}

static void write_page(char *to, uint64_t key, uint64_t page, uint32_t times) {
	volatile uint64_t *words = (volatile uint64_t *)to;
	for (int i = 0; i < WORDS; i += STRIDE) words[i] = word(key, page, times, i);
}

/* A page never changed holds zeros. */
static int page_is_bad(const char *at, uint64_t key, uint64_t page, uint32_t times) {
	const volatile uint64_t *words = (const volatile uint64_t *)at;
	for (int i = 0; i < WORDS; i += STRIDE)
		if (words[i] != (times ? word(key, page, times, i) : 0)) return 1;
	return 0;
}

/* The same, of the memfd, by its descriptor. Nobody else writes to the page meanwhile. */
static void put_page(uint64_t page, uint32_t times) {
	char now[PAGE];
	if (pread(memory, now, PAGE, (off_t)(page * PAGE)) != PAGE) die("pread");
	write_page(now, MEMFD, page, times);
	if (pwrite(memory, now, PAGE, (off_t)(page * PAGE)) != PAGE) die("pwrite");
}

static int stored_page_is_bad(uint64_t page, uint32_t times) {
	char now[PAGE];
	if (pread(memory, now, PAGE, (off_t)(page * PAGE)) != PAGE) die("pread");
	return page_is_bad(now, MEMFD, page, times);
}

static void *map(size_t size, int flags, int fd) {
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (at == MAP_FAILED) die("mmap");
	return at;
}

static void make_regions(uint64_t mebibytes) {
	for (int k = 0; k < KINDS; k++) pages[k] = (k == ANON ? mebibytes : 8) << 8;
	size_t small = pages[THP] * PAGE;

	base[ANON] = map(pages[ANON] * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	uintptr_t huge = (uintptr_t)map(small + HUGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	base[THP] = (char *)((huge + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
	madvise(base[THP], small, MADV_HUGEPAGE);
	uintptr_t heap = (uintptr_t)sbrk((intptr_t)small + PAGE);
	if (heap == (uintptr_t)-1) die("sbrk");
	base[HEAP] = (char *)((heap + PAGE - 1) & ~(uintptr_t)(PAGE - 1));

	int file = open("dirtier.data", O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (file < 0 || ftruncate(file, (off_t)small) < 0) die("dirtier.data");
	base[PRIVATE_FILE] = map(small, MAP_PRIVATE, file);
	close(file);
	base[SHARED_ANON] = map(small, MAP_SHARED | MAP_ANONYMOUS, -1);
	memory = memfd_create("dirtier", MFD_CLOEXEC);
	if (memory < 0 || ftruncate(memory, (off_t)small) < 0) die("memfd");
	base[MEMFD] = map(small, MAP_SHARED, memory); /* the descriptor stays open */

	/* A quarter of each is left untouched: holes must stay holes. */
	for (int k = 0; k < KINDS; k++) {
		count[k] = calloc(pages[k], sizeof *count[k]);
		if (!count[k]) die("calloc");
		for (uint64_t p = 0; p < pages[k] * 3 / 4; p++) write_page(base[k] + p * PAGE, (uint64_t)k, p, count[k][p] = 1);
	}
}

/* A page of a shared kind belongs to one thread of one process, of a private kind to one thread of each process. */
static int is_mine(int kind, uint64_t page, int process, int thread) {
	if (kind == SHARED_ANON || kind == MEMFD) return page % (PROCESSES * THREADS) == (uint64_t)(process * THREADS + thread);
	return page % THREADS == (uint64_t)thread;
}

/* Mappings that come and go. Each slot is one mapping of changing size and place, all its pages at one count. */
struct slot {
	char *at;
	uint64_t pages;
	uint32_t times;
	int is_read_only;
};

static void fill_slot(struct slot *s, uint64_t key, uint32_t times) {
	s->times = times;
	for (uint64_t p = 0; p < s->pages; p++) write_page(s->at + p * PAGE, key, p, times);
}

static void change_slot(struct slot *s, uint64_t key, uint64_t *random) {
	uint64_t size = 1 + next(random) % SLOT_PAGES;
	if (!s->at) {
		s->pages = size;
		s->at = map(size * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		fill_slot(s, key, 1);
		return;
	}
	if (s->is_read_only) {
		if (mprotect(s->at, s->pages * PAGE, PROT_READ | PROT_WRITE) < 0) die("mprotect");
		s->is_read_only = 0;
		return;
	}
	switch (next(random) % 5) {
	case 0: /* dropped */
		if (munmap(s->at, s->pages * PAGE) < 0) die("munmap");
		s->at = NULL;
		break;
	case 1: { /* moved, and grown or shrunk: what stays keeps its content */
		uint64_t old = s->pages;
		s->at = mremap(s->at, old * PAGE, size * PAGE, MREMAP_MAYMOVE);
		if (s->at == MAP_FAILED) die("mremap");
		s->pages = size;
		for (uint64_t p = old; p < size; p++)
			if (s->times) write_page(s->at + p * PAGE, key, p, s->times);
		break;
	}
	case 2: /* discarded: it reads as zeros now */
		if (madvise(s->at, s->pages * PAGE, MADV_DONTNEED) < 0) die("madvise");
		s->times = 0;
		break;
	case 3:
		if (mprotect(s->at, s->pages * PAGE, PROT_READ) < 0) die("mprotect");
		s->is_read_only = 1;
		break;
	default:
		fill_slot(s, key, s->times + 1);
	}
}

static uint64_t verify_slots(const struct slot *slots, uint64_t key) {
	uint64_t bad = 0;
	for (int i = 0; i < SLOTS; i++)
		for (uint64_t p = 0; slots[i].at && p < slots[i].pages; p++)
			bad += (uint64_t)page_is_bad(slots[i].at + p * PAGE, key + (uint64_t)i, p, slots[i].times);
	return bad;
}

static uint64_t complain(uint64_t bad, const char *kind, int process, int thread) {
	if (bad) printf("bad %lu of kind %s in process %d thread %d\n", bad, kind, process, thread), fflush(stdout);
	return bad;
}

static uint64_t verify_all(int process, int thread, const struct slot *slots, uint64_t key) {
	uint64_t sum = 0;
	for (int k = 0; k < KINDS; k++) {
		uint64_t bad = 0;
		for (uint64_t p = 0; p < pages[k]; p++)
			if (is_mine(k, p, process, thread)) {
				/* Of the shared kinds each process knows the first count, made before the forks. */
				bad += (uint64_t)page_is_bad(base[k] + p * PAGE, (uint64_t)k, p, count[k][p]);
				if (k == MEMFD) bad += (uint64_t)stored_page_is_bad(p, count[k][p]);
			}
		sum += complain(bad, KIND[k], process, thread);
	}
	return sum + complain(verify_slots(slots, key), "mappings", process, thread);
}

struct place {
	int process, thread, operations;
};

static void *work(void *given) {
	const struct place here = *(struct place *)given;
	struct report *mine = &board->of[here.process][here.thread];
	uint64_t random = 7777 + (uint64_t)(here.process * THREADS + here.thread) * 1000003;
	uint64_t key = 16 + (uint64_t)here.thread * SLOTS;
	struct slot slots[SLOTS] = { 0 };

	for (;;) {
		for (int i = 0; i < here.operations; i++) {
			int k = (int)(next(&random) % (KINDS + 1));
			if (k == KINDS) {
				uint64_t s = next(&random) % SLOTS;
				change_slot(&slots[s], key + s, &random);
			} else {
				uint64_t p = next(&random) % pages[k];
				if (!is_mine(k, p, here.process, here.thread)) continue;
				char *at = base[k] + p * PAGE;
				/* What is about to be overwritten is looked at first: a lost page would be hidden otherwise. */
				if (page_is_bad(at, (uint64_t)k, p, count[k][p])) mine->bad += complain(1, KIND[k], here.process, here.thread);
				if (k == MEMFD && next(&random) % 2)
					put_page(p, ++count[k][p]);
				else
					write_page(at, (uint64_t)k, p, ++count[k][p]);
			}
			mine->operations++;
		}
		uint64_t epoch = board->epoch;
		if (mine->done != epoch) {
			mine->bad += verify_all(here.process, here.thread, slots, key);
			mine->done = epoch;
		}
		nanosleep(&(struct timespec){ 0, 10000000 }, NULL);
	}
	return NULL;
}

static void start_threads(int process, int operations) {
	static struct place places[THREADS];
	for (int t = 0; t < THREADS; t++) {
		pthread_t thread;
		places[t] = (struct place){ process, t, operations };
		if (pthread_create(&thread, NULL, work, &places[t])) die("pthread_create");
	}
}

/* A short-lived child that inherits all memory and checks a mapping which nobody changes. */
static void fork_briefly(const char *constant) {
	pid_t child = fork();
	if (child < 0) die("fork");
	if (child == 0) {
		int bad = 0;
		for (uint64_t p = 0; p < SLOT_PAGES; p++) bad += page_is_bad(constant + p * PAGE, 99, p, 1);
		_exit(bad ? 3 : 0);
	}
	int status;
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR) die("waitpid");
	if (status != 0) board->bad_children++;
}

static void on_usr1(int signal) {
	(void)signal;
	asked = 1;
}

static void on_term(int signal) {
	(void)signal;
	_exit(0);
}

static uint64_t sum(size_t field) {
	uint64_t all = 0;
	for (int p = 0; p < PROCESSES; p++)
		for (int t = 0; t < THREADS; t++) all += *(_Atomic uint64_t *)((char *)&board->of[p][t] + field);
	return all;
}

static int all_done(uint64_t epoch) {
	for (int p = 0; p < PROCESSES; p++)
		for (int t = 0; t < THREADS; t++)
			if (board->of[p][t].done != epoch) return 0;
	return 1;
}

int main(int argc, char **argv) {
	int mebibytes = argc > 1 ? atoi(argv[1]) : 64;
	int operations = argc > 2 ? atoi(argv[2]) : 20;
	int is_childless = argc > 3 && !strcmp(argv[3], "childless");
	if (mebibytes < 1 || operations < 1 || (argc > 3 && !is_childless)) {
		fprintf(stderr, "usage: dirtier [MEBIBYTES [OPERATIONS [childless]]]\n");
		return 2;
	}
	signal(SIGTERM, on_term);
	sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = on_usr1 }, NULL);

	board = map(sizeof *board, MAP_SHARED | MAP_ANONYMOUS, -1);
	char *constant = map(SLOT_PAGES * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (uint64_t p = 0; p < SLOT_PAGES; p++) write_page(constant + p * PAGE, 99, p, 1);
	make_regions((uint64_t)mebibytes);

	for (int p = 1; p < PROCESSES; p++) {
		pid_t child = fork();
		if (child < 0) die("fork");
		if (child == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			signal(SIGUSR1, SIG_IGN);
			start_threads(p, operations);
			for (;;) pause();
		}
	}
	start_threads(0, operations);
	printf("ready\n");
	fflush(stdout);

	for (uint64_t turn = 0;; turn++) {
		if (turn % 20 == 0 && !is_childless) fork_briefly(constant);
		if (asked) {
			asked = 0;
			uint64_t epoch = board->epoch + 1;
			board->epoch = epoch;
			while (!all_done(epoch)) nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
			printf("verdict %lu operations %lu bad %lu\n", epoch, sum(offsetof(struct report, operations)),
			       sum(offsetof(struct report, bad)) + board->bad_children);
			fflush(stdout);
		}
		nanosleep(&(struct timespec){ 0, 50000000 }, NULL);
	}
}
