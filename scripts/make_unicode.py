#!/usr/bin/env python3
"""Print the Unicode class tables at the end of lfm2.c.

    scripts/make_unicode.py                  print them
    scripts/make_unicode.py --check lfm2.c   compare them with those in a file

Reads UnicodeData.txt and PropList.txt of Unicode 15.0 from --data, by default
where Debian's package unicode-data puts them.
"""
import argparse
import sys

BEGIN = "/* Made by scripts/make_unicode.py from Unicode 15.0. */"
END = "/* End of what scripts/make_unicode.py made. */"


def categories(path):
    """Yield (code point, general category); a range is two lines of the file."""
    first = None
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            code, name, category = line.split(";")[:3]
            code = int(code, 16)
            if name.endswith(", First>"):
                first = code
            elif name.endswith(", Last>"):
                for c in range(first, code + 1):
                    yield c, category
            else:
                yield code, category


def white_space(path):
    """Yield the code points that have the property White_Space."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            field = line.split("#")[0].split(";")
            if len(field) == 2 and field[1].strip() == "White_Space":
                ends = [int(x, 16) for x in field[0].strip().split("..")]
                yield from range(ends[0], ends[-1] + 1)


def gaps_and_lengths(codes):
    """[5, 6, 7, 9] -> [5, 3, 1, 1]: skip 5, take 3, skip 1, take 1."""
    out, end = [], 0
    for c in sorted(codes):
        if out and c == end:
            out[-1] += 1
        else:
            out += [c - end, 1]
        end = c + 1
    assert max(out) < 65536, "the tables hold 16-bit numbers"
    assert end <= 0x32400, "lfm2.c classes no more than MAX_CLASSED"
    return out


def table(name, codes):
    lines = ["    "]
    for n in gaps_and_lengths(codes):
        if len(lines[-1]) + len(f"{n},") > 80:
            lines.append("    ")
        lines[-1] += f"{n},"
    body = "\n".join(lines)
    return f"static const uint16_t {name}[] = {{\n{body}\n}};\n"


def make(folder):
    category = list(categories(f"{folder}/UnicodeData.txt"))
    tables = [
        table("letter_runs", [c for c, k in category if k[0] == "L"]),
        table("number_runs", [c for c, k in category if k[0] == "N"]),
        table("space_runs", white_space(f"{folder}/PropList.txt")),
    ]
    return BEGIN + "\n" + "\n".join(tables) + END + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="/usr/share/unicode")
    parser.add_argument("--check", metavar="FILE")
    args = parser.parse_args()
    fresh = make(args.data)
    if not args.check:
        sys.stdout.write(fresh)
        return 0
    with open(args.check, encoding="utf-8") as f:
        text = f.read()
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < 0:
        print(f"{args.check}: no table between the marker comments")
        return 1
    if text[begin:end + len(END) + 1] != fresh:
        print(f"{args.check}: the Unicode tables differ from a fresh copy")
        return 1
    print(f"{args.check}: the Unicode tables are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
