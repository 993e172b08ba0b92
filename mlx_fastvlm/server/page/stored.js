/**
 * JSON in the browser's storage, of the kind "local", until it is cleared, or "session", until the tab is closed. A
 * browser that lends none, or holds something broken, is one that remembers nothing.
 */

/** What is kept under a name, or undefined. */
export function read(name, kind = "local") {
  try {
    return JSON.parse(window[`${kind}Storage`].getItem(name)) ?? undefined;
  } catch {
    return undefined;
  }
}

/** Keep a value under a name. */
export function write(name, value, kind = "local") {
  try {
    window[`${kind}Storage`].setItem(name, JSON.stringify(value));
  } catch {
    // Private windows and full storage: the page works on, and forgets.
  }
}
