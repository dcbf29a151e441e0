#!/bin/sh
# Prints the manual, scripts/lfm2.1, with the options of --help in its section
# OPTIONS.  The other sections stay as they are in the file.
#
#     scripts/make_man.sh ./run
#
# In --help a title stands at the margin, an option after two blanks; its text
# follows in column 28, there or on the next lines.
set -eu

help=$("$1" --help)
printf '%s\n' "$help" | awk '
function escaped(s) {
    gsub(/\\/, "\\e", s)
    gsub(/--/, "\\-\\-", s)
    gsub(/ -/, " \\-", s)
    gsub(/[(]-/, "(\\-", s)
    return s
}
function end_option() {
    text = escaped(text)
    if (text != "")
        options = options toupper(substr(text, 1, 1)) substr(text, 2) ".\n"
    text = ""
}
NR != FNR {                               # the page
    if (/^\.Sh/ && in_options)
        printf "%s.El\n", options
    if (/^\.Sh/)
        in_options = /OPTIONS/
    if (/^\.Sh/ || !in_options)
        print
    next
}
/^[^ ]/ { end_option(); title = $0 }
/^  -/ {
    end_option()
    if (title != "")
        options = options (options ? ".El\n" : "") ".Ss " escaped(title) \
            "\n.Bl -tag -width Ds\n"
    title = ""
    match($0, /^  -[^ ]+( -[^ ]+)*/)
    names = substr($0, 2, RLENGTH - 1)
    text = substr($0, RLENGTH + 1)
    gsub(/ -/, " , Fl ", names)
    options = options ".It" substr(names, 3)
    if (match(text, /^ [^ ]+/)) {
        value = substr(text, 1, RLENGTH)
        text = substr(text, RLENGTH + 1)
        gsub(/[|]/, "|\\:", value)      # where a line may end
        options = options " Ar" value
    }
    options = options "\n"
    sub(/^ +/, "", text)
}
/^   / { sub(/^ +/, text == "" ? "" : " "); text = text $0 }
' - "$(dirname "$0")/lfm2.1"
