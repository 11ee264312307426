/* The service of the bench that is started once: its listener is fd 3, as systemd and superd pass it on. */
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
    static const char greeting[] = "hello from the service\n";

    for (;;) {
        int client = accept(3, NULL, NULL);

        if (client < 0)
            return 1;
        if (write(client, greeting, sizeof greeting - 1) < 0)
            return 1;
        close(client);
    }
}
