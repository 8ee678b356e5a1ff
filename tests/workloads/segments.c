/*
 * segments MEBIBYTES [KIND]: processes with System V shared memory, semaphores and messages, which check on SIGUSR1 that
 * nothing of it has changed.
 *
 * A segment of MEBIBYTES, less some bytes, is attached by the first process twice, once with a part that cannot be written
 * to, by a second one that has inherited it, and by a third one for reading only, which waits for a semaphore most of the
 * time. None of them could attach it for writing again, unless the first one allows it. A second segment has been removed and is only there because it is attached. KIND is
 *
 *   whole       (also without any KIND)
 *   unattached  with a segment besides that nobody has attached, and without the removed one
 *   behind      with something in the last page behind the segment's end, and without the removed one
 *
 * In the latter two it does not look at how much room there is for messages, which CRIU does not carry. It prints, as dirtier
 * does,
 *   verdict NUMBER operations OPERATIONS bad FAULTS
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, STRIDE = 32, LESS = 100, CHANGES = 40, LOW = 8, FIXED = 16, REMOVED = 2 << 20 };
enum { SEGMENT = 0x5150, SEMAPHORES, QUEUE, UNATTACHED };
enum { CONSTANT, ASKED, ANSWERED, SETS };

static char *at, *twice, *removed, *only_read;
static uint64_t pages;
static size_t size;
static uint32_t *count; /* of the pages that are this process's */
static int segment, semaphores, queue, gone = -1, unattached = -1, nothing;
static struct shmid_ds was, gone_was;
static const char *kind = "whole";

/* Shared by all. */
static struct {
	_Atomic uint64_t epoch, done, operations, bad;
} *board;

static volatile sig_atomic_t asked;

static void on_usr1(int number) { (void)number; asked = 1; }

static void die(const char *what) {
	fprintf(stderr, "segments: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void check(int holds, const char *what) {
	if (holds) return;
	dprintf(1, "process %d: %s\n", (int)getpid(), what);
	board->bad++;
}

static uint64_t word(uint64_t page, uint32_t times, int i) { return ((page << 32) ^ times) * 0x9E3779B97F4A7C15ull + (uint64_t)i; }

static void fill(uint64_t page, uint32_t times) {
	volatile uint64_t *words = (volatile uint64_t *)(at + page * PAGE);
	for (int i = 0; i < WORDS; i += STRIDE) words[i] = word(page, times, i);
}

static int is_bad(const char *where, uint64_t page, uint32_t times) {
	const volatile uint64_t *words = (const volatile uint64_t *)(where + page * PAGE);
	for (int i = 0; i < WORDS; i += STRIDE)
		if (words[i] != (times ? word(page, times, i) : 0)) return 1;
	return 0;
}

static void *attach(int id, int flags) {
	void *found = shmat(id, NULL, flags);
	if (found == (void *)-1) die("shmat");
	return found;
}

/* The first pages never change, the last one is a matter of its own, and of the others every second is the second process's. */
static int is_mine(uint64_t page, int process) { return page >= FIXED && page < pages - 1 && (int)(page % 2) == process; }

static void verify_pages(int process) {
	uint64_t bad = 0;
	for (uint64_t p = 0; p < pages - 1; p++)
		if (p < FIXED || is_mine(p, process)) bad += (uint64_t)is_bad(at, p, count[p]);
	check(!bad, "pages");
	check(at[size - 1] == 'e' && !at[size - 2], "the last bytes");
	check(at[size + 5] == (strcmp(kind, "behind") ? 0 : 'b'), "what lies behind the end");
}

static void change(int process, uint64_t *turn) {
	for (int i = 0; i < CHANGES; i++) {
		/* A part of the memory changes all the time, the most never. */
		uint64_t p = FIXED + (*turn)++ * 7 % (pages / LOW);
		if (!is_mine(p, process)) continue;
		if (is_bad(at, p, count[p])) check(0, "a page that is about to be changed");
		fill(p, ++count[p]);
		board->operations++;
	}
}

static void step(int which, short by) {
	struct sembuf operation = { .sem_num = (unsigned short)which, .sem_op = by };
	while (semop(semaphores, &operation, 1) < 0)
		if (errno != EINTR) die("semop");
}

static int step_soon(int which, short by) {
	struct sembuf operation = { .sem_num = (unsigned short)which, .sem_op = by };
	struct timespec soon = { .tv_sec = 20 };
	int done;
	while ((done = semtimedop(semaphores, &operation, 1, &soon)) < 0 && errno == EINTR);
	return !done;
}

static struct shmid_ds about(int id) {
	struct shmid_ds is = { 0 };
	check(!shmctl(id, IPC_STAT, &is), "shmctl");
	return is;
}

static void allow(unsigned short mode) {
	struct shmid_ds is = about(segment);
	is.shm_perm.mode = mode;
	is.shm_perm.gid = 999;
	if (shmctl(segment, IPC_SET, &is)) die("IPC_SET");
}

static int is_as_it_was(struct shmid_ds is, const struct shmid_ds *before) {
	return is.shm_segsz == before->shm_segsz && is.shm_nattch == before->shm_nattch && is.shm_perm.mode == before->shm_perm.mode &&
	       is.shm_perm.uid == before->shm_perm.uid && is.shm_perm.gid == before->shm_perm.gid && is.shm_perm.__key == before->shm_perm.__key;
}

struct message { long kind; char text[3000]; };

static void send_messages(void) {
	struct message first = { 9, "first" }, second = { 2, "second" };
	memset(second.text + 100, 's', 2000);
	if (msgsnd(queue, &first, 5, IPC_NOWAIT) || msgsnd(queue, &second, sizeof second.text, IPC_NOWAIT)) die("msgsnd");
}

static void check_messages(void) {
	struct message found = { 0 };
	check(msgrcv(queue, &found, sizeof found.text, 0, IPC_NOWAIT) == 5 && found.kind == 9 && !memcmp(found.text, "first", 5), "the first message");
	check(msgrcv(queue, &found, sizeof found.text, 2, IPC_NOWAIT) == sizeof found.text && !strcmp(found.text, "second") && found.text[2099] == 's', "the second message");
	check(msgrcv(queue, &found, sizeof found.text, 0, IPC_NOWAIT) < 0 && errno == ENOMSG, "a third message");
	struct msqid_ds is;
	check(!msgctl(queue, IPC_STAT, &is) && (is.msg_qbytes == 9000 || strcmp(kind, "whole")) && is.msg_perm.uid == 999 && (is.msg_perm.mode & 0777) == 0622, "the queue");
	send_messages();
}

static void verify_first(void) {
	verify_pages(0);
	check(shmget(SEGMENT, 0, 0) == segment && semget(SEMAPHORES, 0, 0) == semaphores && msgget(QUEUE, 0) == queue, "ids by keys");
	check(is_as_it_was(about(segment), &was), "what is told of the segment");
	if (gone >= 0) {
		check(is_as_it_was(about(gone), &gone_was) && gone_was.shm_perm.mode & SHM_DEST, "what is told of the removed segment");
		for (size_t i = 0; i < REMOVED; i += PAGE) check(removed[i] == (char)(i / PAGE + 1), "the removed segment");
	}
	if (unattached >= 0) {
		char *found = attach(unattached, 0);
		check(found[5] == 'u' && shmget(UNATTACHED, 0, 0) == unattached, "the segment that nobody has attached");
		shmdt(found);
	}
	check(semctl(semaphores, CONSTANT, GETVAL) == 7, "a semaphore");
	check_messages();
	/* A part of it is not to be written to. */
	check(read(nothing, twice + 4 * PAGE, 1) < 0 && errno == EFAULT, "a part that cannot be written to");
	check(!is_bad(twice, 4, count[4]) && !is_bad(twice, pages / 2, count[pages / 2] ? count[pages / 2] : 0), "the same twice");
	check(!shmdt(twice) && about(segment).shm_nattch == was.shm_nattch - 3, "detached");
	check(shmat(segment, NULL, 0) == (void *)-1 && errno == EACCES, "attached without a right to");
	allow(0600);
	twice = attach(segment, 0);
	allow(0400);
	if (mprotect(twice + 4 * PAGE, PAGE, PROT_READ)) die("mprotect");
	check(is_as_it_was(about(segment), &was), "attached again");
	step(ASKED, 1);
	check(step_soon(ANSWERED, -1), "the one who waits for a semaphore");
}

static void *idle(void *unused) { pause(); return unused; }

static void run_second(void) {
	pthread_t thread;
	if (pthread_create(&thread, NULL, idle, NULL)) die("pthread_create");
	uint64_t done = 0;
	for (uint64_t turn = 0;; ) {
		change(1, &turn);
		if (done != board->epoch) {
			verify_pages(1);
			board->done = done = board->epoch;
		}
		nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
	}
}

static void run_third(void) {
	shmdt(at); shmdt(twice);
	if (removed) shmdt(removed);
	only_read = attach(segment, SHM_RDONLY);
	board->done++;
	for (;;) {
		step(ASKED, -1);
		for (uint64_t p = 0; p < FIXED; p++) check(!is_bad(only_read, p, 1), "pages that are only read");
		check(mprotect(only_read, PAGE, PROT_READ | PROT_WRITE) < 0 && errno == EACCES, "for reading only");
		step(ANSWERED, 1);
	}
}

int main(int argc, char **argv) {
	uint64_t mebibytes = argc > 1 ? (uint64_t)atoi(argv[1]) : 64;
	if (argc > 2) kind = argv[2];
	sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = on_usr1 }, NULL);
	board = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (board == MAP_FAILED) die("mmap");
	nothing = open("/dev/zero", O_RDONLY);
	pages = mebibytes << 8;
	size = pages * PAGE - LESS;
	count = calloc(pages, sizeof *count);
	if (!count || nothing < 0) die("calloc");

	/* So that ids are not those of a namespace in which nothing has been. */
	for (int i = 0; i < 3; i++)
		if (shmctl(shmget(IPC_PRIVATE, PAGE, 0600), IPC_RMID, NULL) || semctl(semget(IPC_PRIVATE, 1, 0600), 0, IPC_RMID) || msgctl(msgget(IPC_PRIVATE, 0600), IPC_RMID, NULL)) die("IPC_RMID");
	segment = shmget(SEGMENT, size, IPC_CREAT | IPC_EXCL | 0600);
	semaphores = semget(SEMAPHORES, SETS, IPC_CREAT | IPC_EXCL | 0666);
	queue = msgget(QUEUE, IPC_CREAT | IPC_EXCL | 0600);
	if (segment < 0 || semaphores < 0 || queue < 0) die("shmget, semget, msgget");
	at = attach(segment, 0);
	twice = attach(segment, 0);
	if (mprotect(twice + 4 * PAGE, PAGE, PROT_READ)) die("mprotect");
	if (!strcmp(kind, "whole")) {
		gone = shmget(IPC_PRIVATE, REMOVED, 0640);
		removed = attach(gone, 0);
		if (shmctl(gone, IPC_RMID, NULL)) die("IPC_RMID");
		for (size_t i = 0; i < REMOVED; i += PAGE) removed[i] = (char)(i / PAGE + 1);
	} else if (!strcmp(kind, "unattached")) {
		unattached = shmget(UNATTACHED, PAGE, IPC_CREAT | 0600);
		char *found = attach(unattached, 0);
		found[5] = 'u';
		shmdt(found);
	} else if (strcmp(kind, "behind")) {
		fprintf(stderr, "usage: segments MEBIBYTES [whole | unattached | behind]\n");
		return 2;
	}
	/* A quarter is left untouched: holes must stay holes. */
	for (uint64_t p = 0; p < pages * 3 / 4; p++) fill(p, count[p] = 1);
	at[size - 1] = 'e';
	if (!strcmp(kind, "behind")) at[size + 5] = 'b';
	if (semctl(semaphores, CONSTANT, SETVAL, 7)) die("SETVAL");
	struct msqid_ds is;
	if (msgctl(queue, IPC_STAT, &is)) die("msgctl");
	is.msg_qbytes = 9000; is.msg_perm.uid = 999; is.msg_perm.mode = 0622;
	if (msgctl(queue, IPC_SET, &is)) die("msgctl");
	send_messages();

	for (int process = 1; process < 3; process++) {
		pid_t child = fork();
		if (child < 0) die("fork");
		if (child) continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		signal(SIGUSR1, SIG_IGN);
		if (process == 1) run_second();
		run_third();
	}
	while (!board->done) usleep(1000);
	board->done = 0;
	allow(0400);
	was = about(segment);
	if (gone >= 0) gone_was = about(gone);
	dprintf(1, "ready\n");
	for (uint64_t turn = 0;; ) {
		change(0, &turn);
		if (asked) {
			asked = 0;
			uint64_t epoch = ++board->epoch;
			verify_first();
			while (board->done != epoch) usleep(1000);
			dprintf(1, "verdict %lu operations %lu bad %lu\n", epoch, board->operations, board->bad);
		}
		nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
	}
}
