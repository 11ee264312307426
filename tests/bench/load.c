/* load: makes COUNT connections to 127.0.0.1:PORT, at most CONCURRENCY at once, and says how that went.
 *
 *     load PORT COUNT CONCURRENCY REPLY [MARKS [SECONDS [RATE]]]
 *
 * A connection is good when it ends with EOF after exactly REPLY. Its latency counts from before socket(2) to that EOF.
 * MARKS lines "mark I" are printed at even distances along the way. After SECONDS (120) what is still open has failed.
 * With a RATE they begin at even distances, so many in a second; without, as soon as another has ended. A connection
 * that would be more than CONCURRENCY at once waits, and its latency counts from when it was due.
 * The last line is one JSON object. One thread and epoll, because it shares its two cores with what it measures.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct slot {
    int fd; /* -1: free */
    size_t got;
    int64_t begin_ns;
};

static struct sockaddr_in peer = {.sin_family = AF_INET};
static const char *reply;
static size_t reply_bytes;
static int64_t *latency_ns;
static long good, failed;
static char first_error[96];

static int64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "load: cannot %s: %s\n", what, strerror(errno));
    exit(1);
}

static void fail(const char *what)
{
    failed++;
    if (first_error[0] == '\0')
        snprintf(first_error, sizeof first_error, "%s", what);
}

/* 1: under way in `slot`; 0: failed and counted. */
static int begin(int epoll, struct slot *slot, uint32_t index, int64_t begin_ns)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = index};

    slot->begin_ns = begin_ns;
    slot->got = 0;
    slot->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (slot->fd < 0)
        die("make a socket");
    if (connect(slot->fd, (struct sockaddr *)&peer, sizeof peer) < 0 && errno != EINPROGRESS) {
        fail(strerror(errno));
        close(slot->fd);
        slot->fd = -1;
        return 0;
    }
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, slot->fd, &event) < 0)
        die("watch a socket");
    return 1;
}

/* 1: this connection has ended, well or not; 0: more is to come. */
static int progress(struct slot *slot)
{
    char buffer[4096];

    for (;;) {
        ssize_t n = read(slot->fd, buffer, sizeof buffer);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n < 0) {
            fail(strerror(errno));
        } else if (n == 0 && slot->got == reply_bytes) {
            latency_ns[good++] = now_ns() - slot->begin_ns;
        } else if (n == 0) {
            fail("the reply is cut short");
        } else if (slot->got + (size_t)n > reply_bytes || memcmp(reply + slot->got, buffer, (size_t)n) != 0) {
            fail("the reply is a different one");
        } else {
            slot->got += (size_t)n;
            continue;
        }
        close(slot->fd);
        slot->fd = -1;
        return 1;
    }
}

static int by_size(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

/* The smallest latency that `share` of the good connections did not exceed (nearest rank), in ms; 0 when none was good. */
static double percentile(double share)
{
    long rank = (long)(share * (double)good + 0.999999);

    return good == 0 ? 0.0 : (double)latency_ns[rank < 1 ? 0 : rank - 1] / 1e6;
}

int main(int argc, char **argv)
{
    if (argc < 5) {
        fputs("usage: load PORT COUNT CONCURRENCY REPLY [MARKS [SECONDS [RATE]]]\n", stderr);
        return 2;
    }
    long count = atol(argv[2]), concurrency = atol(argv[3]);
    long marks = argc > 5 ? atol(argv[5]) : 0, seconds = argc > 6 ? atol(argv[6]) : 120;
    double rate = argc > 7 ? atof(argv[7]) : 0.0;

    if (count < 1 || concurrency < 1 || concurrency > 1000 || marks < 0 || seconds < 1 || rate < 0.0) {
        fputs("load: COUNT, CONCURRENCY (up to 1000) and SECONDS start at 1, RATE at 0\n", stderr);
        return 2;
    }
    peer.sin_port = htons((uint16_t)atoi(argv[1]));
    peer.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    reply = argv[4];
    reply_bytes = strlen(reply);
    latency_ns = calloc((size_t)count, sizeof *latency_ns);

    struct slot *slots = calloc((size_t)concurrency, sizeof *slots);
    struct epoll_event events[256];
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    long begun = 0, open = 0, marked = 0;

    if (latency_ns == NULL || slots == NULL || epoll < 0)
        die("start");
    for (long i = 0; i < concurrency; i++)
        slots[i].fd = -1;

    int64_t start_ns = now_ns(), deadline_ns = start_ns + seconds * 1000000000;

    while (begun < count || open > 0) {
        int64_t now = now_ns(), wait_ns = deadline_ns - now;

        for (long i = 0; i < concurrency && open < concurrency && begun < count; i++) {
            int64_t due_ns = rate > 0.0 ? start_ns + (int64_t)((double)begun / rate * 1e9) : now;

            if (due_ns > now) {
                if (due_ns - now < wait_ns)
                    wait_ns = due_ns - now;
                break;
            }
            if (slots[i].fd < 0) {
                begun++;
                open += begin(epoll, &slots[i], (uint32_t)i, rate > 0.0 ? due_ns : now_ns());
            }
        }
        if (wait_ns <= 0)
            break;

        struct timespec wait = {.tv_sec = wait_ns / 1000000000, .tv_nsec = wait_ns % 1000000000};
        struct pollfd ready = {.fd = epoll, .events = POLLIN};
        int n = ppoll(&ready, 1, &wait, NULL) < 0 ? -1 : epoll_wait(epoll, events, 256, 0);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            die("wait");
        for (int e = 0; e < n; e++)
            open -= progress(&slots[events[e].data.u32]);
        while (marked < marks && (good + failed) * (marks + 1) >= (marked + 1) * count) {
            printf("mark %ld\n", ++marked);
            fflush(stdout);
        }
    }

    double took_s = (double)(now_ns() - start_ns) / 1e9;
    struct rusage usage;

    for (; open > 0; open--)
        fail("no end within the time limit");
    failed += count - begun;
    qsort(latency_ns, (size_t)good, sizeof *latency_ns, by_size);
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"connections\": %ld, \"failed\": %ld, \"first_error\": \"%s\", \"seconds\": %.6f, \"rate\": %.3f, "
           "\"p50_ms\": %.4f, \"p99_ms\": %.4f, \"max_ms\": %.4f, \"load_cpu_us\": %.2f}\n",
           count, failed, first_error, took_s, (double)good / took_s, percentile(0.5), percentile(0.99), percentile(1.0),
           ((double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1e6 +
            (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec)) / (double)count);
    return 0;
}
