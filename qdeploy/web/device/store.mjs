// What the device keeps: leaves under their SHA-256, and a few values. Nothing that comes out is trusted: who reads a
// leaf checks its digest again.

import { BundleError } from "./canonical.mjs";

/** Keeps nothing beyond the program's end. */
export class MemoryStore {
  leaves = new Map();
  values = new Map();

  async leafKeys() {
    return new Set(this.leaves.keys());
  }

  async getLeaf(sha256) {
    return this.leaves.get(sha256);
  }

  async putLeaf(sha256, data) {
    this.leaves.set(sha256, data);
  }

  async deleteLeaf(sha256) {
    this.leaves.delete(sha256);
  }

  async get(key) {
    return this.values.get(key);
  }

  async set(key, value) {
    this.values.set(key, value);
  }
}

/** The same in IndexedDB: it outlives the page. A write is reported when its transaction has ended. */
export class BrowserStore {
  #database;

  static async open(name = "qdeploy-device") {
    const request = indexedDB.open(name, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("leaves");
      request.result.createObjectStore("values");
    };
    const store = new BrowserStore();
    store.#database = await new Promise((resolve, reject) => {
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(refusal(request.error));
    });
    store.#database.onversionchange = () => store.#database.close(); // somebody deletes it
    return store;
  }

  #run(table, mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(table, mode, { durability: "strict" });
      const request = work(transaction.objectStore(table));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(refusal(transaction.error));
    });
  }

  async leafKeys() {
    return new Set(await this.#run("leaves", "readonly", (table) => table.getAllKeys()));
  }

  getLeaf(sha256) {
    return this.#run("leaves", "readonly", (table) => table.get(sha256));
  }

  putLeaf(sha256, data) {
    return this.#run("leaves", "readwrite", (table) => table.put(data, sha256));
  }

  deleteLeaf(sha256) {
    return this.#run("leaves", "readwrite", (table) => table.delete(sha256));
  }

  get(key) {
    return this.#run("values", "readonly", (table) => table.get(key));
  }

  set(key, value) {
    return this.#run("values", "readwrite", (table) => table.put(value, key));
  }
}

function refusal(error) {
  return new BundleError(`this browser keeps nothing for the page (${error?.message}): allow it storage, or free some`);
}
