#!/usr/bin/env node
// Runs a program for WebAssembly under node:
//     make wasm
//     node scripts/run_wasm.mjs build/run.wasm test/tiny.gguf "What is GGUF?"
// All that the program sees is the current directory, what lies below it, its
// arguments and its environment.
import { readFile } from 'node:fs/promises';
import process from 'node:process';
import { setFlagsFromString } from 'node:v8';
import { WASI } from 'node:wasi';

// Not needed: the news that node:wasi is experimental, and its fast calls, with
// which node crashes once the program's memory has grown (nodejs/node#53087).
process.removeAllListeners('warning');
setFlagsFromString('--no-turbo-fast-api-calls');
if (parseInt(process.versions.node) < 21)
    setFlagsFromString('--experimental-wasm-relaxed-simd');

const args = process.argv.slice(2);
const wasi = new WASI({
    version: 'preview1', args, env: process.env, preopens: { '/': '.' },
    returnOnExit: true
});
const program = await WebAssembly.compile(await readFile(args[0]));
const instance = await WebAssembly.instantiate(program, {
    wasi_snapshot_preview1: wasi.wasiImport
});

process.exit(wasi.start(instance));
