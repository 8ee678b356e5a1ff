/*
 * writer MEBIBYTES PROCESSES PATTERN HOT FILL KIND [COUNT]: a benchmark's workload. It fills memory, changes it at a rate that it is
 * told, answers a probe on TCP port 6379, and verifies all of it when asked.
 *
 * MEBIBYTES: memory in all, divided among PROCESSES.
 * PATTERN:   hot    each write goes to a random page of the hot set, the first HOT per mille of the memory
 *            shift  the same, but the hot set moves on by its own size each time it was written four times over
 * FILL:      random what a write leaves fills the page and does not compress
 *            sparse what it leaves is 32 bytes, the rest of the page is zeros
 *            byte   a page is filled as by random, but a write changes only 16 bytes of it
 * KIND:      private anonymous, each process its own; shared: anonymous, of all processes; memfd: the same, and its
 *            descriptor stays open; sysv: the same in a System V segment
 *
 * What a page holds is a function of its number and of how often it was written, and that count is kept apart. Which
 * page the N-th write of a process goes to is a function of N: `schedule.rs` computes the same, and both must be
 * changed together. With COUNT it prints the pages of the second process' first COUNT writes, and does nothing else.
 *
 * Commands, each a line, as Redis takes them too: PING; INCR KEY (a counter for each first letter); besides: RATE N
 * (writes per second from now on, over all processes; answered when it holds), WRITES (how many there were), VERIFY
 * (the number of bad pages).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, MOST_PROCESSES = 256, CLIENTS = 64, LINE = 128, PORT = 6379, TURNS = 4 };
enum pattern { HOT, SHIFT };
enum fill { RANDOM, SPARSE, BYTE };
enum kind { PRIVATE, SHARED, MEMFD, SYSV };

static enum pattern pattern;
static enum fill fill;
static char *shared; /* the memory of all processes, if it is */
static uint64_t pages, hot; /* of one process */
static uint32_t processes;
static char *memory;
static uint32_t *times; /* how often each page was written */

/* Shared by all processes. */
static struct {
	_Atomic uint64_t rate; /* writes per second of one process, times 1000 */
	_Atomic uint64_t epoch; /* counts what was asked: each process does it and says so */
	_Atomic uint32_t is_verification;
	struct {
		_Atomic uint64_t writes, done, bad;
	} of[MOST_PROCESSES];
} *board;

static void die(const char *what) {
	fprintf(stderr, "writer: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t mix(uint64_t x) { /* splitmix64 */
	x += 0x9E3779B97F4A7C15ull;
	x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
	x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
	return x ^ (x >> 31);
}

static uint64_t word(uint64_t key, int at) {
	return mix(key + (uint64_t)at * 0x9E3779B97F4A7C15ull);
}

static uint64_t key_of(uint32_t process, uint64_t page, uint32_t count) {
	return mix(((uint64_t)process << 56) ^ (page << 32) ^ count);
}

static void write_page(uint32_t process, uint64_t page, uint32_t count) {
	uint64_t *at = (uint64_t *)(memory + page * PAGE), key = key_of(process, page, count);
	if (fill == RANDOM)
		for (int i = 0; i < WORDS; i++) at[i] = word(key, i);
	if (fill == SPARSE)
		for (int i = 0; i < WORDS; i += WORDS / 4) at[i] = word(key, i);
	if (fill == BYTE) {
		if (count == 1)
			for (int i = 0; i < WORDS; i++) at[i] = word(key, i);
		at[0] = word(key, 0);
		at[WORDS - 1] = word(key, WORDS - 1);
	}
}

static int is_bad(uint32_t process, uint64_t page, uint32_t count) {
	const uint64_t *at = (const uint64_t *)(memory + page * PAGE);
	uint64_t key = key_of(process, page, count), first = key_of(process, page, 1);
	for (int i = 0; i < WORDS; i++) {
		uint64_t right = word(fill == BYTE && i > 0 && i < WORDS - 1 ? first : key, i);
		if (fill == SPARSE && i % (WORDS / 4)) right = 0;
		if (at[i] != right) return 1;
	}
	return 0;
}

/* The page that the write with this number goes to. */
static uint64_t page_of(uint32_t process, uint64_t number) {
	uint64_t page = mix(((uint64_t)process << 48) + number) % hot;
	if (pattern == SHIFT) page += number / (hot * TURNS) * hot;
	return page % pages;
}

static uint64_t now_us(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void *work(void *given) {
	uint32_t process = (uint32_t)(uintptr_t)given;
	uint64_t epoch = 0, begun = now_us(), due = 0, rate = 0;
	for (;;) {
		if (board->epoch != epoch) {
			epoch = board->epoch;
			if (board->is_verification) {
				uint64_t bad = 0;
				for (uint64_t p = 0; p < pages; p++) bad += (uint64_t)is_bad(process, p, times[p]);
				board->of[process].bad = bad;
			}
			rate = board->rate;
			begun = now_us();
			due = 0;
			board->of[process].done = epoch;
		}
		if (rate) {
			uint64_t wanted = (now_us() - begun) * rate / 1000000000;
			/* After a standstill the writes that it swallowed are not made up for: they would be a burst. */
			if ((wanted - due) * 1000 > rate / 10 + 1000) {
				begun = now_us();
				due = wanted = 0;
			}
			for (; due < wanted; due++) {
				uint64_t number = board->of[process].writes, page = page_of(process, number);
				write_page(process, page, ++times[page]);
				board->of[process].writes = number + 1;
			}
		}
		nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
	}
	return NULL;
}

static void start(uint32_t process) {
	memory = shared ? shared + process * pages * PAGE
	                : mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	times = mmap(NULL, pages * sizeof *times, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || times == MAP_FAILED) die("mmap");
	for (uint64_t p = 0; p < pages; p++) write_page(process, p, times[p] = 1);
	pthread_t thread;
	if ((errno = pthread_create(&thread, NULL, work, (void *)(uintptr_t)process))) die("pthread_create");
}

static void make_shared(enum kind kind) {
	size_t size = pages * processes * PAGE;
	int fd = -1, flags = MAP_SHARED | MAP_ANONYMOUS;
	if (kind == PRIVATE) return;
	if (kind == SYSV) {
		int segment = shmget(IPC_PRIVATE, size, IPC_CREAT | 0600);
		shared = segment < 0 ? (void *)-1 : shmat(segment, NULL, 0);
		if (shared == (void *)-1) die("shmat");
		return;
	}
	if (kind == MEMFD) {
		fd = memfd_create("writer", MFD_CLOEXEC);
		if (fd < 0 || ftruncate(fd, (off_t)size)) die("memfd");
		flags = MAP_SHARED;
	}
	shared = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (shared == MAP_FAILED) die("mmap");
}

/* Lets every process take note of what was asked, and gives the sum of the bad pages. */
static uint64_t ask_all(int is_verification) {
	uint64_t bad = 0;
	board->is_verification = (uint32_t)is_verification;
	board->epoch++;
	for (uint32_t p = 0; p < processes; p++)
		while (board->of[p].done != board->epoch) nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
	for (uint32_t p = 0; p < processes; p++) bad += board->of[p].bad;
	return bad;
}

static int answer(const char *line, char *to, size_t room) {
	static uint64_t counters[256];
	uint64_t writes = 0, value;
	if (!strcmp(line, "PING")) return snprintf(to, room, "+PONG\r\n");
	if (!strncmp(line, "INCR ", 5)) return snprintf(to, room, ":%lu\r\n", ++counters[(unsigned char)line[5]]);
	if (sscanf(line, "RATE %lu", &value) == 1) {
		board->rate = value * 1000 / processes;
		ask_all(0);
		return snprintf(to, room, "+OK\r\n");
	}
	if (!strcmp(line, "WRITES")) {
		for (uint32_t p = 0; p < processes; p++) writes += board->of[p].writes;
		return snprintf(to, room, ":%lu\r\n", writes);
	}
	if (!strcmp(line, "VERIFY")) return snprintf(to, room, ":%lu\r\n", ask_all(1));
	return snprintf(to, room, "-ERR unknown command\r\n");
}

struct client {
	size_t length;
	char line[LINE];
};

/* Reads what has come and answers every whole line. Gives 0 when the connection is over. */
static int serve(int fd, struct client *c) {
	ssize_t got = read(fd, c->line + c->length, LINE - 1 - c->length);
	if (got <= 0) return got < 0 && (errno == EAGAIN || errno == EINTR);
	c->length += (size_t)got;
	c->line[c->length] = 0;
	for (char *end; (end = strchr(c->line, '\n'));) {
		char out[LINE];
		size_t used = (size_t)(end - c->line) + 1;
		end[0] = 0;
		if (end > c->line && end[-1] == '\r') end[-1] = 0;
		int size = answer(c->line, out, sizeof out);
		if (send(fd, out, (size_t)size, MSG_NOSIGNAL) != size) return 0;
		memmove(c->line, c->line + used, c->length - used + 1);
		c->length -= used;
	}
	return c->length < LINE - 1;
}

static void listen_and_serve(void) {
	static struct client clients[CLIENTS];
	struct pollfd fds[CLIENTS];
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 128)) die("listen");
	for (int i = 0; i < CLIENTS; i++) fds[i] = (struct pollfd){ .fd = -1, .events = POLLIN };
	fds[0].fd = listener;
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		if (poll(fds, CLIENTS, -1) < 0) continue;
		for (int i = 1; i < CLIENTS; i++)
			if (fds[i].fd >= 0 && fds[i].revents && !serve(fds[i].fd, &clients[i])) close(fds[i].fd), fds[i].fd = -1;
		if (!fds[0].revents) continue;
		int fd = accept(listener, NULL, NULL), at = 1;
		while (at < CLIENTS && fds[at].fd >= 0) at++;
		if (fd >= 0 && at == CLIENTS) close(fd);
		if (fd < 0 || at == CLIENTS) continue;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		fds[at].fd = fd;
		fds[at].revents = 0;
		clients[at].length = 0;
	}
}

static int choice(const char *given, const char *const *names) {
	for (int i = 0; names[i]; i++)
		if (!strcmp(given, names[i])) return i;
	return -1;
}

static void on_term(int signal) {
	(void)signal;
	_exit(0);
}

int main(int argc, char **argv) {
	static const char *const patterns[] = { "hot", "shift", NULL }, *const fills[] = { "random", "sparse", "byte", NULL };
	static const char *const kinds[] = { "private", "shared", "memfd", "sysv", NULL };
	int is_good = argc == 7 || argc == 8;
	uint64_t mebibytes = is_good ? strtoull(argv[1], NULL, 10) : 0, permille = is_good ? strtoull(argv[4], NULL, 10) : 0;
	processes = is_good ? (uint32_t)atoi(argv[2]) : 0;
	int chosen = is_good ? choice(argv[3], patterns) : -1, filled = is_good ? choice(argv[5], fills) : -1;
	int kind = is_good ? choice(argv[6], kinds) : -1;
	is_good = mebibytes && processes >= 1 && processes <= MOST_PROCESSES && permille >= 1 && permille <= 1000;
	if (!is_good || chosen < 0 || filled < 0 || kind < 0) {
		fprintf(stderr, "usage: writer MEBIBYTES PROCESSES hot|shift HOT random|sparse|byte private|shared|memfd|sysv [COUNT]\n");
		return 2;
	}
	pattern = (enum pattern)chosen;
	fill = (enum fill)filled;
	pages = (mebibytes << 8) / processes;
	hot = pages * permille / 1000 ? pages * permille / 1000 : 1;
	if (argc == 8) {
		for (uint64_t number = 0; number < strtoull(argv[7], NULL, 10); number++) printf("%lu\n", page_of(1, number));
		return 0;
	}
	signal(SIGTERM, on_term);
	signal(SIGPIPE, SIG_IGN);

	board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (board == MAP_FAILED) die("mmap");
	make_shared((enum kind)kind);
	for (uint32_t p = 1; p < processes; p++) {
		pid_t child = fork();
		if (child < 0) die("fork");
		if (child == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			start(p);
			for (;;) pause();
		}
	}
	start(0);
	ask_all(0); /* all have filled their memory */
	listen_and_serve();
}
