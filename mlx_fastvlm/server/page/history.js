/** The answers so far: a bounded list in memory, and, if the user wants, in the browser's database over reloads. */

const MOST = 200;
const DATABASE = "mlx-fastvlm";
const STORE = "answers";

/** Entries, newest first; a "change" event follows when they change. */
export class History extends EventTarget {
  #entries = [];
  #database = null; // a promise of it while entries are kept

  get entries() {
    return this.#entries;
  }

  /** Note an answer of a `Session`: all of it but the messages, which hold whole pictures. */
  add({ messages, ...answer }) {
    this.#replace([answer, ...this.#entries].slice(0, MOST));
  }

  remove(id) {
    this.#replace(this.#entries.filter((entry) => entry.id !== id));
  }

  /** Empty the list. Returns how to undo it. */
  clear() {
    const cleared = this.#entries;
    this.#replace([]);
    return () => this.#replace([...this.#entries, ...cleared].slice(0, MOST));
  }

  /**
   * Keep the list in the browser's database from now on, what is there already included; or no more, and remove what
   * is there. A browser that lends no database keeps nothing.
   */
  async keep(isWanted) {
    if (isWanted === (this.#database !== null)) return;
    try {
      if (isWanted) await this.#open();
      else (await this.#store()).clear();
    } catch {
      isWanted = false;
    }
    if (!isWanted) this.#database = null;
  }

  async #open() {
    this.#database = openDatabase();
    const kept = await finished((await this.#store()).getAll());
    const known = withoutThose(kept, this.#entries).sort((one, other) => (one.time < other.time ? 1 : -1));
    const all = [...this.#entries, ...known].slice(0, MOST);
    await this.#write(withoutThose(all, kept), withoutThose(kept, all));
    this.#show(all);
  }

  #replace(entries) {
    const [added, removed] = [withoutThose(entries, this.#entries), withoutThose(this.#entries, entries)];
    this.#write(added, removed).catch(() => {}); // a full disk takes nothing from the list that is shown
    this.#show(entries);
  }

  #show(entries) {
    this.#entries = entries;
    this.dispatchEvent(new Event("change"));
  }

  /** Only what has changed: another tab may write there too. */
  async #write(added, removed) {
    if (this.#database === null) return;
    const store = await this.#store();
    for (const entry of added) store.put(entry);
    for (const { id } of removed) store.delete(id);
  }

  async #store() {
    return (await this.#database).transaction(STORE, "readwrite").objectStore(STORE);
  }
}

function withoutThose(entries, others) {
  const ids = new Set(others.map(({ id }) => id));
  return entries.filter(({ id }) => !ids.has(id));
}

function openDatabase() {
  const request = indexedDB.open(DATABASE, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  return finished(request);
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
