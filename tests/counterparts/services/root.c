/* What a process in a chroot sees, said on standard output. */

#include <stdio.h>
#include <unistd.h>

int main(void)
{
    char cwd[4096];

    if (getcwd(cwd, sizeof cwd) == NULL)
        return 1;
    printf("cwd %s, %s /etc, uid %d\n", cwd, access("/etc", F_OK) == 0 ? "an" : "no", (int)getuid());
    return 0;
}
