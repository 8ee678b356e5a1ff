/*
 * hardship KIND [MEBIBYTES]: a process that is hard to move, and checks on SIGUSR1 that nothing of it has changed.
 *
 *   sparse       64 GiB of address space with a page in every 256 MiB
 *   crowd        2000 threads
 *   guard        guard regions (MADV_GUARD_INSTALL) between pages
 *   churn        children that map, execute and end, one after the other and beside one another
 *   direct       asynchronous direct IO, several requests at a time
 *   tmpfs        files in /dev/shm: one of MEBIBYTES (64) that is mapped and written to all the time, one that is mapped only
 *                while it is written to, one that is deleted, and a socket
 *   sealed       a memfd that is sealed against further writing, and written to by the mapping that it has
 *   locked       a memfd that is locked as a whole and in part, by its open file, which a second process uses as well, beside
 *                one that is not
 *   record_locked  a memfd of which a part is locked by the process (F_SETLK), at which another process looks
 *   owned        a memfd by whose descriptor the process is to be sent a signal
 *   described    a memfd with an owner, a mode, seals, and descriptors in two processes that differ in everything
 *   file_locked  a file that is mapped, with ranges locked by two processes (F_SETLK), each of which has threads and looks at
 *                the locks of the other, as databases have it
 *   stopped      a child that is stopped by a signal (SIGSTOP), has been waited for, and goes on when it is told to
 *   unmapped_locked  the same with a file that no process has mapped
 * and such as cannot be moved: userfaultfd, io_uring, traced, leader_exited, and a memfd that is passed: its descriptor is in a socket, and
 * nobody takes it out.
 *
 * It prints, as dirtier does,
 *   verdict NUMBER operations OPERATIONS bad FAULTS
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif

enum { PAGE = 4096, WORDS = PAGE / 8, THREADS = 2000, CHURNERS = 3, DEPTH = 8, BLOCKS = 64, PAGES = 256 };
static const uint64_t SPREAD = 256ull << 20, SPARSE = 64ull << 30;

static volatile sig_atomic_t asked;
static uint64_t operations, bad;
static char *base;
static uint32_t count[PAGES];

static void die(const char *what) {
	fprintf(stderr, "hardship: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void *map(size_t size, int flags) {
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (at == MAP_FAILED) die("mmap");
	return at;
}

static uint64_t word(uint64_t page, uint32_t times, int at) {
	return ((page << 32) ^ times) * 0x9E3779B97F4A7C15ull + (uint64_t)at;
}

static void fill(char *page, uint64_t number, uint32_t times) {
	for (int i = 0; i < WORDS; i++) ((volatile uint64_t *)page)[i] = word(number, times, i);
}

static int is_bad(const char *page, uint64_t number, uint32_t times) {
	for (int i = 0; i < WORDS; i++)
		if (((const volatile uint64_t *)page)[i] != word(number, times, i)) return 1;
	return 0;
}

static void rest(void) { nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL); }

/* Pages that lie `stride` bytes apart: one is changed after the other. */
static uint64_t stride, pages;

static void begin_pages(uint64_t apart, uint64_t number, size_t size) {
	stride = apart; pages = number;
	base = map(size, MAP_PRIVATE);
	for (uint64_t p = 0; p < pages; p++) fill(base + p * stride, p, count[p] = 1);
}

static void change_page(void) {
	uint64_t p = operations % pages;
	fill(base + p * stride, p, ++count[p]);
}

static int begin_memfd(const char *name) {
	int fd = memfd_create(name, MFD_ALLOW_SEALING);
	if (fd < 0 || ftruncate(fd, PAGES * PAGE)) die("memfd");
	stride = PAGE; pages = PAGES;
	base = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (base == MAP_FAILED) die("mmap");
	for (uint64_t p = 0; p < pages; p++) fill(base + p * stride, p, count[p] = 1);
	return fd;
}

static void check_pages(void) {
	for (uint64_t p = 0; p < pages; p++) bad += is_bad(base + p * stride, p, count[p]);
}

/* Another process that has the memfd has the last page for itself: how often it has looked, and how often in vain. */
static volatile uint64_t *partner;

static pid_t have_partner(void (*begin)(void), int (*is_wrong)(void)) {
	partner = (uint64_t *)(base + --pages * stride);
	partner[0] = partner[1] = 0;
	pid_t child = fork();
	if (child < 0) die("fork");
	if (child) return child;
	for (begin();; rest()) { partner[1] += (uint64_t)is_wrong(); partner[0]++; }
}

static void check_partner(void) {
	uint64_t before = partner[0];
	for (int wait = 0; wait < 5000 && partner[0] - before < 2; wait++) rest();
	bad += partner[1] + (partner[0] - before < 2);
}

/* Whoever looks at the container's log learns what was wrong. */
static int misses(int holds, const char *what) {
	if (!holds) dprintf(1, "process %d: %s\n", (int)getpid(), what);
	return !holds;
}

/* What is held against the pages by a descriptor and by another mapping. */
static void check_by(int fd, const char *at) {
	char page[PAGE];
	uint64_t differ = 0;
	for (uint64_t p = 0; p < pages; p++)
		differ += pread(fd, page, PAGE, (off_t)(p * PAGE)) != PAGE || is_bad(page, p, count[p]) || is_bad(at + p * PAGE, p, count[p]);
	bad += misses(!differ, "pages by a descriptor or a mapping");
}

static int memfd = -1, other_memfd = -1, reader = -1;
static char *other;

static int reopened(int fd, int flags) {
	char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	int found = open(path, flags);
	if (found < 0) die(path);
	return found;
}

static struct flock lock_of_page(int type) {
	return (struct flock){ .l_type = (short)type, .l_whence = SEEK_SET, .l_start = PAGE, .l_len = PAGE };
}

static void look_at_lock(void) { reader = reopened(memfd, O_RDONLY); }

static int is_unlocked(void) {
	struct flock lock = lock_of_page(F_WRLCK);
	int found = misses(flock(reader, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK, "lock of the whole");
	return found + misses(!fcntl(reader, F_OFD_GETLK, &lock) && lock.l_type == F_WRLCK, "lock of a page");
}

static void begin_locked(const char *name) {
	struct flock lock = lock_of_page(F_WRLCK);
	other_memfd = begin_memfd("other");
	other = base;
	memfd = begin_memfd(name);
	if (flock(memfd, LOCK_EX) || fcntl(memfd, F_OFD_SETLK, &lock)) die("lock");
	have_partner(look_at_lock, is_unlocked);
}

static int is_free(void) {
	struct flock lock = lock_of_page(F_WRLCK);
	return misses(!fcntl(reader, F_GETLK, &lock) && lock.l_type == F_WRLCK && lock.l_pid == getppid(), "lock of a page");
}

static void begin_record_locked(const char *name) {
	struct flock lock = lock_of_page(F_WRLCK);
	memfd = begin_memfd(name);
	if (fcntl(memfd, F_SETLK, &lock)) die("lock");
	have_partner(look_at_lock, is_free);
}

static void check_record_locked(void) {
	check_pages();
	check_by(memfd, base);
	check_partner();
}

static void change_both(void) {
	uint64_t p = operations % pages;
	fill(base + p * stride, p, ++count[p]);
	fill(other + p * stride, p, count[p]);
}

static void check_locked(void) {
	check_pages();
	check_by(memfd, base);
	check_by(other_memfd, other);
	check_partner();
}

/* Ranges of a file that the process and another one have locked for themselves, and what each sees of the other's. */
enum { FILE_PAGES = 64, HELD = 4 };
static const struct range { short type; off_t start, length; } locks_of[2][HELD] = {
	{ { F_WRLCK, PAGE, PAGE }, { F_RDLCK, 3 * PAGE, 10 }, { F_WRLCK, 20 * PAGE, 1 }, { F_WRLCK, 100 * PAGE, 0 } },
	{ { F_RDLCK, 3 * PAGE, 5 }, { F_WRLCK, 30 * PAGE, 2 * PAGE }, { F_RDLCK, 40 * PAGE, 1 }, { F_WRLCK, 41 * PAGE, 1 } },
};
static const off_t unlocked[] = { 0, 2 * PAGE, 3 * PAGE + 10, 20 * PAGE + 1, 32 * PAGE, 42 * PAGE, 99 * PAGE };
static int locked = -1, holds;
static pid_t holders[2];

static struct flock lock_of(struct range range) {
	return (struct flock){ .l_type = range.type, .l_whence = SEEK_SET, .l_start = range.start, .l_len = range.length };
}

static int is_held(struct range range) {
	struct flock probe = lock_of(range), taken = lock_of(range);
	probe.l_type = taken.l_type = F_WRLCK;
	int found = misses(!fcntl(locked, F_GETLK, &probe) && probe.l_type == range.type, "kind of a lock");
	found += misses(probe.l_start == range.start && probe.l_len == range.length, "range of a lock");
	found += misses(probe.l_pid == holders[!holds], "owner of a lock");
	return found + misses(fcntl(locked, F_SETLK, &taken) == -1 && (errno == EAGAIN || errno == EACCES), "lock for writing");
}

static int is_unlike(void) {
	int found = 0;
	for (int n = 0; n < HELD; n++) found += is_held(locks_of[!holds][n]);
	for (size_t n = 0; n < sizeof unlocked / sizeof *unlocked; n++) {
		struct flock probe = lock_of((struct range){ F_WRLCK, unlocked[n], 1 });
		found += misses(!fcntl(locked, F_GETLK, &probe) && probe.l_type == F_UNLCK, "lock of what nobody has locked");
	}
	return found;
}

static void *wait_in_vain(void *unused) {
	int ends[2];
	char byte;
	if (pipe(ends)) die("pipe");
	while (read(ends[0], &byte, 1) < 0 && errno == EINTR) {}
	die("a read that was to wait");
	return unused;
}

static void hold(int which) {
	pthread_t thread;
	holds = which;
	for (int n = 0; n < HELD; n++) {
		struct flock lock = lock_of(locks_of[which][n]);
		if (fcntl(locked, F_SETLK, &lock)) die("lock");
	}
	for (int n = 0; n < 2; n++) if (pthread_create(&thread, NULL, wait_in_vain, NULL)) die("thread");
}

static void hold_second(void) { hold(1); }

static void begin_file_locked(int is_mapped) {
	stride = PAGE; pages = FILE_PAGES;
	locked = open("hardship.locked", O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (locked < 0 || ftruncate(locked, FILE_PAGES * PAGE)) die("file");
	base = mmap(NULL, FILE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | (is_mapped ? 0 : MAP_ANONYMOUS), is_mapped ? locked : -1, 0);
	if (base == MAP_FAILED) die("mmap");
	for (uint64_t p = 0; p < pages; p++) fill(base + p * stride, p, count[p] = 1);
	holders[0] = getpid();
	hold(0);
	holders[1] = have_partner(hold_second, is_unlike);
}

static void check_file_locked(void) {
	check_pages();
	check_partner();
	bad += (uint64_t)is_unlike();
}

static void begin_owned(const char *name) {
	memfd = begin_memfd(name);
	if (fcntl(memfd, F_SETOWN, getpid()) || fcntl(memfd, F_SETSIG, SIGURG)) die("owner");
}

static void check_owned(void) {
	check_pages();
	check_by(memfd, base);
	bad += misses(fcntl(memfd, F_GETOWN) == getpid(), "owner of the open file");
	bad += misses(fcntl(memfd, F_GETSIG) == SIGURG, "signal of the open file");
}

/* The descriptor that made it, another number of the same open file, and one that was opened anew; the second process has
 * not the first, and one of its own. */
enum { MADE = 20, AGAIN = 21, READER = 22, APPENDER = 23, SEALS = F_SEAL_SHRINK | F_SEAL_GROW, UID = 1234, GID = 4321 };
enum { START = 12345, READ_FROM = 77 };
static char *fixed;
static off_t moved;

static void number(int fd, int to, int flags) {
	if (fd < 0 || dup3(fd, to, flags) != to) die("dup3");
	close(fd);
}

/* What both processes see. */
static int is_misdescribed(void) {
	char name[64] = { 0 };
	struct stat is;
	int found = misses(readlink("/proc/self/fd/22", name, sizeof name - 1) > 0 && !strcmp(name, "/memfd:described (deleted)"), "name");
	found += misses(fstat(READER, &is) == 0 && (is.st_mode & 07777) == 0640, "mode");
	found += misses(is.st_uid == UID && is.st_gid == GID, "owner");
	found += misses(is.st_size == PAGES * PAGE, "length");
	found += misses(fcntl(READER, F_GET_SEALS) == SEALS, "seals");
	found += misses((fcntl(AGAIN, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK)) == O_RDWR, "flags of the first open file");
	found += misses((fcntl(READER, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK)) == (O_RDONLY | O_NONBLOCK), "flags of the reader");
	found += misses(fcntl(AGAIN, F_GETFD) == 0 && fcntl(READER, F_GETFD) == FD_CLOEXEC, "close-on-exec");
	found += misses(lseek(READER, 0, SEEK_CUR) == READ_FROM, "position of the reader");
	found += misses(pwrite(READER, "x", 1, 0) < 0 && errno == EBADF, "writing to the reader");
	found += misses(mprotect(fixed, PAGE, PROT_READ | PROT_WRITE) < 0 && errno == EACCES, "protection of a mapping of the reader");
	return found;
}

static void have_appender(void) {
	close(MADE);
	number(reopened(AGAIN, O_WRONLY | O_APPEND), APPENDER, 0);
}

static int is_misdescribed_here(void) {
	int found = is_misdescribed();
	found += misses(fcntl(MADE, F_GETFD) < 0 && errno == EBADF, "a descriptor that was closed");
	found += misses((fcntl(APPENDER, F_GETFL) & (O_ACCMODE | O_APPEND)) == (O_WRONLY | O_APPEND), "flags of the appender");
	found += misses(fcntl(APPENDER, F_GETFD) == 0, "close-on-exec of the appender");
	return found;
}

static void begin_described(const char *name) {
	number(begin_memfd(name), MADE, O_CLOEXEC);
	number(fcntl(MADE, F_DUPFD, 60), AGAIN, 0);
	if (fchmod(MADE, 0640) || fchown(MADE, UID, GID) || fcntl(MADE, F_ADD_SEALS, SEALS)) die("described");
	number(reopened(MADE, O_RDONLY | O_NONBLOCK), READER, O_CLOEXEC);
	if (lseek(READER, READ_FROM, SEEK_SET) < 0 || lseek(MADE, START, SEEK_SET) < 0) die("lseek");
	fixed = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_SHARED, READER, 0);
	if (fixed == MAP_FAILED) die("mmap");
	have_partner(have_appender, is_misdescribed_here);
}

static void check_described(void) {
	check_pages();
	check_by(READER, fixed);
	bad += is_misdescribed();
	bad += misses(fcntl(MADE, F_GETFD) == FD_CLOEXEC, "close-on-exec of the first descriptor");
	/* One open file, one position. */
	moved++;
	bad += misses(lseek(MADE, 1, SEEK_CUR) == START + moved && lseek(AGAIN, 0, SEEK_CUR) == START + moved, "position of the first open file");
	check_partner();
}

static void pass(int fd) {
	int ends[2];
	char byte = 0, space[CMSG_SPACE(sizeof fd)] = { 0 };
	struct iovec bytes = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr message = { .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET; header->cmsg_type = SCM_RIGHTS; header->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(header), &fd, sizeof fd);
	if (socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) || sendmsg(ends[0], &message, 0) != 1) die("sendmsg");
}

/* Between every two pages lies one that must not be touched. The kernel tries for us. */
static int touchable[2];

static void check_guards(void) {
	check_pages();
	for (uint64_t p = 0; p < pages; p++)
		bad += write(touchable[1], base + p * stride + PAGE, 1) != -1 || errno != EFAULT;
}

static _Atomic uint64_t *beats;

static void *beat(void *number) {
	volatile uint64_t own = (uintptr_t)number;
	for (;;) {
		nanosleep(&(struct timespec){ .tv_sec = 1 }, NULL);
		if (own != (uintptr_t)number) return NULL; /* its count then stands still */
		beats[own]++;
	}
}

/* Every thread goes on, in five seconds at the latest. */
static void check_crowd(void) {
	static uint64_t before[THREADS];
	for (int t = 0; t < THREADS; t++) before[t] = beats[t];
	for (int t = 0, waited = 0; t < THREADS; t++) {
		while (beats[t] == before[t] && waited++ < 5000) rest();
		bad += beats[t] == before[t];
	}
}

static struct { _Atomic uint64_t rounds[CHURNERS], bad; } *churned;

/* Whoever looks at the container's log learns what was wrong. */
static uint64_t wrong(const char *what, uint64_t which, int value) {
	dprintf(1, "churn: %s %llu: %#x\n", what, (unsigned long long)which, value);
	return 1;
}

static void churn(int number) {
	for (uint64_t n = 1;; n++) {
		char *own = map(20 * PAGE, MAP_PRIVATE);
		for (int p = 0; p < 20; p++) fill(own + p * PAGE, p, n);
		pid_t child = fork();
		if (child < 0) die("fork");
		if (!child) {
			if (n % 3 == 0) { execl("/bin/hardship", "hardship", "brief", (char *)NULL); _exit(2 + errno % 100); }
			int found = 0;
			for (int p = 0; p < 20; p++) { found += is_bad(own + p * PAGE, p, n); fill(own + p * PAGE, p, n + 1); }
			for (int p = 0; p < 20; p++) found += is_bad(own + p * PAGE, p, n + 1);
			_exit(found != 0);
		}
		int status;
		if (n % 4) while ((child = waitpid(-1, &status, 0)) > 0) if (status) churned->bad += wrong("status of child", (uint64_t)child, status);
		for (int p = 0; p < 20; p++) if (is_bad(own + p * PAGE, p, n)) churned->bad += wrong("page in round", n, p);
		munmap(own, 20 * PAGE);
		churned->rounds[number]++;
	}
}

static void check_churn(void) {
	bad += churned->bad;
	for (int n = 0; n < CHURNERS; n++) {
		uint64_t before = churned->rounds[n];
		for (int wait = 0; wait < 5000 && churned->rounds[n] == before; wait++) rest();
		bad += churned->rounds[n] == before;
	}
}

/* Blocks of a file are written from memory and read back into it, past the page cache. */
static int file;
static aio_context_t ring;

static void transfer(int opcode, uint64_t first) {
	struct iocb requests[DEPTH], *list[DEPTH];
	struct io_event events[DEPTH];
	for (uint64_t i = 0; i < DEPTH; i++) {
		uint64_t block = first + i;
		requests[i] = (struct iocb){ .aio_fildes = (uint32_t)file, .aio_lio_opcode = (uint16_t)opcode, .aio_nbytes = PAGE,
			.aio_buf = (uintptr_t)(base + block * PAGE), .aio_offset = (int64_t)(block * PAGE) };
		list[i] = &requests[i];
	}
	if (syscall(SYS_io_submit, ring, DEPTH, list) != DEPTH) die("io_submit");
	long got = 0;
	while (got < DEPTH) {
		long more = syscall(SYS_io_getevents, ring, 1, DEPTH - got, events, NULL);
		if (more < 0 && errno != EINTR) die("io_getevents");
		for (long i = 0; i < more; i++) bad += events[i].res != PAGE;
		got += more > 0 ? more : 0;
	}
}

static void write_and_read(void) {
	uint64_t first = operations * DEPTH % BLOCKS;
	for (uint64_t b = first; b < first + DEPTH; b++) fill(base + b * PAGE, b, ++count[b]);
	transfer(IOCB_CMD_PWRITE, first);
	for (uint64_t b = first; b < first + DEPTH; b++) memset(base + b * PAGE, 0, PAGE);
	transfer(IOCB_CMD_PREAD, first);
	for (uint64_t b = first; b < first + DEPTH; b++) bad += is_bad(base + b * PAGE, b, count[b]);
}

/* Files that are written to without a sign in their times. */
enum { BRIEF = 16 };
static uint64_t mapped_pages;
static uint32_t brief_count[BRIEF];
static int deleted, server;
static struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "/dev/shm/socket" };

static char *map_file(const char *path, size_t size, int flags) {
	int fd = open(path, O_RDWR | flags, 0640);
	if (fd < 0 || ftruncate(fd, (off_t)size)) die(path);
	char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED) die("mmap");
	close(fd);
	return at;
}

/* All pages hold something, and some of them are changed. */
static uint64_t number_of(uint64_t page) { return page % (stride / PAGE) ? PAGES + page : page / (stride / PAGE); }

static void begin_tmpfs(uint64_t mebibytes) {
	char page[PAGE];
	mapped_pages = (mebibytes << 20) / PAGE;
	stride = mapped_pages / PAGES * PAGE; pages = PAGES;
	base = map_file("/dev/shm/mapped", mebibytes << 20, O_CREAT | O_EXCL);
	for (uint64_t p = 0; p < mapped_pages; p++) fill(base + p * PAGE, number_of(p), 1);
	for (uint64_t p = 0; p < pages; p++) count[p] = 1;
	munmap(map_file("/dev/shm/brief", BRIEF * PAGE, O_CREAT | O_EXCL), BRIEF * PAGE);
	deleted = open("/dev/shm/deleted", O_RDWR | O_CREAT | O_EXCL, 0600);
	fill(page, 0, 1);
	if (deleted < 0 || write(deleted, page, PAGE) != PAGE || unlink("/dev/shm/deleted")) die("deleted");
	server = socket(AF_UNIX, SOCK_STREAM, 0);
	if (server < 0 || bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 1000)) die("socket");
}

static void change_files(void) {
	change_page();
	uint64_t p = operations % BRIEF;
	char *at = map_file("/dev/shm/brief", BRIEF * PAGE, 0);
	fill(at + p * PAGE, p, ++brief_count[p]);
	munmap(at, BRIEF * PAGE);
}

static void check_files(void) {
	char page[PAGE];
	for (uint64_t p = 0; p < mapped_pages; p++) bad += is_bad(base + p * PAGE, number_of(p), p % (stride / PAGE) ? 1 : count[number_of(p)]);
	/* What is mapped is what the name leads to. */
	int named = open("/dev/shm/mapped", O_RDONLY);
	if (named < 0 || pread(named, page, PAGE, 0) != PAGE) die("mapped");
	bad += is_bad(page, 0, count[0]);
	close(named);
	char *at = map_file("/dev/shm/brief", BRIEF * PAGE, 0);
	for (uint64_t p = 0; p < BRIEF; p++) if (brief_count[p]) bad += is_bad(at + p * PAGE, p, brief_count[p]);
	munmap(at, BRIEF * PAGE);
	if (pread(deleted, page, PAGE, 0) != PAGE) die("deleted");
	bad += is_bad(page, 0, 1);
	int client = socket(AF_UNIX, SOCK_STREAM, 0);
	bad += connect(client, (struct sockaddr *)&address, sizeof address) != 0;
	close(accept(server, NULL, NULL));
	close(client);
}

static void nothing(void) {}

static void on_usr1(int signal) { (void)signal; asked++; }

/* A child that stops itself after each number that it writes. */
static volatile uint64_t *stops;
static pid_t stopping;

static void begin_stopped(void)
{
	int status;
	stops = (volatile uint64_t *)map(PAGE, MAP_SHARED);
	stopping = fork();
	if (!stopping) for (;;) { ++*stops; raise(SIGSTOP); }
	if (stopping < 0 || waitpid(stopping, &status, WUNTRACED) != stopping || !WIFSTOPPED(status)) die("stop");
}

static void check_stopped(void)
{
	char path[64], state = 0;
	int status = 0;
	uint64_t before = *stops;
	snprintf(path, sizeof path, "/proc/%d/stat", stopping);
	FILE *stat = fopen(path, "r");
	if (!stat || fscanf(stat, "%*d (hardship) %c", &state) != 1 || state != 'T') bad++;
	if (stat) fclose(stat);
	if (kill(stopping, SIGCONT) || waitpid(stopping, &status, WUNTRACED) != stopping || !WIFSTOPPED(status)) bad++;
	if (*stops != before + 1) bad++;
}

int main(int argc, char **argv) {
	const char *kind = argc > 1 ? argv[1] : "";
	void (*work)(void) = nothing, (*check)(void) = nothing;
	signal(SIGUSR1, on_usr1);
	if (!strcmp(kind, "brief")) {
		char *own = malloc(40 * PAGE);
		for (int p = 0; p < 39; p++) fill(own + p * PAGE, (uint64_t)p, 1);
		return 0;
	} else if (!strcmp(kind, "sparse")) {
		begin_pages(SPREAD, SPARSE / SPREAD, SPARSE);
		work = change_page; check = check_pages;
	} else if (!strcmp(kind, "guard")) {
		begin_pages(2 * PAGE, PAGES, 2 * PAGES * PAGE);
		for (uint64_t p = 0; p < pages; p++) if (madvise(base + p * stride + PAGE, PAGE, MADV_GUARD_INSTALL)) die("guard");
		if (pipe(touchable)) die("pipe");
		work = change_page; check = check_guards;
	} else if (!strcmp(kind, "crowd")) {
		pthread_attr_t small;
		pthread_t thread;
		beats = calloc(THREADS, sizeof *beats);
		pthread_attr_init(&small);
		pthread_attr_setstacksize(&small, 4 * PTHREAD_STACK_MIN);
		for (uintptr_t t = 0; t < THREADS; t++) if (pthread_create(&thread, &small, beat, (void *)t)) die("thread");
		check = check_crowd;
	} else if (!strcmp(kind, "stopped")) {
		begin_stopped();
		check = check_stopped;
	} else if (!strcmp(kind, "churn")) {
		churned = map(PAGE, MAP_SHARED);
		for (int n = 0; n < CHURNERS; n++) if (!fork()) churn(n);
		check = check_churn;
	} else if (!strcmp(kind, "direct")) {
		base = map(BLOCKS * PAGE, MAP_PRIVATE);
		file = open("hardship.data", O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
		if (file < 0 || syscall(SYS_io_setup, DEPTH, &ring)) die("direct IO");
		work = write_and_read;
	} else if (!strcmp(kind, "tmpfs")) {
		begin_tmpfs(argc > 2 ? (uint64_t)atoll(argv[2]) : 64);
		work = change_files; check = check_files;
	} else if (!strcmp(kind, "sealed")) {
		if (fcntl(begin_memfd(kind), F_ADD_SEALS, F_SEAL_FUTURE_WRITE)) die("seal");
		work = change_page; check = check_pages;
	} else if (!strcmp(kind, "locked")) {
		begin_locked(kind);
		work = change_both; check = check_locked;
	} else if (!strcmp(kind, "owned")) {
		begin_owned(kind);
		work = change_page; check = check_owned;
	} else if (!strcmp(kind, "described")) {
		begin_described(kind);
		work = change_page; check = check_described;
	} else if (!strcmp(kind, "file_locked") || !strcmp(kind, "unmapped_locked")) {
		begin_file_locked(!strcmp(kind, "file_locked"));
		work = change_page; check = check_file_locked;
	} else if (!strcmp(kind, "record_locked")) {
		begin_record_locked(kind);
		work = change_page; check = check_record_locked;
	} else if (!strcmp(kind, "passed")) {
		pass(begin_memfd(kind));
		work = change_page; check = check_pages;
	} else if (!strcmp(kind, "userfaultfd")) {
		struct uffdio_api api = { .api = UFFD_API };
		int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
		if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) die("userfaultfd");
	} else if (!strcmp(kind, "io_uring")) {
		struct io_uring_params params = { 0 };
		if (syscall(SYS_io_uring_setup, 8, &params) < 0) die("io_uring");
	} else if (!strcmp(kind, "leader_exited")) {
		pthread_t thread;
		pid_t child = fork();
		if (child < 0 || (!child && pthread_create(&thread, NULL, wait_in_vain, NULL))) die("leader");
		if (!child) pthread_exit(NULL);
	} else if (!strcmp(kind, "traced")) {
		pid_t child = fork();
		if (!child) for (;;) pause();
		if (child < 0 || ptrace(PTRACE_SEIZE, child, 0, 0)) die("ptrace");
	} else {
		fprintf(stderr, "usage: hardship sparse|crowd|stopped|guard|churn|direct|tmpfs|sealed|locked|owned|described|file_locked|unmapped_locked|record_locked|passed|userfaultfd|io_uring|traced|leader_exited\n");
		return 2;
	}
	for (int answered = 0;;) {
		work();
		operations++;
		if (answered != asked) {
			answered = asked;
			check();
			printf("verdict %d operations %llu bad %llu\n", answered, (unsigned long long)operations, (unsigned long long)bad);
			fflush(stdout);
		}
		rest();
	}
}
