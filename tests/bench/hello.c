/* The service of the bench: the least that a dynamically linked C program can do for a client. */
#include <unistd.h>

int main(void)
{
    static const char greeting[] = "hello from the service\n";

    return write(1, greeting, sizeof greeting - 1) == (ssize_t)(sizeof greeting - 1) ? 0 : 1;
}
