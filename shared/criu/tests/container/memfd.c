/*
 * A program for the tests to move: two processes use a memfd by mappings and by descriptors, check each by the other, and
 * say in the file that STATUS_FILE names how often they went round and how many faults they found: `<ticks> <faults>`,
 * padded.
 *
 * Of the memfd there are: the descriptor that made it and another number of the same open file, one that was opened anew
 * for reading only, a mapping to write to, and one of the read-only descriptor. The second process has them by fork, but
 * for one that it has closed and one that it has opened anew, for appending.
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
#include <sys/stat.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 300, WORDS = PAGE / 8, START = 12345, RW = PROT_READ | PROT_WRITE };
enum { MADE = 20, AGAIN = 21, READER = 22, APPENDER = 23, SEALS = F_SEAL_SHRINK };

static uint64_t *all, *fixed;
static uint64_t bad;

static void die(int code) { exit(code); }

static void expect(int holds) { bad += !holds; }

static int number(int fd, int to, int flags) {
	if (fd < 0 || dup3(fd, to, flags) != to) die(9);
	close(fd);
	return to;
}

/* Page p holds its round in every word, plus the place. */
static void make(uint64_t *page, uint64_t p, uint64_t turn) {
	for (uint64_t i = 0; i < WORDS; i++) page[i] = (turn << 20 | p << 12) + i;
}

static int holds(const volatile uint64_t *page, uint64_t p, uint64_t turn) {
	for (uint64_t i = 0; i < WORDS; i++)
		if (page[i] != (turn ? (turn << 20 | p << 12) + i : 0)) return 0;
	return 1;
}

/* Page 0 holds counters. Odd pages are written to through a descriptor and read through a mapping, even ones the other
 * way; the last hundred are never written to, and beyond them is half a page. */
static void work(uint64_t me, uint64_t turn) {
	static uint64_t page[WORDS];
	for (uint64_t p = 2 + me; p < PAGES - 100; p += 4) {
		expect(holds(fixed + p * WORDS, p, turn - 1));
		if (p % 2) {
			make(page, p, turn);
			expect(pwrite(me ? AGAIN : MADE, page, PAGE, (off_t)(p * PAGE)) == PAGE);
			expect(holds(all + p * WORDS, p, turn));
		} else {
			make(all + p * WORDS, p, turn);
			expect(pread(READER, page, PAGE, (off_t)(p * PAGE)) == PAGE && holds(page, p, turn));
		}
	}
	for (uint64_t p = PAGES - 100; p < PAGES; p += 9) expect(holds(fixed + p * WORDS, p, 0));
}

static void check(uint64_t me, uint64_t turn) {
	char name[64] = { 0 };
	struct stat is;
	expect(readlink("/proc/self/fd/22", name, sizeof name - 1) > 0 && !strcmp(name, "/memfd:some work (deleted)"));
	expect(fstat(READER, &is) == 0 && (is.st_mode & 07777) == 0640);
	expect(is.st_size == PAGES * PAGE + 100);
	expect(fcntl(READER, F_GET_SEALS) == SEALS);
	expect((fcntl(READER, F_GETFL) & O_ACCMODE) == O_RDONLY && (fcntl(AGAIN, F_GETFL) & O_ACCMODE) == O_RDWR);
	expect(fcntl(READER, F_GETFD) == FD_CLOEXEC && fcntl(AGAIN, F_GETFD) == 0);
	expect(lseek(READER, 0, SEEK_CUR) == 77);
	expect(pwrite(READER, "x", 1, 0) < 0);
	expect(mprotect(fixed, PAGE, RW) < 0);
	if (me == 0) {
		/* One open file, one position. */
		expect(lseek(MADE, 1, SEEK_CUR) == (off_t)(START + turn) && lseek(AGAIN, 0, SEEK_CUR) == (off_t)(START + turn));
	} else {
		expect(fcntl(MADE, F_GETFD) < 0);
		expect((fcntl(APPENDER, F_GETFL) & (O_ACCMODE | O_APPEND)) == (O_WRONLY | O_APPEND));
	}
}

int main(void) {
	int status = open(getenv("STATUS_FILE"), O_CREAT | O_WRONLY | O_TRUNC, 0644);
	uint64_t me = 0, turn = 0;
	number(memfd_create("some work", MFD_ALLOW_SEALING), MADE, O_CLOEXEC);
	number(fcntl(MADE, F_DUPFD, 60), AGAIN, 0);
	if (ftruncate(MADE, PAGES * PAGE + 100) || pwrite(MADE, "end", 3, PAGES * PAGE + 97) != 3) die(8);
	if (fchmod(MADE, 0640) || fcntl(MADE, F_ADD_SEALS, SEALS)) die(7);
	number(open("/proc/self/fd/20", O_RDONLY), READER, O_CLOEXEC);
	lseek(READER, 77, SEEK_SET);
	lseek(MADE, START, SEEK_SET);
	all = mmap(NULL, PAGES * PAGE + 100, RW, MAP_SHARED, MADE, 0);
	fixed = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_SHARED, READER, 0);
	if (all == MAP_FAILED || fixed == MAP_FAILED) die(6);
	_Atomic uint64_t *turns = (_Atomic uint64_t *)all, *faults = turns + 2;
	if (fork() == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		me = 1;
		close(MADE);
		number(open("/proc/self/fd/21", O_WRONLY | O_APPEND), APPENDER, 0);
	}
	for (;;) {
		uint64_t least = turns[0] < turns[1] ? turns[0] : turns[1];
		if (turn == least) {
			work(me, ++turn);
			check(me, turn);
			char end[3];
			expect(pread(READER, end, 3, PAGES * PAGE + 97) == 3 && !memcmp(end, "end", 3));
			*faults += bad;
			bad = 0;
			turns[me] = turn;
		}
		if (me == 0) {
			char line[64];
			snprintf(line, sizeof line, "%lu %lu", least, *faults);
			memset(line + strlen(line), ' ', sizeof line - strlen(line));
			line[63] = '\n';
			if (pwrite(status, line, 64, 0) != 64) die(5);
		}
		nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
	}
}
