// The page in a real browser, headless Chromium driven by playwright-core:
//     make check-page
// build/page is served to it, and then ./run --serve serves the page itself.
// Answers and their hashes are those of the command line.  Screenshots are left
// in build/browser, for somebody to look at.
import { execFileSync, spawn } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';

const modules = createRequire(`${process.cwd()}/build/browser/`);
const { chromium } = modules('playwright-core');
const question = 'What is a short convolution?';
const model = process.env.PAGE_MODEL ?? 'test/tiny.gguf';
const said = JSON.parse(execFileSync('./run', [
    '-q', model, '--temp', '0', '--json', question
]));
const expected = said.choices[0].message.content;
const hash = said.lfm2.logits_hash;
let passed = 0, failed = 0;

async function check(name, work) {
    try {
        await work();
        passed++;
        console.log(`ok    ${name}`);
    } catch (error) {
        failed++;
        console.log(`FAIL  ${name}: ${error.message}`);
    }
}

function same(is, wanted) {
    if (is !== wanted)
        throw new Error(`${JSON.stringify(is)}, expected ` +
                        JSON.stringify(wanted));
}

// Starts a program, and waits for the first line it prints that matches.
function start(pattern, ...command) {
    const child = spawn(command[0], command.slice(1));
    return new Promise((resolve, reject) => {
        let all = '';
        for (const out of [child.stdout, child.stderr])
            out.on('data', piece => {
                all += piece;
                if (pattern.test(all))
                    resolve([child, all.match(pattern)[0]]);
            });
        child.on('exit', () => reject(new Error(all)));
    });
}

const [files, origin] = await start(/http:\S+/, 'python3',
                                    'scripts/serve_page.py', '0');
const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    args: ['--no-sandbox', '--disable-gpu']
});
const page = await browser.newPage({ viewport: { width: 1000, height: 800 } });
page.setDefaultTimeout(60000);
const strangers = [];
page.on('request', r => {
    if (new URL(r.url()).hostname !== '127.0.0.1' && /^http/.test(r.url()))
        strangers.push(r.url());
});
const wrong = [];
page.on('pageerror', e => wrong.push(String(e)));

const text = selector => page.locator(selector).last().innerText();
const finished = () => page.locator('#send:visible').waitFor();
const ready = () => page.waitForFunction(
    () => /^(Ready|Connected)/.test(document.getElementById('status').innerText));

async function set(name, value) {
    await page.locator('#settings').evaluate(e => { e.open = true; });
    await page.fill(`[name=${name}]`, value);
    await page.locator('#settings').evaluate(e => { e.open = false; });
}

async function ask(words) {
    await page.fill('#question', words);
    await page.press('#question', 'Enter');
}

// Drags a file onto the page with the mouse.
async function drop(path) {
    const mouse = await page.context().newCDPSession(page);
    const data = {
        items: [], files: [`${process.cwd()}/${path}`], dragOperationsMask: 1
    };
    for (const type of ['dragEnter', 'dragOver', 'drop'])
        await mouse.send('Input.dispatchDragEvent',
                         { type, x: 300, y: 300, data });
}

async function shoot(name, width, height, scheme) {
    await page.emulateMedia({ colorScheme: scheme });
    await page.setViewportSize({ width, height });
    await page.screenshot({ path: `build/browser/${name}.png` });
}

async function accessible() {
    await page.evaluate(await readFile(modules.resolve('axe-core'), 'utf8'));
    for (const scheme of ['light', 'dark']) {
        await page.emulateMedia({ colorScheme: scheme });
        const { violations } = await page.evaluate(() => axe.run());
        const bad = violations.filter(
            v => ['serious', 'critical'].includes(v.impact));
        same(bad.map(v => `${v.id}: ${v.nodes[0].html}`).join('; '), '');
    }
}

await check('the page opens with the model that ships', async () => {
    await page.goto(origin);
    await ready();
});
await check('its memory is the file and little more', async () => {
    const status = await text('#status');
    const [, size, unit] = status.match(/([\d.]+)\s(\w+) beside the file/);
    same(unit, 'MB');
    if (size > 30)
        throw new Error(status);
});
await check('the page is isolated, and may have threads', async () => {
    same(await page.evaluate(() => crossOriginIsolated), true);
});
await check('an answer is the command line\'s, and so is its hash', async () => {
    await set('temperature', '0');
    await ask(question);
    await finished();
    same(await text('.assistant > .text'), expected);
    same((await text('.assistant > .numbers')).split('hash ')[1], hash);
});
await check('the next turn reads only what is new', async () => {
    await ask('And what is GGUF?');
    await finished();
    same(await page.locator('article').count(), 4);
    same(await text('#error'), '');
});
await check('text is never markup', async () => {
    await ask('<img src=x onerror="document.title=1"><b>bold</b>');
    await finished();
    same(await page.locator('.user img, .user b').count(), 0);
    same(await page.title(), 'lfm2.c');
});
await check('the experts of an answer are a picture', async () => {
    await page.locator('.experts summary').last().click();
    same(await page.locator('.experts svg').last().isVisible(), true);
});
await check('no serious finding of axe', accessible);
await shoot('wide-light', 1000, 800, 'light');
await shoot('phone-dark', 390, 780, 'dark');
await check('nothing is wider than a phone', async () => {
    same(await page.evaluate(() => document.documentElement.scrollWidth), 390);
});
await check('settings, and no serious finding in them', async () => {
    await page.locator('#settings').evaluate(e => { e.open = true; });
    await accessible();
    await shoot('phone-settings', 390, 780, 'light');
    await shoot('wide-settings', 1000, 800, 'dark');
    await page.locator('#settings').evaluate(e => { e.open = false; });
});
await check('a stopped answer stays, and the next is whole', async () => {
    await page.click('#new');
    await set('temperature', '1.5');
    await set('seed', '3');
    await ask('Tell me a long story.');
    await page.locator('.assistant .text:not(:empty)').waitFor();
    await page.keyboard.press('Escape');
    await finished();
    await page.click('#new');
    await set('temperature', '0');
    await set('seed', '');
    await ask(question);
    await finished();
    same(await text('.assistant > .text'), expected);
});
await check('a damaged file is one sentence, and the page goes on', async () => {
    const bytes = await readFile('test/tiny.gguf');
    await writeFile('build/browser/damaged.gguf', bytes.subarray(0, 100000));
    await drop('build/browser/damaged.gguf');
    await page.locator('#error:not(:empty)').waitFor();
    console.log(`      ${await text('#error')}`);
    await page.click('#new');
    await ask(question);
    await finished();
    same((await text('.assistant > .numbers')).split('hash ')[1], hash);
});
await check('a file that is chosen', async () => {
    await page.setInputFiles('#file', 'test/tiny.gguf');
    await page.locator('#progress').waitFor({ state: 'hidden' });
    await ready();
    await ask(question);
    await finished();
    same((await text('.assistant > .numbers')).split('hash ')[1], hash);
});

// ./run --serve, as another origin and as its own.
const [served, address] = await start(
    /http:\S+/, './run', 'test/tiny.gguf', '--serve', '0', '--page',
    'scripts/page.html', '--cors', origin);
await check('a server\'s address', async () => {
    await page.locator('#settings').evaluate(e => { e.open = true; });
    await page.fill('#server', address);
    await page.click('#connect');
    await ready();
    await ask(question);
    await finished();
    same(await text('.assistant > .text'), expected);
});
await check('the page that a server serves', async () => {
    await page.goto(address);
    await ready();
    await set('temperature', '0');
    await ask(question);
    await finished();
    same(await text('.assistant > .text'), expected);
});
await check('a refusal is a sentence', async () => {
    await set('temperature', '-1');
    await ask(question);
    await page.locator('#error:not(:empty)').waitFor();
    console.log(`      ${await text('#error')}`);
});
served.kill();
await check('no other host was asked, and nothing went wrong', async () => {
    same(strangers.join(' '), '');
    same(wrong.join(' '), '');
});

await browser.close();
files.kill();
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
