/* Runs a program in a sandbox that answers some system calls otherwise:
 *
 *     deny trap|kill|ERRNO NUMBER,... PROGRAM ARGUMENTS...
 *
 * with a signal that can be caught, one that cannot, or an error. */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { MOST = 64 };

int main(int argc, char **argv)
{
    struct sock_filter code[2 * MOST + 2];
    unsigned short n = 0;
    unsigned answer;

    if (argc < 4)
        return 2;
    answer = strcmp(argv[1], "trap") == 0 ? SECCOMP_RET_TRAP :
             strcmp(argv[1], "kill") == 0 ? SECCOMP_RET_KILL_PROCESS :
             SECCOMP_RET_ERRNO | (unsigned)atoi(argv[1]);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
        offsetof(struct seccomp_data, nr));
    for (char *s = argv[2]; n < 2 * MOST && *s; s += *s == ',') {
        const unsigned number = (unsigned)strtoul(s, &s, 10);
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
                                                 number, 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, answer);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K,
                                             SECCOMP_RET_ALLOW);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER,
              &(struct sock_fprog){ n, code }) != 0) {
        perror("seccomp");
        return 2;
    }
    execvp(argv[3], argv + 3);
    perror(argv[3]);
    return 2;
}
