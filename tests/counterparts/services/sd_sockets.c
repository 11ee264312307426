/* sd_sockets: a libsystemd service with three sockets, told apart by their names:
 *
 *     stream     TCP listener: each connection gets the report
 *     datagram   UNIX datagram socket: each datagram is answered with "datagram " and itself
 *     seqpacket  UNIX seqpacket listener: each connection's first record is answered with "seqpacket " and itself
 *
 * "stop" as a datagram ends it with status 0. What does not look as it should ends it with status 2. */
#define _GNU_SOURCE
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

int main(void)
{
    char **names = NULL, report[1024] = "";
    size_t used = 0;
    int stream = -1, datagram = -1, seqpacket = -1;
    int n = sd_listen_fds_with_names(0, &names);
    used += (size_t)snprintf(report, sizeof report, "%d fds:", n);
    for (int i = 0; i < n; i++) {
        int fd = SD_LISTEN_FDS_START + i;
        const char *kind = "unknown";
        if (sd_is_socket(fd, AF_INET, SOCK_STREAM, 1) > 0 && sd_is_socket_inet(fd, AF_INET, SOCK_STREAM, 1, 0) > 0)
            kind = "stream";
        else if (sd_is_socket(fd, AF_UNIX, SOCK_DGRAM, -1) > 0)
            kind = "datagram";
        else if (sd_is_socket(fd, AF_UNIX, SOCK_SEQPACKET, 1) > 0)
            kind = "seqpacket";
        used += (size_t)snprintf(report + used, sizeof report - used, " %s=%s", names[i], kind);
        if (!strcmp(names[i], "stream"))
            stream = fd;
        else if (!strcmp(names[i], "datagram"))
            datagram = fd;
        else if (!strcmp(names[i], "seqpacket"))
            seqpacket = fd;
    }
    fprintf(stderr, SD_INFO "%s\n", report);
    if (n != 3 || stream < 0 || datagram < 0 || seqpacket < 0)
        return 2;
    sd_notifyf(0, "READY=1\nSTATUS=%s", report);

    struct pollfd fds[] = {{stream, POLLIN, 0}, {datagram, POLLIN, 0}, {seqpacket, POLLIN, 0}};
    for (;;) {
        char in[512], out[600];
        if (poll(fds, 3, -1) < 0)
            return 3;
        if (fds[0].revents) {
            int c = accept(stream, NULL, NULL);
            if (write(c, report, strlen(report)) < 0)
                return 4;
            close(c);
        }
        if (fds[1].revents) {
            struct sockaddr_un peer;
            socklen_t size = sizeof peer;
            ssize_t got = recvfrom(datagram, in, sizeof in - 1, 0, (struct sockaddr *)&peer, &size);
            if (got < 0)
                return 5;
            in[got] = 0;
            if (!strcmp(in, "stop"))
                return 0;
            int length = snprintf(out, sizeof out, "datagram %s", in);
            sendto(datagram, out, (size_t)length, 0, (struct sockaddr *)&peer, size);
        }
        if (fds[2].revents) {
            int c = accept(seqpacket, NULL, NULL);
            ssize_t got = recv(c, in, sizeof in - 1, 0);
            in[got > 0 ? got : 0] = 0;
            int length = snprintf(out, sizeof out, "seqpacket %s", in);
            send(c, out, (size_t)length, MSG_NOSIGNAL);
            close(c);
        }
    }
}
