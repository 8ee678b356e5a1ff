/*
 * A program for the tests to move: three processes share memory, each by its own mappings, and say in the file that
 * STATUS_FILE names how often they went round and how many wrong words they found: `<ticks> <faults>`, padded.
 *
 * The memory: one object that all map whole; each process besides has a second mapping of a part of it, and the first has
 * given up a part and made another one read-only. A second object belongs to the last process alone.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, PAGES = 300, PROCESSES = 3, SECOND = 100, PART = 20, RW = PROT_READ | PROT_WRITE };

static uint64_t *all, *part, *own;

static void *map(size_t pages) {
	void *at = mmap(NULL, pages * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED) exit(9);
	return at;
}

/* Page 0 holds counters. Page p belongs to process p % PROCESSES and holds its round in every word, plus the place. */
static void fill(uint64_t *page, uint64_t value) {
	for (uint64_t i = 0; i < WORDS; i++) page[i] = value + i;
}

static uint64_t wrong(const volatile uint64_t *page, uint64_t value) {
	uint64_t bad = 0;
	for (uint64_t i = 0; i < WORDS; i++) bad += page[i] != value + i;
	return bad;
}

static uint64_t work(uint64_t process, uint64_t turn) {
	_Atomic uint64_t *turns = (_Atomic uint64_t *)all;
	uint64_t bad = 0;
	for (uint64_t p = 1; p < PAGES; p++) {
		if (p % PROCESSES != process || (process == 0 && p >= 200)) continue;
		if (turn > 1) bad += wrong(all + p * WORDS, (turn - 1) << 20 | p << 12);
		fill(all + p * WORDS, turn << 20 | p << 12);
		/* The same page by the other mapping. */
		if (p >= SECOND && p < SECOND + PART) bad += wrong(part + (p - SECOND) * WORDS, turn << 20 | p << 12);
	}
	if (own) {
		if (turn > 1) bad += wrong(own, turn - 1);
		fill(own, turn);
	}
	turns[process] = turn;
	return bad;
}

int main(void) {
	int status = open(getenv("STATUS_FILE"), O_CREAT | O_WRONLY | O_TRUNC, 0644);
	uint64_t me = 0, turn = 0;
	all = map(PAGES);
	_Atomic uint64_t *turns = (_Atomic uint64_t *)all, *bad = turns + PROCESSES;
	for (uint64_t p = 1; p < PROCESSES; p++)
		if (fork() == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			me = p;
			break;
		}
	/* With an old size of 0 a shared mapping is made twice. */
	part = mremap(all + SECOND * WORDS, 0, PART * PAGE, MREMAP_MAYMOVE);
	if (part == MAP_FAILED) exit(8);
	if (me == 0) {
		munmap(all + 200 * WORDS, 50 * PAGE);
		mprotect(all + 260 * WORDS, 10 * PAGE, PROT_READ);
	}
	if (me == PROCESSES - 1) own = map(4);
	for (;;) {
		uint64_t least = turns[0];
		for (uint64_t p = 1; p < PROCESSES; p++) least = turns[p] < least ? turns[p] : least;
		/* All go the same way, so that each sees what the others do. */
		if (turn == least) *bad += work(me, ++turn);
		if (me == 0) {
			char line[64];
			snprintf(line, sizeof line, "%lu %lu", least, *bad);
			memset(line + strlen(line), ' ', sizeof line - strlen(line));
			line[63] = '\n';
			if (pwrite(status, line, 64, 0) != 64) exit(7);
		}
		nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
	}
}
