// A worker that answers requests, seen from the page.

export class Asker {
  #worker;
  #waiting = new Map();
  #next = 1;

  /**
   * @param {URL} url of the worker's module
   * @param {(event: string, value: any) => void} onEvent
   */
  constructor(url, onEvent = () => {}) {
    this.#worker = new Worker(url, { type: "module" });
    this.#worker.onmessage = ({ data }) => {
      if (data.event) {
        onEvent(data.event, data.value);
        return;
      }
      const { resolve, reject } = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      if (data.error === undefined) {
        resolve(data.result);
      } else {
        reject(new Error(data.error));
      }
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      const missing = `${url.pathname} cannot be run: is a file of the page missing on the server?`;
      this.#fail(new Error(event.message || missing));
    };
  }

  /** The result of one request; rejects with the worker's own words. */
  ask(op, request = {}, transfer = []) {
    return new Promise((resolve, reject) => {
      const id = this.#next++;
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, op, ...request }, transfer);
    });
  }

  /** Tell it something that has no answer. */
  tell(op, request) {
    this.#worker.postMessage({ op, ...request });
  }

  /** Stop it and free its memory; what is still asked is refused. */
  end() {
    this.#worker.terminate();
    this.#fail(new Error("the worker was ended"));
  }

  #fail(error) {
    for (const { reject } of this.#waiting.values()) {
      reject(error);
    }
    this.#waiting.clear();
  }
}
