/* parrot - writes a small LFM2 that says exactly what it is told to say.
 *
 *     parrot OUT.gguf [KEY=TEXT]... <SCRIPTS
 *
 * Each line is a script: what is said, in pieces between tabs, a token each,
 * with \n, \t, \\ and \xHH as in C; control tokens by their names.  The model
 * ends after the last piece, or begins again if that is \0.  The first script is
 * the answer to everything, but one in whose text a name stands as a word: the
 * second line is said to AB, the third to AC, and so on to ZZ.  It is to answer
 * greedily.  KEY=TEXT are strings of the metadata, KEY=@FILE those in a file,
 * KEY=#0.5 and KEY=#7. numbers, the latter whole; KEY= is no such key.
 * vocabulary=N adds unused tokens up to N, think=1 marks for thoughts.
 *
 * How it works: tokens of a script are numbered, and each is embedded as the unit
 * vector of its number, to which the output answers with the next one.  All other
 * tokens are embedded as one vector, and names as one each, which an attention
 * that looks everywhere alike adds to all that follow. */
#include "util.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TOKENS = 40000, MAX_STEPS = 4096, END = 7, HEAD = 64, N_FF = 256 };

static const char *const mark[] = {
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>",
    "<|fim_suf|>", "<|im_start|>", "<|im_end|>", "<|tool_list_start|>",
    "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|tool_response_start|>", "<|tool_response_end|>", "<think>", "</think>"
};

static const char *token[MAX_TOKENS], *merge[MAX_STEPS];
static int type[MAX_TOKENS], n_tokens, n_merges, n_marks = COUNT(mark) - 2;

/* Step i says `said` and goes on with step `next`, or -1: the end. */
static struct { int said, next; } step[MAX_STEPS];
static int n_steps, first[MAX_STEPS], name[MAX_STEPS], n_scripts;

static char *copy(const char *s)
{
    char *to = malloc(strlen(s) + 1);

    return to ? strcpy(to, s) : NULL;
}

/* A byte as vocabularies write it: a printable character. */
static void put_byte(char **to, int byte)
{
    int c = byte, n = 256;

    if (byte < 33 || (byte > 126 && byte < 161) || byte == 173) {
        for (int b = 0; b < byte; b++)
            n += b < 33 || (b > 126 && b < 161) || b == 173;
        c = n;
    }
    if (c < 128)
        *(*to)++ = (char)c;
    else {
        *(*to)++ = (char)(0xc0 | c >> 6);
        *(*to)++ = (char)(0x80 | (c & 63));
    }
}

static int add_token(const char *text, int kind)
{
    token[n_tokens] = copy(text);
    type[n_tokens] = kind;
    return n_tokens++;
}

/* A piece as the vocabulary writes it; returns 0 if it is \0. */
static int read_piece(const char *s, char *to)
{
    if (strcmp(s, "\\0") == 0)
        return 0;
    for (; *s; s++) {
        int byte = (unsigned char)*s;
        if (*s == '\\' && s[1]) {
            s++;
            byte = *s == 'n' ? '\n' : *s == 't' ? '\t' : *s;
            if (*s == 'x') {
                byte = (int)strtol((char[]){ s[1], s[2], 0 }, NULL, 16);
                s += 2;
            }
        }
        put_byte(&to, byte);
    }
    *to = '\0';
    return 1;
}

/* The control token of this name that no script has used, or a new one. */
static int take_token(const char *piece, const char *text)
{
    static char used[COUNT(mark)];

    for (int i = 0; i < n_marks; i++)
        if (strcmp(piece, mark[i]) == 0) {
            if (used[i]++)
                return add_token(piece, type[i]);
            return i;
        }
    return add_token(text, 1);
}

static void read_script(char *line)
{
    static char text[1 << 17];
    const int begin = n_steps;
    int loops = 0;

    line[strcspn(line, "\n")] = '\0';
    for (char *s = strtok(line, "\t"); s; s = strtok(NULL, "\t")) {
        if (!read_piece(s, text)) {
            loops = 1;
            break;
        }
        step[n_steps].said = take_token(s, text);
        step[n_steps].next = n_steps + 1;
        n_steps++;
    }
    first[n_scripts++] = n_steps > begin ? begin : -1;
    if (n_steps > begin)
        step[n_steps - 1].next = loops ? begin : -1;
}

/* ------------------------------------------------------------------ the model */

static int n_embd;

static float *zeros(int rows)
{
    return calloc((size_t)rows * (size_t)n_embd, sizeof(float));
}

static void put(struct gguf_writer *w, const char *tensor, int rows, int cols,
                float *x)
{
    const uint64_t dims[2] = { (uint64_t)cols, (uint64_t)rows };
    const size_t n = (size_t)rows * (size_t)cols * 4;
    struct bytes b = { NULL, 0, 0 };

    bytes_put(&b, x, n);
    gguf_write_tensor(w, tensor, 0, rows == 1 ? 1 : 2, dims, &b);
    free(b.p);
    free(x);
}

static float *ones(int n)
{
    float *x = malloc((size_t)n * sizeof *x);

    for (int i = 0; i < n; i++)
        x[i] = 1;
    return x;
}

/* Vectors: one a step, one a name, one for all else. */
static void put_words(struct gguf_writer *w)
{
    const int other = n_steps + n_scripts;
    float *in = zeros(n_tokens), *out = zeros(n_tokens);

    for (int i = 0; i < n_tokens; i++)
        in[i * n_embd + other] = 1;
    for (int k = 0; k < n_scripts; k++) {
        const int says = first[k] < 0 ? END : step[first[k]].said;
        out[says * n_embd + (k ? n_steps + k : other)] = k ? 1 : 0.001f;
        if (k) {
            in[name[k] * n_embd + other] = 0;
            in[name[k] * n_embd + n_steps + k] = 1;
        }
    }
    for (int i = 0; i < n_steps; i++) {
        const int next = step[i].next;
        in[step[i].said * n_embd + other] = 0;
        in[step[i].said * n_embd + i] = 1;
        out[(next < 0 ? END : step[next].said) * n_embd + i] = 100;
    }
    put(w, "token_embd.weight", n_tokens, n_embd, in);
    put(w, "token_embd_norm.weight", 1, n_embd, ones(n_embd));
    put(w, "output.weight", n_tokens, n_embd, out);
}

/* A convolution that gives nothing, and an attention that adds names up. */
static void put_layers(struct gguf_writer *w)
{
    float *v = zeros(n_embd), *o = zeros(n_embd);

    for (int i = n_steps; i < n_steps + n_scripts; i++)
        v[i * n_embd + i] = o[i * n_embd + i] = 1;
    put(w, "blk.0.shortconv.in_proj.weight", 3 * n_embd, n_embd,
        zeros(3 * n_embd));
    put(w, "blk.0.shortconv.conv.weight", n_embd, 3, zeros(3));
    put(w, "blk.0.shortconv.out_proj.weight", n_embd, n_embd, zeros(n_embd));
    put(w, "blk.1.attn_q.weight", n_embd, n_embd, zeros(n_embd));
    put(w, "blk.1.attn_k.weight", n_embd, n_embd, zeros(n_embd));
    put(w, "blk.1.attn_v.weight", n_embd, n_embd, v);
    put(w, "blk.1.attn_q_norm.weight", 1, HEAD, ones(HEAD));
    put(w, "blk.1.attn_k_norm.weight", 1, HEAD, ones(HEAD));
    put(w, "blk.1.attn_output.weight", n_embd, n_embd, o);
    for (int i = 0; i < 2; i++) {
        static const char *const part[] = { "attn_norm", "ffn_norm", "ffn_gate",
                                            "ffn_up", "ffn_down" };
        for (int k = 0; k < 5; k++) {
            char tensor[64];
            snprintf(tensor, sizeof tensor, "blk.%d.%s.weight", i, part[k]);
            if (k < 2)
                put(w, tensor, 1, n_embd, ones(n_embd));
            else if (k < 4)
                put(w, tensor, N_FF, n_embd, zeros(N_FF));
            else
                put(w, tensor, n_embd, N_FF, zeros(N_FF));
        }
    }
}

/* Text of the command line or of a file, or a number. */
static void put_value(struct gguf_writer *w, char *pair)
{
    char *value = strchr(pair, '=') + 1;
    struct bytes file;

    value[-1] = '\0';
    if (!*value)
        return;
    if (*value == '#' && value[strlen(value) - 1] == '.')
        write_scalar(w, pair, T_I32, (uint64_t)atoi(value + 1));
    else if (*value == '#')
        write_f32(w, pair, (float)atof(value + 1));
    if (*value == '#')
        return;
    if (*value != '@') {
        write_string(w, pair, value);
        return;
    }
    file = load_file(value + 1);
    bytes_put(&file, "", 1);
    write_string(w, pair, (char *)file.p);
    free(file.p);
}

static void put_config(struct gguf_writer *w)
{
    static const struct { const char *key; int n; } row[] = {
        { "lfm2.block_count", 2 }, { "lfm2.context_length", 128000 },
        { "lfm2.feed_forward_length", N_FF }, { "lfm2.shortconv.l_cache", 3 },
        { "tokenizer.ggml.bos_token_id", 1 },
        { "tokenizer.ggml.eos_token_id", END },
        { "tokenizer.ggml.padding_token_id", 0 },
    };
    const int n_head = n_embd / HEAD;

    for (size_t i = 0; i < COUNT(row); i++)
        write_scalar(w, row[i].key, T_U32, (uint64_t)row[i].n);
    write_scalar(w, "lfm2.embedding_length", T_U32, (uint64_t)n_embd);
    write_scalar(w, "lfm2.vocab_size", T_U32, (uint64_t)n_tokens);
    write_scalar(w, "lfm2.attention.head_count", T_U32, (uint64_t)n_head);
    write_ints(w, "lfm2.attention.head_count_kv", T_I32,
               (int[]){ 0, n_head }, 2);
    write_f32(w, "lfm2.attention.layer_norm_rms_epsilon", 1e-5f);
    write_f32(w, "lfm2.rope.freq_base", 1e6f);
    write_scalar(w, "tokenizer.ggml.add_bos_token", T_BOOL, 1);
    write_string(w, "tokenizer.ggml.model", "gpt2");
    write_string(w, "tokenizer.ggml.pre", "lfm2");
    write_strings(w, "tokenizer.ggml.tokens", token, n_tokens);
    write_ints(w, "tokenizer.ggml.token_type", T_I32, type, n_tokens);
    write_strings(w, "tokenizer.ggml.merges", merge, n_merges);
}

static void make_vocabulary(void)
{
    for (int i = 0; i < n_marks; i++)
        add_token(mark[i], i < END * 2 ? 3 : 4);
    for (int i = 0; i < 256; i++) {
        char text[4], *end = text;
        put_byte(&end, i);
        *end = '\0';
        add_token(text, 1);
    }
}

static void name_scripts(void)
{
    for (int k = 1; k < n_scripts; k++) {
        const char a = (char)('A' + k / 26), b = (char)('A' + k % 26);
        merge[n_merges++] = copy((char[]){ a, ' ', b, 0 });
        name[k] = add_token((char[]){ a, b, 0 }, 1);
    }
}

int main(int argc, char **argv)
{
    static char line[1 << 17];
    struct gguf_writer w = { .version = 3 };
    struct bytes file;
    int vocabulary = 0, has_template = 0;
    FILE *f;

    for (int i = 2; i < argc; i++)
        n_marks += strcmp(argv[i], "think=1") == 0 ? 2 : 0;
    make_vocabulary();
    while (fgets(line, sizeof line, stdin))
        read_script(line);
    name_scripts();
    write_string(&w, "general.architecture", "lfm2");
    for (int i = 2; i < argc; i++) {
        if (strncmp(argv[i], "vocabulary=", 11) == 0)
            vocabulary = atoi(argv[i] + 11);
        else if (strcmp(argv[i], "think=1") != 0) {
            has_template |= strncmp(argv[i], "tokenizer.chat_template=", 24)
                            == 0;
            put_value(&w, argv[i]);
        }
    }
    if (!has_template)                    /* that of lfm2, by its word       */
        write_string(&w, "tokenizer.chat_template", "<|tool_list_start|>");
    while (n_tokens < vocabulary) {
        snprintf(line, sizeof line, "[PAD%d]", n_tokens);
        add_token(line, 5);
    }
    for (n_embd = 256; n_embd < n_steps + n_scripts + 1;)
        n_embd += 256;
    put_config(&w);
    put_words(&w);
    put_layers(&w);
    file = writer_finish(&w);
    f = argc > 1 ? fopen(argv[1], "wb") : NULL;
    if (!f || fwrite(file.p, 1, file.n, f) != file.n || fclose(f) != 0) {
        perror("parrot");
        return 1;
    }
    return 0;
}
