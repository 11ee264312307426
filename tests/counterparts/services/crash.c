/* Says so and crashes. */

#include <signal.h>
#include <stdio.h>

int main(void)
{
    fprintf(stderr, "about to crash\n");
    return raise(SIGSEGV);
}
