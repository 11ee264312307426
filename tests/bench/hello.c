/* The service of the bench: the least that a dynamically linked C program can do for a client. With an argument it stays
 * until the client leaves. */
#include <unistd.h>

int main(int argc, char **argv)
{
    static const char greeting[] = "hello from the service\n";
    char byte;

    (void)argv;
    if (write(1, greeting, sizeof greeting - 1) != (ssize_t)(sizeof greeting - 1))
        return 1;
    while (argc > 1 && read(0, &byte, 1) > 0)
        ;
    return 0;
}
