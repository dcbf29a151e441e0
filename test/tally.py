"""Tests that are counted, as test/lib.sh adds them up."""
import sys

passed, failed = 0, 0


def holds(what, good, found=""):
    global passed, failed
    passed += bool(good)
    failed += not good
    if not good:
        print("FAIL   %s: %.600r" % (what, found), flush=True)
    return good


def finish():
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)
