/*
 * readmem: how fast process_vm_readv reads another process' memory on this machine, on one core. It prints bytes per
 * second, the median of several passes over 1 GiB in pieces of 1 MiB, as the page-shipper's batches are.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 1 << 20, PASSES = 7 };
static const size_t SIZE = 1ul << 30;

static void die(const char *what) {
	fprintf(stderr, "readmem: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int by_size(const void *a, const void *b) {
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

int main(void) {
	int filled[2];
	char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *to = mmap(NULL, PIECE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), byte;
	if (memory == MAP_FAILED || to == MAP_FAILED || pipe(filled)) die("set up");
	memset(to, 1, PIECE);
	pid_t child = fork();
	if (child < 0) die("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (size_t i = 0; i < SIZE; i += 8) *(uint64_t *)(memory + i) = i * 0x9E3779B97F4A7C15ull;
		if (write(filled[1], "", 1) != 1) _exit(1);
		for (;;) pause();
	}
	if (read(filled[0], &byte, 1) != 1) die("wait");
	double rates[PASSES];
	for (int pass = 0; pass < PASSES; pass++) {
		double begun = now();
		for (size_t i = 0; i < SIZE; i += PIECE) {
			struct iovec here = { to, PIECE }, there = { memory + i, PIECE };
			if (process_vm_readv(child, &here, 1, &there, 1, 0) != PIECE) die("process_vm_readv");
		}
		rates[pass] = (double)SIZE / (now() - begun);
	}
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	qsort(rates, PASSES, sizeof *rates, by_size);
	printf("%.0f\n", rates[PASSES / 2]);
}
