/* sd_notifier COMMAND ARG…: does what its arguments say, in order, with libsystemd; results go to standard output.
 *
 *     notify TEXT        sd_notify
 *     many N TEXT        the same N times
 *     flood TEXT         without end
 *     barrier            sd_notify_barrier: "barrier RC"
 *     store TEXT PATH    sd_pid_notify_with_fds with PATH opened for reading: "store RC"
 *     fds                sd_listen_fds_with_names: "fds N NAME:NAME…"
 *     watchdog           sd_watchdog_enabled: "watchdog RC USEC"
 *     read PATH          opens it and waits for its end
 *     print TEXT
 *     pause              waits for a signal
 *     child COMMAND ARG… the rest in a child; waits for it and goes on with nothing else */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char buffer[4096];
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 1; i < argc; i++) {
        const char *command = argv[i];
        if (!strcmp(command, "notify")) {
            if (sd_notify(0, argv[++i]) <= 0)
                return 1;
        } else if (!strcmp(command, "many")) {
            int n = atoi(argv[++i]);
            for (i++; n > 0; n--)
                if (sd_notify(0, argv[i]) <= 0)
                    return 1;
        } else if (!strcmp(command, "flood")) {
            for (i++;;)
                sd_notify(0, argv[i]);
        } else if (!strcmp(command, "barrier")) {
            printf("barrier %d\n", sd_notify_barrier(0, 5000000));
        } else if (!strcmp(command, "store")) {
            int fd = open(argv[i + 2], O_RDONLY | O_CLOEXEC);
            printf("store %d\n", sd_pid_notify_with_fds(0, 0, argv[i + 1], &fd, 1));
            close(fd);
            i += 2;
        } else if (!strcmp(command, "fds")) {
            char **names = NULL;
            int n = sd_listen_fds_with_names(0, &names);
            printf("fds %d", n);
            for (char **name = names; name && *name; name++)
                printf("%c%s", name == names ? ' ' : ':', *name);
            putchar('\n');
        } else if (!strcmp(command, "watchdog")) {
            uint64_t usec = 0;
            int rc = sd_watchdog_enabled(0, &usec);
            printf("watchdog %d %" PRIu64 "\n", rc, usec);
        } else if (!strcmp(command, "read")) {
            int fd = open(argv[++i], O_RDONLY | O_CLOEXEC);
            while (fd >= 0 && read(fd, buffer, sizeof buffer) > 0)
                ;
            close(fd);
        } else if (!strcmp(command, "print")) {
            puts(argv[++i]);
        } else if (!strcmp(command, "pause")) {
            pause();
        } else if (!strcmp(command, "child")) {
            pid_t pid = fork();
            if (pid > 0) {
                waitpid(pid, NULL, 0);
                return 0;
            }
        } else {
            fprintf(stderr, "sd_notifier: no command %s\n", command);
            return 2;
        }
    }
    return 0;
}
