/* The C service of upstart-socket-bridge(8): the listening socket's number is in UPSTART_FDS. One client, then exit. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
    const char *fds = getenv("UPSTART_FDS"), *events = getenv("UPSTART_EVENTS"), *listen_fds = getenv("LISTEN_FDS");
    if (!fds)
        return 2;
    int client = accept(atoi(fds), NULL, NULL);
    if (client < 0)
        return 3;
    FILE *out = fdopen(client, "w");
    fprintf(out, "c %s %s %s\n", fds, events ? events : "-", listen_fds ? listen_fds : "-");
    return fclose(out) ? 4 : 0;
}
