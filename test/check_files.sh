#!/bin/sh
# What is read and written: text as other systems leave it, what is piped in
# beside a prompt, sessions and outputs that are no ordinary files, models that
# are something else, and signals while there is nothing to stop.
#     RUN=./run test/check_files.sh
. test/lib.sh

unset NO_COLOR

# ------------------------------------------------------------------------ text

# prompt FORMAT STATUS: what printf makes of it, piped in, is the prompt of
# $dir/out.
prompt() {
    printf "$1" | limited "$run" -q --dump-tokens $m >"$dir/out" 2>"$dir/err"
    [ $? -eq "$2" ]
    result $? "$1: expected status $2"
}
prompt 'a\n\nb h\303\251' 0
cp "$dir/out" "$dir/expected"
while read -r how text; do
    prompt "$text" 0
    same "$how" "$dir/expected" "$dir/out"
done <<'END'
CRLF a\r\n\r\nb h\303\251\r\n
CR a\r\rb h\303\251\r
mark \357\273\277a\n\nb h\303\251\n
UTF-16LE \377\376a\0\n\0\n\0b\0\040\0h\0\351\0
UTF-16BE \376\377\0a\0\r\0\n\0\n\0b\0\040\0h\0\351\0\n
unmarked a\0\n\0\n\0b\0\040\0h\0\351\0
unmarkedBE \0a\0\n\0\n\0b\0\040\0h\0\351
END
prompt '\377\376=\330\0\336' 0
cp "$dir/out" "$dir/pair"
prompt '\360\237\230\200' 0
same "a pair of surrogates" "$dir/out" "$dir/pair"
prompt 'gr\374n' 2
says "not UTF-8: byte fc after 2 bytes"
prompt 'a\0b\n' 2
says "a NUL byte after 1 bytes"
prompt '' 2
says "standard input is empty"
printf 'h\303' >"$dir/half"
expect 0 "--raw takes any bytes" --raw --dump-tokens -f "$dir/half" $m
printf 'Be brief.\r\n' >"$dir/system"
printf '\357\273\277[{"role": "user",\r\n"content": "Hi"}]\r\n' >"$dir/talk"
expect 0 "-sysf" -sysf "$dir/system" --dump-prompt $m Hi
hasnt "has no CR" "$(printf '\r')"
expect 0 "JSON with a mark" --messages "$dir/talk" --dump-prompt $m
printf '\357\273\277Hi\r\n/save %s\r\n' "$dir/saved" | "$run" -q -cnv -n 1 \
    --save-dir "$dir" $m >"$dir/out" 2>"$dir/err"
holds "lines of a chat" grep -q '"content": "Hi"' "$dir/saved"
printf 'a\r\n' >"$dir/crlf"
expect 0 "--tokenize" --tokenize -f "$dir/crlf" $m
holds "takes bytes as they are" [ "$(wc -w <"$dir/out")" = 3 ]

# ----------------------------------------------------------- beside the prompt

beside() {
    limited "$run" --dump-prompt $m "$@" 2>"$dir/err" |
        sed '1s/.*//; $d; s/<|im_end|>//' | tr '\n' '|' >"$dir/out"
}
echo NOTES >"$dir/notes"
cat "$dir/notes" | beside "Sum up:"
holds "a pipe" [ "$(cat "$dir/out")" = "|Sum up:||NOTES|" ]
beside "Sum up:" <"$dir/notes"
holds "a file" [ "$(cat "$dir/out")" = "|Sum up:||NOTES|" ]
beside "Sum up:" -f "$dir/notes" </dev/null
holds "-f" [ "$(cat "$dir/out")" = "|Sum up:||NOTES|" ]
printf 'What is LFM2?' | beside -
holds "-" [ "$(cat "$dir/out")" = "|What is LFM2?|" ]
: | beside "Sum up:"
holds "nothing" [ "$(cat "$dir/out")" = "|Sum up:|" ]
printf 'one\ntwo\n' >"$dir/lines"
while read -r line; do
    beside "$line"
    cat "$dir/out"
    echo
done <"$dir/lines" >"$dir/loop"
holds "the lines of a loop are left alone" [ "$(cat "$dir/loop")" = "|one|
|two|" ]
(sleep 3; echo NOTES) | beside "Sum up:"
says "standard input is read, too"
holds "is waited for" [ "$(cat "$dir/out")" = "|Sum up:||NOTES|" ]
"$run" $m <&- >"$dir/out" 2>"$dir/err"
holds "a closed one" [ $? = 3 ]
says "standard input is closed"

# ---------------------------------------------------------------------- outputs

: >"$dir/real"
chmod 640 "$dir/real"
ln -s real "$dir/link"
ln -s nowhere "$dir/broken"
mkfifo "$dir/pipe"
expect 0 "a session by a link" --session "$dir/link" -n 2 $m hello
holds "is still a link" [ -L "$dir/link" ]
holds "to the session" [ -s "$dir/real" ]
holds "of the same mode" [ "$(ls -l "$dir/real" | cut -c1-10)" = -rw-r----- ]
expect 0 "again" -v --session "$dir/link" -n 2 $m hello
holds "is read by it" grep -q 'link: [0-9]* tokens' "$dir/err"
refuses 3 "a link that leads nowhere" --session "$dir/broken" $m hello
refuses 3 "a pipe, expected a file" --session "$dir/pipe" $m hello
refuses 3 "a directory, expected a file" --session "$dir" $m hello
if mknod "$dir/null" c 1 3 2>/dev/null; then
    refuses 3 "a device or socket, expected" --session "$dir/null" $m hello
    holds "a device stays" [ -c "$dir/null" ]
fi
refuses 3 "Is a directory" --logits "$dir" $m hello
expect 0 "logits to a pipe" --logits /dev/stdout $m hello
if truncate -s 1500M "$dir/big" 2>/dev/null; then
    longest=2
    expect 3 "a large file that is no session" --session "$dir/big" $m hello
    says "it is left as it is"
    longest=300
    rm "$dir/big"
fi

# ----------------------------------------------------------------------- models

# no_model TEXT FORMAT: a file of this is called so.
no_model() {
    printf "$2" >"$dir/model"
    refuses 4 "$1" "$dir/model" hello
}
no_model "git-lfs pointer" 'version https://git-lfs.github.com/spec/v1\n'
no_model "a web page" '<!DOCTYPE html>\n<html>'
no_model "zip archive" 'PK\003\004aaaaaaaaaaaaaaaaaaaaaa'
no_model "safetensors" '\100\0\0\0\0\0\0\0{"__metadata__":{}}'
no_model "--messages" '{"messages": []}'
no_model "expected \"GGUF\"" 'anything else, of some length'
refuses 4 "a vocabulary without a model" tokenizer.bin hello
refuses 4 "pass it with --session" "$dir/real" hello

cat >"$dir/nommap.c" <<'END'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/mman.h>
#define mmap mmap64
void *mmap(void *p, size_t n, int prot, int flags, int fd, off_t at)
{
    void *(*real)(void *, size_t, int, int, int, off_t) =
        (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap64");
    if (fd < 0 || n < 1 << 20 || prot & PROT_EXEC)
        return real(p, n, prot, flags, fd, at);
    errno = ENODEV;
    return MAP_FAILED;
}
#undef mmap
void *mmap(void *p, size_t n, int prot, int flags, int fd, off_t at)
{
    return mmap64(p, n, prot, flags, fd, at);
}
END
if ${CC:-cc} -shared -fPIC -o "$dir/nommap.so" "$dir/nommap.c" -ldl 2>/dev/null
then
    LD_PRELOAD=$dir/nommap.so "$run" --temp 0 -n 2 $m hello >"$dir/out" \
        2>"$dir/err" </dev/null
    status=$?
    if grep -q "runtime does not come first" "$dir/err"; then
        echo "skipped: files that cannot be mapped, with a sanitizer's runtime"
    else
        holds "a file that cannot be mapped" [ $status = 0 ]
        says "cannot map files, so it is read"
    fi
fi

# ---------------------------------------------------------------------- signals

# As the first process of a container, which gets no signal without a handler.
mkfifo "$dir/never"
ends() {
    want=$1 number=$2
    shift 2
    unshare -pf --kill-child "$run" "$@" <"$dir/never" >/dev/null \
        2>"$dir/err" &
    pid=$!
    exec 4>"$dir/never"
    within 10 grep -q . "/proc/$pid/task/$pid/children"
    read -r child <"/proc/$pid/task/$pid/children"
    within 10 grep -q "^SigCgt.*4[0-9a-f]\{3\}$" /proc/$child/status
    kill -"$number" $child
    wait_within 10 $pid
    status=$?
    [ $status -eq "$want" ]
    result $? "as process 1, $*: status $status, expected $want"
    exec 4>&-
}
if unshare -pf true 2>/dev/null; then
    ends 143 TERM $m
    ends 143 TERM --tokenize $m
    ends 143 TERM --messages - $m
else
    echo "skipped: the first process of a container, which needs root"
fi
(trap '' INT; exec "$run" -q --ignore-eos -n 100 --isa scalar -t 1 $m hello) \
    >"$dir/out" 2>"$dir/err" </dev/null &
pid=$!
within 60 [ -s "$dir/out" ]
kill -INT $pid
wait_within 60 $pid
holds "an ignored signal stays ignored" [ $? -eq 0 ]
finish
