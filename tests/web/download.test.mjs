// Downloads over real connections that break, lie and never end.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { after, before, test } from "node:test";

import { BundleError } from "../../qdeploy/web/device/canonical.mjs";
import { NetworkError, Pace, fetchFile, fetchRange } from "../../qdeploy/web/device/download.mjs";

const DATA = Uint8Array.from({ length: 200000 }, (_, i) => (i * i) >> 3);
let server, line, asked, answer, log;

before(async () => {
  server = createServer((request, response) => {
    asked.push(request.headers.range ?? "all");
    answer(request, response, asked.length);
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
});

after(() => server.close());

function begin(how) {
  [answer, asked, log] = [how, [], []];
  const base = new URL(`http://127.0.0.1:${server.address().port}/`);
  line = { base, pace: new Pace(), pauseMs: 10, log: (row) => log.push(row) };
}

/** A 206 for the range that is asked, of which only `most` bytes come. */
function partial(request, response, most = Infinity) {
  const [from, to] = request.headers.range.match(/[0-9]+/g).map(Number);
  const body = DATA.subarray(from, to + 1);
  response.writeHead(206, { "Content-Range": `bytes ${from}-${to}/${DATA.length}`, "Content-Length": body.length });
  if (most >= body.length) {
    response.end(body);
  } else {
    response.write(body.subarray(0, most), () => setTimeout(() => response.destroy(), 20));
  }
}

async function read(start, stop) {
  const found = [];
  for await (const part of fetchRange(line, "objects/x", start, stop, DATA.length)) {
    found.push(...part);
  }
  return Uint8Array.from(found);
}

test("a range is asked for once", async () => {
  begin((request, response) => partial(request, response));
  assert.deepEqual(await read(100, 150000), DATA.slice(100, 150000));
  assert.deepEqual(asked, ["bytes=100-149999"]);
  assert.deepEqual(log, [{ path: "objects/x", range: "100-149999", status: 206, bytes: 149900 }]);
});

test("a broken line is taken up at the byte where it ended", async () => {
  begin((request, response, times) => partial(request, response, times < 4 ? 40000 : Infinity));
  assert.deepEqual(await read(0, 150000), DATA.slice(0, 150000));
  assert.deepEqual(asked, ["bytes=0-149999", "bytes=40000-149999", "bytes=80000-149999", "bytes=120000-149999"]);
  assert.equal(log.reduce((sum, row) => sum + row.bytes, 0), 150000);
});

test("a server without ranges sends the whole file", async () => {
  begin((request, response) => response.end(DATA));
  assert.deepEqual(await read(70000, 80000), DATA.slice(70000, 80000));
});

test("answers for other bytes are refused", async () => {
  const heads = ["bytes 0-9/200000", "bytes 100-199/100000", "bytes 100-200/200000", "bytes */200000", ""];
  for (const head of heads) {
    begin((request, response) => {
      response.writeHead(206, { "Content-Range": head });
      response.end(DATA.subarray(0, 100));
    });
    await assert.rejects(() => read(100, 200), BundleError, head);
  }
  for (const status of [404, 403, 416, 204]) {
    begin((request, response) => response.writeHead(status).end());
    await assert.rejects(() => read(100, 200), BundleError, String(status));
    assert.equal(asked.length, 1);
  }
  begin((request, response) => response.writeHead(302, { Location: "/objects/y" }).end());
  await assert.rejects(() => read(0, 100), NetworkError);
});

test("a server that stays broken is given up", async () => {
  begin((request, response) => response.writeHead(503).end());
  await assert.rejects(() => read(0, 100), NetworkError);
  assert.equal(asked.length, 4);
  begin((request, response) => response.destroy());
  await assert.rejects(() => fetchFile(line, "release.json", 100), NetworkError);
  assert.ok(asked.length >= 4);
});

test("an endless small file is left", async () => {
  begin((request, response) => {
    const more = () => response.write(new Uint8Array(4096), more);
    more();
  });
  await assert.rejects(() => fetchFile(line, "release.json", 65536), BundleError);
  assert.ok(log[0].bytes <= 65536 + 4096);
});

test("a pace holds bytes back", async () => {
  begin((request, response) => partial(request, response));
  line.pace.rate = 100000;
  const start = performance.now();
  await read(0, 30000);
  assert.ok(performance.now() - start > 200); // the lower bound of a pause, not a limit on time
});
