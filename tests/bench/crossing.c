/* Sends from one network namespace to another, from one thread on one processor, and says how fast that went.

       crossing udp|tcp NEAR FAR ADDRESS AMOUNT

   NEAR and FAR are namespaces (/proc/PID/fd/N), ADDRESS is FAR's. udp: AMOUNT packets of 64 bytes; tcp: AMOUNT MB; or as
   many as there is time for. First they go from NEAR to FAR, then as many back. Prints packets or MB per second, of both
   ways.

   A veth hands its packets over at once, so all of a packet's way, the router's rules too, is the sender's time. The
   processor is ours alone meanwhile (sched(7)), so that other work does not count. Ends by itself within seconds. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, DATA = 64 - 20 - 8, PORT = 7777, BUFFER = 8 << 20, CHUNK = 256 << 10, WARM_UP = 20 };
static const double TIME = 0.15; /* seconds; the kernel leaves us 0.95 of each (sched(7)) */

static void check(long result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int open_in(const char *namespace, int kind)
{
	int descriptor = open(namespace, O_RDONLY), made;
	check(descriptor, namespace);
	check(setns(descriptor, CLONE_NEWNET), "setns");
	close(descriptor);
	made = socket(AF_INET, kind, 0);
	check(made, "socket");
	return made;
}

static void alone(void)
{
	struct sched_param parameters = {.sched_priority = 10};
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(sysconf(_SC_NPROCESSORS_ONLN) - 1, &set);
	check(sched_setaffinity(0, sizeof set, &set), "sched_setaffinity");
	check(sched_setscheduler(0, SCHED_FIFO, &parameters), "sched_setscheduler");
}

static struct mmsghdr messages[BATCH], taken[BATCH];
static char data[BATCH][2048];
static struct iovec out[BATCH], in[BATCH];

/* Packets per second; only the time of sending counts: the receiver could have a processor of its own. */
static double datagrams(int from, int to, long amount)
{
	double spent = 0;
	long arrived = 0, sent = 0;
	while (sent < amount && spent < TIME) {
		double began = now();
		int n = sendmmsg(from, messages, BATCH, 0);
		spent += now() - began;
		check(n, "sendmmsg");
		sent += n;
		while ((n = recvmmsg(to, taken, BATCH, MSG_DONTWAIT, NULL)) > 0)
			arrived += n;
	}
	if (arrived < sent) {
		fprintf(stderr, "%ld packets of %ld were lost\n", sent - arrived, sent);
		exit(1);
	}
	return arrived / spent;
}

static double stream(int from, int to, long megabytes)
{
	static char chunk[CHUNK];
	long amount = megabytes << 20, arrived = 0, sent = 0, counted, n;
	double began = now(), spent = 0;
	while (arrived < amount && spent < TIME) {
		if (sent < amount && (n = send(from, chunk, CHUNK, MSG_DONTWAIT)) > 0)
			sent += n;
		while ((n = recv(to, chunk, CHUNK, MSG_DONTWAIT)) > 0)
			arrived += n;
		spent = now() - began;
	}
	counted = arrived;
	while (arrived < sent && now() - began < 5) /* the rest is not for the next one to measure */
		if ((n = recv(to, chunk, CHUNK, MSG_DONTWAIT)) > 0)
			arrived += n;
	return counted / spent / 1e6;
}

int main(int argc, char **argv)
{
	int udp, near, far, buffer = BUFFER, i;
	long amount;
	struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons(PORT)}, seen;
	socklen_t size = sizeof seen;
	double forth, back;

	if (argc != 6)
		return 64;
	udp = strcmp(argv[1], "udp") == 0;
	amount = atol(argv[5]);
	near = open_in(argv[2], udp ? SOCK_DGRAM : SOCK_STREAM);
	far = open_in(argv[3], udp ? SOCK_DGRAM : SOCK_STREAM);
	inet_pton(AF_INET, argv[4], &there.sin_addr);
	check(setsockopt(far, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)), "SO_REUSEADDR");
	check(bind(far, (struct sockaddr *)&there, sizeof there), "bind");
	alone();
	if (udp) {
		for (i = 0; i < BATCH; i++) {
			out[i] = (struct iovec){data[i], DATA};
			in[i] = (struct iovec){data[i], sizeof data[i]};
			messages[i].msg_hdr = (struct msghdr){.msg_iov = &out[i], .msg_iovlen = 1};
			taken[i].msg_hdr = (struct msghdr){.msg_iov = &in[i], .msg_iovlen = 1};
		}
		setsockopt(near, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer);
		setsockopt(far, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer);
		check(connect(near, (struct sockaddr *)&there, sizeof there), "connect");
		check(send(near, data, DATA, 0), "send");
		check(recvfrom(far, data, sizeof data, 0, (struct sockaddr *)&seen, &size), "recvfrom");
		check(connect(far, (struct sockaddr *)&seen, sizeof seen), "connect");
		datagrams(near, far, amount / WARM_UP);
		forth = datagrams(near, far, amount);
		datagrams(far, near, amount / WARM_UP);
		back = datagrams(far, near, amount);
	} else {
		check(listen(far, 1), "listen");
		check(connect(near, (struct sockaddr *)&there, sizeof there), "connect");
		far = accept(far, NULL, NULL);
		check(far, "accept");
		stream(near, far, amount / WARM_UP + 1);
		forth = stream(near, far, amount);
		stream(far, near, amount / WARM_UP + 1);
		back = stream(far, near, amount);
	}
	printf("%.0f %.0f\n", forth, back);
	return 0;
}
