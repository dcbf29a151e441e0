// The engine behind scripts/page.html, in a worker of its own so that the page
// never waits.  It is scripts/page.c: bodies of requests go in, the bytes of
// responses come out.  Messages to it:
//     { open: File or URL, context, threads }   { ask: body }   { stop: true }
// and from it:
//     { loaded, total }   { facts, bytes, beside }   { status }   { part }   { end }
//     { error: a sentence }

let program, memory, said = '', stopped = false, inHead = true;
const decoder = new TextDecoder();
const bytes = (at, n) => new Uint8Array(memory.buffer, at >>> 0, n >>> 0);

// A response begins with its head, as HTTP has it.
function send(at, n) {
    let text = decoder.decode(bytes(at, n).slice());
    if (inHead && n > 0) {
        const end = text.indexOf('\r\n\r\n');
        postMessage({ status: Number(text.split(' ')[1]) });
        text = text.slice(end + 4);
        inHead = false;
    }
    if (text)
        postMessage({ part: text });
}

// Of the system the program has a clock, and a place to complain.  It finds no
// files, and everything else is not there either.
const NO_SUCH_THING = 52, BAD_DESCRIPTOR = 8;
const system = {
    clock_time_get(id, precision, at) {
        const now = id === 0 ? Date.now() : performance.now();
        new DataView(memory.buffer)
            .setBigUint64(at >>> 0, BigInt(Math.round(now * 1e6)), true);
        return 0;
    },
    fd_write(fd, vectors, n, written) {
        const view = new DataView(memory.buffer);
        let sum = 0;
        for (let i = 0; i < n; i++) {
            const at = (vectors >>> 0) + 8 * i;
            const size = view.getUint32(at + 4, true);
            said += decoder.decode(bytes(view.getUint32(at, true), size).slice());
            sum += size;
        }
        view.setUint32(written >>> 0, sum, true);
        return 0;
    },
    fd_prestat_get: () => BAD_DESCRIPTOR,
    proc_exit(code) {
        throw new Error(`the program ended with ${code}`);
    }
};

// What the program said last, without its name and the file's.
function sentence(error) {
    const last = said.trim().split('\n').pop();
    said = '';
    return last.replace(/^\w+: (the file: )?/, '') || String(error?.message ?? error);
}

// The file goes straight to where it is used: behind the memory that malloc()
// has, once it has been called and knows where that ends.
async function read(source) {
    let size = source.size, stream;
    if (size === undefined) {
        let response = await fetch(source);
        if (!response.ok)
            throw new Error(`${source}: ${response.status} ` +
                            response.statusText);
        size = Number(response.headers.get('content-length'));
        if (!size || response.headers.get('content-encoding')) {
            const blob = await response.blob();
            size = blob.size;
            response = new Response(blob);
        }
        stream = response.body;
    } else
        stream = source.stream();
    let start;
    try {
        program.page_room(1);
        start = memory.grow(Math.ceil(size / 65536)) * 65536;
    } catch {
        throw new Error(`The file has ${(size / 1e9).toFixed(1)} GB, for ` +
                        'which there is no memory; a page has 4 GB at most.');
    }
    let at = 0, told = 0;
    for (const reader = stream.getReader(); ;) {
        const { done, value } = await reader.read();
        if (done)
            break;
        if (at + value.length > size)
            throw new Error('The file grows while it is read.');
        bytes(start + at, value.length).set(value);
        at += value.length;
        if (at - told > size / 200 || at === size)
            postMessage({ loaded: told = at, total: size });
    }
    if (at < size)
        throw new Error(`The file ended after ${at} of ${size} bytes.`);
    return [start, size];
}

// Several threads need shared memory, which a page has if its server says that
// nobody else's content is in it (two headers, see scripts/serve_page.py).
async function start(module) {
    const instance = await WebAssembly.instantiate(module, {
        env: { memory }, page: { send },
        wasi_snapshot_preview1: new Proxy(system, {
            get: (all, name) => all[name] ?? (() => NO_SUCH_THING)
        })
    });
    program = instance.exports;
}

// Of the 4 GB that there can be, as much as this machine lets a page reserve.
function reserve(shared) {
    for (let maximum = 65536; ; maximum /= 2)
        try {
            return new WebAssembly.Memory({ initial: 64, maximum, shared });
        } catch (error) {
            if (maximum < 8192)
                throw error;
        }
}

// A worker for each thread but this one.
async function start_threads(module, n) {
    const started = [], stack = 1 << 18;
    program.page_workers(n);
    for (let i = 0; i < n; i++) {
        const worker = new Worker(self.location, { type: 'module' });
        const top = program.page_room(stack) + stack & -16;
        worker.postMessage({ thread: i, module, memory, top });
        started.push(new Promise((resolve, reject) => {
            worker.onmessage = resolve;
            worker.onerror = () => reject(new Error('no worker for a thread'));
        }));
    }
    await Promise.all(started);
}

async function be_thread({ thread, module, memory: shared, top }) {
    memory = shared;
    await start(module);
    program.__stack_pointer.value = top;
    postMessage('ready');
    program.page_thread(thread);
}

// With relaxed SIMD, where the browser has it.
async function load(name) {
    try {
        return await WebAssembly.compileStreaming(fetch(`${name}_relaxed.wasm`));
    } catch {
        return WebAssembly.compileStreaming(fetch(`${name}.wasm`));
    }
}

async function open({ open: source, context, threads }) {
    const n = self.crossOriginIsolated
        ? Math.max(1, threads || Math.min(navigator.hardwareConcurrency, 8))
        : 1;
    const module = await load(n > 1 ? 'page_threads' : 'page');
    memory = reserve(n > 1);
    await start(module);
    program._initialize();
    if (n > 1)
        await start_threads(module, n - 1);
    const [at, size] = await read(source);
    const facts = program.page_open(at, size, n, context) >>> 0;
    if (!facts)
        throw new Error(sentence());
    const end = new Uint8Array(memory.buffer).indexOf(0, facts);
    postMessage({
        facts: JSON.parse(decoder.decode(bytes(facts, end - facts).slice())),
        bytes: size,
        beside: memory.buffer.byteLength - size
    });
}

// Lets messages in.
const { port1, port2 } = new MessageChannel();
const turn = () => new Promise(resolve => {
    port1.onmessage = resolve;
    port2.postMessage(0);
});

async function ask(body) {
    const text = new TextEncoder().encode(body);
    const room = program.page_room(text.length) >>> 0;
    bytes(room, text.length).set(text);
    stopped = false;
    inHead = true;
    for (let more = program.page_ask(room, text.length); more;
         more = program.page_step()) {
        await turn();
        if (stopped) {
            program.page_stop();
            break;
        }
    }
    postMessage({ end: true });
}

onmessage = async ({ data }) => {
    try {
        if (data.open)
            await open(data);
        else if (data.module)
            await be_thread(data);
        else if (data.ask)
            await ask(data.ask);
        else if (data.stop)
            stopped = true;
    } catch (error) {
        postMessage({ error: sentence(error) });
    }
};
