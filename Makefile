# make              ./run
# make demo         builds it and asks the model that ships a question
# make check        builds and runs all tests; installs libcheck if it is missing
# make check-debug  the same under AddressSanitizer and UBSan
# make check-bits   the same logits from every compiler, level and machine at hand
# make check-ports  more of them, and the suites there; takes an hour
# make check-page   the page of make page, in a browser
# make check-boot   Linux with nothing but build/run-static, in an emulator
# make check-bare   the README's first two commands on a bare Debian, which it
#                   makes in build/bare; needs root, takes half an hour
# make check-tsan   what uses threads, under ThreadSanitizer
# make check-valgrind
#                   the program and some suites under valgrind
# make check-clients
#                   a server and the clients of the npm registry; needs node
# make check-load   a server with a thousand clients, and hundreds of bad ones
# make check-replicas
#                   two servers behind nginx, of which one is killed
# make fuzz         hostile input for every target, FUZZ_SECONDS=60 each;
#                   FUZZ_TARGETS="gguf json" are some of them (needs clang)
# make fuzz-replay  the inputs in test/corpus, with sanitizers but no fuzzer
# make debug        build/debug/run, with the sanitizers
# make lib          build/liblfm2.a and build/liblfm2.so
# make static       build/run-static, which needs nothing but a kernel
# make wasm         build/run.wasm, for node scripts/run_wasm.mjs
# make page         build/page, for any server of files: the program in a browser
# make install      DESTDIR= PREFIX=/usr/local
# make uninstall    the same
# make pictures     those of the README again
# make man          the options of --help into scripts/lfm2.1
# make bench        models of the real shapes with random weights, and their speed;
#                   BENCH_MODELS="350m:q4_0 1.2b:q4_0" names them (needs numpy),
#                   BENCH="-p 512 -n 128" sets options of ./run --bench, and
#                   LLAMA_BENCH=/path/to/llama-bench adds a comparison
# make clean

CC      ?= cc
CFLAGS  ?= -O3
PREFIX  ?= /usr/local
VERSION := $(shell sed -n 's/.*LFM2_VERSION "\(.*\)"/\1/p' lfm2.h)

# Same bits everywhere: nothing is fused that is not written so, and floats keep
# their own precision.
MACHINE := $(shell $(CC) $(CFLAGS) -dM -E -x c /dev/null 2>/dev/null)
EXACT   := -ffp-contract=off
ifneq ($(filter __i386__,$(MACHINE)),)
EXACT   += -msse2 -mfpmath=sse
endif
ifneq ($(filter __s390__,$(MACHINE)),)
EXACT   += -fexcess-precision=fast
endif
WARN    := -Wall -Wextra -pedantic -Wshadow -Wno-missing-field-initializers
FLAGS   := -std=c11 $(EXACT) $(WARN) -pthread -MMD -MP
LIBS    := -lm -pthread

run: build/run.o build/lfm2.o
	$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LIBS)

# The shared library is made of the same object.
build/lfm2.o: PIC := -fPIC
build/%.o: %.c | build
	$(CC) $(CPPFLAGS) $(CFLAGS) $(FLAGS) $(PIC) -c -o $@ $<

build build/debug build/debug/quick build/test build/debug/test \
build/bench build/fuzz build/tsan build/page:
	mkdir -p $@

# ----------------------------------------------------------------- the library

lib: build/liblfm2.a build/liblfm2.so

build/liblfm2.a: build/lfm2.o
	$(AR) rcs $@ $^

SONAME  := $(if $(filter Darwin,$(shell uname)),,-Wl,-soname,liblfm2.so.0)

build/liblfm2.so: build/lfm2.o
	$(CC) $(CFLAGS) $(LDFLAGS) -shared $(SONAME) -o $@ $^ $(LIBS)

.PHONY: build/lfm2.pc                     # PREFIX may be another each time
build/lfm2.pc: | build
	printf '%s\n' 'prefix=$(PREFIX)' 'Name: lfm2' \
	    'Description: LFM2 language models on the CPU' \
	    'Version: $(VERSION)' 'Cflags: -I$${prefix}/include' \
	    'Libs: -L$${prefix}/lib -llfm2' 'Libs.private: $(LIBS)' > $@

INSTALLED := bin/lfm2 include/lfm2.h lib/liblfm2.a lib/liblfm2.so.0 \
             lib/liblfm2.so lib/pkgconfig/lfm2.pc share/man/man1/lfm2.1
TO         = $(DESTDIR)$(PREFIX)

# A program finds the new library only when the loader's list has it.
install: run lib build/lfm2.pc
	install -d $(TO)/bin $(TO)/include $(TO)/lib/pkgconfig \
	    $(TO)/share/man/man1
	install -m 755 run $(TO)/bin/lfm2
	install -m 644 lfm2.h $(TO)/include/
	install -m 644 build/liblfm2.a $(TO)/lib/
	install -m 755 build/liblfm2.so $(TO)/lib/liblfm2.so.0
	ln -sf liblfm2.so.0 $(TO)/lib/liblfm2.so
	install -m 644 build/lfm2.pc $(TO)/lib/pkgconfig/
	install -m 644 scripts/lfm2.1 $(TO)/share/man/man1/
	@if [ -n "$(DESTDIR)" ] || ! command -v ldconfig >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ]; then ldconfig; \
	else echo "programs that link -llfm2 find it after: sudo ldconfig, or" \
	    "with LD_LIBRARY_PATH=$(PREFIX)/lib"; fi

uninstall:
	rm -f $(INSTALLED:%=$(TO)/%)

# ------------------------------------------------------------------- elsewhere

# One file.  musl makes a smaller one than glibc, and is as fast: nothing here
# lives on the C library.
STATIC_CC := $(if $(filter default,$(origin CC)),$(shell command -v musl-gcc))
STATIC_CC := $(or $(STATIC_CC),$(CC))

static: build/run-static

build/run-static: run.c lfm2.c lfm2.h | build
	$(STATIC_CC) $(CPPFLAGS) $(CFLAGS) $(filter-out -M%,$(FLAGS)) $(LDFLAGS) \
	    -static -o $@ run.c lfm2.c $(LIBS)

# On Debian: clang, lld, wasi-libc and libclang-rt-dev-wasm32; on Debian 12
# clang-19, lld-19 and libclang-rt-19-dev-wasm32, as relaxed SIMD takes clang 16.
# The linker would give the stack 64 KiB, and nobody notices when it overflows.
WASM_CLANG ?= $(shell command -v clang-19 || echo clang)
WASM_CC ?= $(WASM_CLANG) --target=wasm32-wasi -msimd128

WASM_FLAGS = $(CPPFLAGS) $(CFLAGS) $(filter-out -M% -pthread,$(FLAGS)) \
    -DLFM2_NO_MMAP -D_WASI_EMULATED_SIGNAL -D_WASI_EMULATED_PROCESS_CLOCKS \
    -D_WASI_EMULATED_GETPID -Wl,-z,stack-size=1048576
WASM_LIBS  = -lm -lwasi-emulated-signal -lwasi-emulated-process-clocks \
    -lwasi-emulated-getpid

# Only machines that know relaxed instructions can load what has them.
FEATURES = $(if $(findstring relaxed,$@),-mrelaxed-simd)

wasm: build/run.wasm build/run_relaxed.wasm

build/run.wasm build/run_relaxed.wasm: run.c lfm2.c lfm2.h | build
	$(WASM_CC) $(WASM_FLAGS) $(FEATURES) -DLFM2_NO_THREADS -o $@ run.c lfm2.c \
	    $(WASM_LIBS)

# For test/bits.sh.
build/run_no_simd.wasm: run.c lfm2.c lfm2.h | build
	$(WASM_CC) $(WASM_FLAGS) -mno-simd128 -DLFM2_NO_THREADS -o $@ run.c lfm2.c \
	    $(WASM_LIBS)

build/wasm_fma.wasm: test/wasm_fma.c lfm2.c lfm2.h | build
	$(WASM_CC) $(WASM_FLAGS) -DLFM2_NO_THREADS -O1 -o $@ $< $(WASM_LIBS)

# A directory for any server of files.
PAGE := index.html page_worker.mjs page.wasm page_relaxed.wasm \
    page_threads.wasm page_threads_relaxed.wasm tiny.gguf

page: $(PAGE:%=build/page/%)

build/page/index.html: scripts/page.html | build/page
	cp $< $@

build/page/tiny.gguf: test/tiny.gguf | build/page
	cp $< $@

build/page/page_worker.mjs: scripts/page_worker.mjs | build/page
	cp $< $@

PAGE_FLAGS = $(WASM_FLAGS) -Wno-unused-function -mexec-model=reactor \
    -Wl,--import-memory,--initial-memory=4194304

build/page/page.wasm build/page/page_relaxed.wasm: scripts/page.c run.c lfm2.c \
                                                   lfm2.h | build/page
	$(WASM_CC) $(PAGE_FLAGS) $(FEATURES) -DLFM2_NO_THREADS -o $@ scripts/page.c \
	    lfm2.c $(WASM_LIBS)

# The C library was not compiled for threads, so only one calls it, and its
# errno is that thread's.
build/page/page_threads.wasm build/page/page_threads_relaxed.wasm: \
    scripts/page.c scripts/wasm/pthread.h run.c lfm2.c lfm2.h | build/page
	$(WASM_CC) $(PAGE_FLAGS) $(FEATURES) -Iscripts/wasm -matomics -mbulk-memory \
	    -D_Thread_local= -Wl,--shared-memory,--max-memory=4294967296,--no-check-features \
	    -Wl,--export=__stack_pointer -o $@ scripts/page.c lfm2.c $(WASM_LIBS)

# -------------------------------------------------------------------- the demo

demo: run
	./run test/tiny.gguf --temp 0 "What is a short convolution?"

# ---------------------------------------------------------------- the pictures

PICTURE := python3 scripts/picture.py
STORY   := test/tiny.gguf --raw -n 0 -f scripts/pictures/story.txt

pictures: run
	./run --inspect --json test/tiny.gguf | \
	    $(PICTURE) block - -o scripts/pictures/block.svg
	./run $(STORY) --json --logprobs 3 | \
	    $(PICTURE) surprisal - -o scripts/pictures/surprisal.svg
	./run $(STORY) --trace build/story.jsonl --trace-raw build/story.f32
	python3 scripts/trace.py experts build/story.jsonl build/story.f32 \
	    -o build/experts.csv
	$(PICTURE) routing build/experts.csv -o scripts/pictures/routing.svg

# ------------------------------------------------------------------ the manual

.PHONY: man
man: run | build
	scripts/make_man.sh ./run > build/lfm2.1
	mv build/lfm2.1 scripts/lfm2.1

# ------------------------------------------------------------------- the tests

# What takes longest goes first.
SUITES  := $(basename $(notdir $(wildcard test/check_*.c)))
LONGEST := check_kernels check_forward
SUITES  := $(LONGEST) $(filter-out $(LONGEST),$(SUITES))
SCRIPTS := $(wildcard test/check_*.sh)
SCRIPTS := test/check_run.sh $(filter-out test/check_run.sh,$(SCRIPTS))
SANITIZE := -O1 -g1 -DSANITIZED -fsanitize=address,undefined \
            -fno-sanitize-recover=all

build/debug/%.o: %.c | build/debug
	$(CC) $(CPPFLAGS) $(SANITIZE) $(FLAGS) -c -o $@ $<

build/debug/lfm2.o: CPPFLAGS += -DLFM2_NO_SIMD $(FMA)
build/debug/lfm2.o: SANITIZE += -O2

build/debug/run: build/debug/run.o build/debug/lfm2.o
	$(CC) $(SANITIZE) $(LDFLAGS) -o $@ $^ $(LIBS)

debug: build/debug/run

# The program for the scripts of check-debug: the suites test the library with
# sanitizers, and with them it would take minutes to answer.
build/debug/quick/run: build/debug/run.o build/lfm2.o | build/debug/quick
	$(CC) $(SANITIZE) $(LDFLAGS) -o $@ $^ $(LIBS)

# One program for each suite.  Most include lfm2.c to reach all of it.  The
# kernels take long to compile, minutes with sanitizers: some suites link the
# library, and those that never get to a kernel leave them out.
LINKED  := check_arithmetic check_chat check_forward check_gguf \
           check_golden check_inspect check_jobs check_sandbox check_schema
PLAIN   := check_alloc check_api check_formats check_math check_sampler \
           check_sequences check_spans check_stdio check_threads \
           check_tokenizer check_trace check_vocab
# The helpers are compiled once, and without sanitizers: they give no input that
# is not on the heap, and the reference is slow enough.
HELPERS := build/test/util.o build/test/reference.o
$(HELPERS): test/util.h test/reference.h | build/test
CHECK    = $(shell pkg-config --cflags --libs check 2>/dev/null || echo -lcheck)
COMPILE  = $(CC) $(CPPFLAGS) -std=c11 $(EXACT) -Wall -Wextra -Wno-missing-field-initializers -pthread \
           -DSUITE=$(*:check_%=%_suite) -o $@ $< test/main.c $(filter %.o,$^)

# -O1 takes half as long to compile as -O2, which is for those that compute much;
# -O0, for those that compute little, half of that.
LEVEL   := -O1
HEAVY   := check_sequences check_spans check_trace
LIGHT   := check_alloc check_inspect check_jobs check_sandbox check_schema \
           check_stdio

# The scalar code multiplies and adds most of the time.  The CPU's instruction for
# that gives the same bits as the program's own one, and is faster.
FMA      = $(shell grep -qw fma /proc/cpuinfo 2>/dev/null && \
             $(CC) -mfma -E -x c /dev/null >/dev/null 2>&1 && echo -mfma)

build/test/check_kernels $(HEAVY:%=build/test/%): LEVEL := -O2
$(LIGHT:%=build/test/%): LEVEL := -O0
$(LIGHT:%=build/debug/test/%): SANITIZE += -O0
$(HEAVY:%=build/test/%) $(HEAVY:%=build/debug/test/%): CPPFLAGS += $(FMA)
$(PLAIN:%=build/test/%): CPPFLAGS += -DLFM2_NO_SIMD
$(LINKED:%=build/test/%): build/lfm2.o
build/test/%: test/%.c test/main.c $(HELPERS) $(wildcard test/*.h) lfm2.c \
              lfm2.h | build/test have-check
	$(COMPILE) $(LEVEL) $(CHECK) $(LIBS)

build/debug/test/%: CPPFLAGS += -DLFM2_NO_SIMD
build/debug/test/check_kernels: CPPFLAGS := $(CPPFLAGS) -DLFM2_AVX2_ONLY
$(LINKED:%=build/debug/test/%): build/debug/lfm2.o
build/debug/test/%: test/%.c test/main.c $(HELPERS) $(wildcard test/*.h) lfm2.c \
                    lfm2.h | build/debug/test build/test have-check
	$(COMPILE) $(SANITIZE) $(CHECK) $(LIBS)

# These include run.c instead.
RUN     := $(basename $(notdir $(shell grep -l run.c test/check_*.c)))
$(RUN:%=build/test/%) $(RUN:%=build/debug/test/%): run.c

have-check:
	@CC="$(CC)" sh scripts/install_check.sh

build/test/parrot: test/parrot.c test/util.c test/util.h | build/test
	$(CC) $(CPPFLAGS) -std=c11 -O1 -Wall -Wextra -o $@ $(filter %.c,$^) $(LIBS)

build/test/noise: test/noise.c test/util.c test/util.h run.c lfm2.h \
                  build/lfm2.o | build/test
	$(CC) $(CPPFLAGS) $(FLAGS:-M%=) -O1 -o $@ $(filter-out run.c,$(filter %.c %.o,$^)) $(LIBS)

# The page uses parts of run.c.  Here only a compiler for WebAssembly makes it
# run, but any other notices when one of these parts has changed.
build/test/page.o: scripts/page.c run.c lfm2.h | build/test
	$(CC) $(CPPFLAGS) -std=gnu11 -O0 -w -c -o $@ $<

TOOLS   := build/test/parrot build/test/noise build/test/page.o

check: have-check run lib $(SUITES:%=build/test/%) build/test/replay $(TOOLS)
	@sh test/all.sh ./run $(SCRIPTS) $(SUITES:%=build/test/%) \
	    build/test/replay

# Of the scripts, those that run the program for its own sake, and not to see what
# Python, Slurm or a reader makes of its output.
BESIDES := cold compare man pictures readme slurm synthetic

check-debug: have-check build/debug/quick/run $(SUITES:%=build/debug/test/%) \
             build/debug/test/replay $(TOOLS)
	@sh test/all.sh build/debug/quick/run \
	    $$(grep -l '"$$run"' \
	        $(filter-out $(BESIDES:%=test/check_%.sh),$(SCRIPTS))) \
	    $(SUITES:%=build/debug/test/%) build/debug/test/replay

check-bits:
	@sh test/bits.sh

check-ports:
	@WASM_CC="$(WASM_CC)" sh test/bits.sh ports

check-boot: static
	@scripts/boot.sh

check-bare:
	@mkdir -p build
	@sh test/bare.sh

# Where threads meet.
TSAN    := -O1 -g -fsanitize=thread -DLFM2_NO_SIMD

build/tsan/lfm2.o: lfm2.c lfm2.h | build/tsan
	$(CC) $(TSAN) $(FLAGS:-M%=) -c -o $@ $<

build/tsan/%: test/%.c test/main.c $(HELPERS) lfm2.c lfm2.h \
              | build/tsan have-check
	$(COMPILE) $(TSAN) $(CHECK) $(LIBS)

build/tsan/run: run.c build/tsan/lfm2.o
	$(CC) $(TSAN) $(FLAGS:-M%=) -o $@ $^ $(LIBS)

check-tsan: build/tsan/run build/tsan/check_threads
	@sh test/all.sh $^ test/tsan.sh

# In Chromium, with node, npm, and what make wasm needs.
build/browser/node_modules: | build
	mkdir -p build/browser
	cd build/browser && npm install --no-audit --no-fund --no-package-lock \
	    --prefix . playwright-core axe-core

check-page: run page build/browser/node_modules
	@node test/page.mjs

# Slow, and not part of the others.
check-valgrind: run build/test/replay
	@sh test/valgrind.sh

# A server, its clients and what stands in front of it.
check-clients: run build/test/parrot
	@RUN=./run sh test/clients.sh

check-load: run
	@RUN=./run sh test/load.sh

check-replicas: run
	@RUN=./run sh test/replicas.sh

# --------------------------------------------------------------- hostile input

# All targets are one program, with libFuzzer or, to run files again, without.
FUZZ    := test/fuzz_main.c test/fuzz_library.c test/fuzz_run.c \
           test/fuzz_mutate.c test/util.c
FUZZED  := $(FUZZ) test/fuzz.h test/util.h run.c lfm2.h

build/test/replay: $(FUZZED) build/lfm2.o | build/test
	$(CC) $(CPPFLAGS) $(FLAGS:-M%=) -O1 -o $@ $(FUZZ) build/lfm2.o $(LIBS)

build/debug/test/replay: $(FUZZED) build/debug/lfm2.o | build/debug/test
	$(CC) $(CPPFLAGS) $(FLAGS:-M%=) $(SANITIZE) -o $@ $(FUZZ) \
	    build/debug/lfm2.o $(LIBS)

fuzz-replay: build/debug/test/replay
	$<

# Conversions that lose bits count as errors, too; unsigned overflow does not,
# for it is what hashes and random numbers are made of.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= gguf vocab inspect text state json calls chat session batch \
                serve schema
FUZZ_CC      := clang -g -DLFM2_NO_SIMD -DLIBFUZZER -fno-sanitize-recover=all \
    -fsanitize=address,undefined,implicit-conversion,local-bounds,nullability

build/fuzz/lfm2.o: lfm2.c lfm2.h | build/fuzz
	$(FUZZ_CC) $(FLAGS:-M%=) -O2 -fsanitize=fuzzer-no-link \
	    -fno-sanitize-coverage=trace-cmp -c -o $@ $<

build/fuzz/fuzz: $(FUZZED) build/fuzz/lfm2.o
	$(FUZZ_CC) $(FLAGS:-M%=) -O1 -fsanitize=fuzzer -o $@ $(FUZZ) \
	    build/fuzz/lfm2.o $(LIBS)

fuzz: build/fuzz/fuzz
	@sh test/fuzz.sh $(FUZZ_SECONDS) $(FUZZ_TARGETS)

# ------------------------------------------------------------------- the speed

# NAME:QUANT, as in scripts/make_synthetic.py, becomes build/bench/NAME-QUANT.gguf.
BENCH_MODELS ?= 350m:q4_0 1.2b:q4_0
BENCH_FILES  := $(patsubst %,build/bench/%.gguf,$(subst :,-,$(BENCH_MODELS)))

build/bench/%.gguf: | build/bench
	@for python in python3 /usr/bin/python3; do \
	    $$python -c 'import numpy' 2>/dev/null || continue; \
	    name='$*'; \
	    exec $$python scripts/make_synthetic.py "$${name%-*}" "$${name##*-}" $@; \
	done; \
	echo "make bench: writing $@ needs python3 with numpy" >&2; exit 1

bench: run $(BENCH_FILES)
	@for file in $(BENCH_FILES); do \
	    ./run --bench $$file $(BENCH) && echo || exit; \
	done
	@[ -z "$(LLAMA_BENCH)" ] || \
	    scripts/compare_llama.sh "$(LLAMA_BENCH)" $(BENCH_FILES)

clean:
	rm -rf build run

-include $(wildcard build/*.d build/debug/*.d)

.PHONY: demo pictures lib install uninstall static wasm page debug have-check \
        check check-debug check-bits check-ports check-page check-clients \
        check-load check-replicas check-boot check-bare check-tsan \
        check-valgrind fuzz fuzz-replay bench clean
