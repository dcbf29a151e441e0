/* The program around one suite: compiled once for each, with SUITE defined as
 * the function that makes it. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>

Suite *SUITE(void);

int main(void)
{
    SRunner *runner = srunner_create(SUITE());
    int failed;

    setvbuf(stdout, NULL, _IOLBF, 0);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
