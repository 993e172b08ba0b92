/** The server, as the page calls it: models, health, and answers as they are made. No other request leaves the page. */

import { pause } from "./dom.js";
import * as stored from "./stored.js";

const HEALTH_SECONDS = [0.5, 1, 2, 4]; // between two looks whether the server is back; the last goes on
const KEY_NAME = "mlx-fastvlm.key";

/** The server said no, and why. `retryAfter`: seconds after which the same may be asked again, or null. */
export class ApiError extends Error {
  constructor(message, { status, code = null, retryAfter = null }) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** No server answers, or it broke off. */
export class ServerGone extends Error {}

/** Calls a server with the key that its user gave, if it wants one. */
export class Api {
  #key = stored.read(KEY_NAME, "session");
  #askForKey;
  #keyRequest = null;

  /** @param askForKey `async (isWrong) => key`, or null if the user will not say; called when the server refuses us. */
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  /** The cards of the models, the server's first first. */
  async models(signal) {
    return (await (await this.#request("v1/models", { signal })).json()).data;
  }

  /**
   * Ask, and yield the answer as it comes.
   *
   * @param body of POST /v1/chat/completions, less the fields about streaming.
   * @param signal aborts the request, upon which the server stops to generate.
   * @yields chunks of the answer as OpenAI's clients know them.
   * @throws ApiError, ServerGone; whatever `signal` is aborted with.
   */
  async *chat(body, signal) {
    const streaming = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.#request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(streaming),
      signal,
    });
    let isWhole = false;
    for await (const data of serverSentEvents(response.body, signal)) {
      if (data === "[DONE]") {
        isWhole = true; // the end of the stream follows; to leave before it would look like a stop
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw brokenOff(chunk.error);
      yield chunk;
    }
    if (!isWhole) throw new ServerGone("The answer broke off.");
  }

  /** Return when the server answers again. Throws ApiError if it says that it cannot. */
  async untilBack(signal) {
    for (let attempt = 0; ; attempt += 1) {
      await pause(1000 * (HEALTH_SECONDS[attempt] ?? HEALTH_SECONDS.at(-1)), signal);
      try {
        await this.#once("health", { signal });
        return;
      } catch (error) {
        if (!(error instanceof ServerGone)) throw error;
      }
    }
  }

  async #request(path, init) {
    for (;;) {
      const key = this.#key;
      try {
        return await this.#once(path, init);
      } catch (error) {
        if (error.status !== 401) throw error;
        const isOutdated = key !== this.#key; // another request has asked meanwhile
        if (!isOutdated && !(await this.#newKey(key !== undefined))) {
          throw new ApiError("This server asks for a key, and answers nothing without it.", { status: 401 });
        }
      }
    }
  }

  /** Ask the user, once for all requests that wait. Whether there is a new key. */
  async #newKey(isWrong) {
    this.#keyRequest ??= this.#askForKey(isWrong).finally(() => (this.#keyRequest = null));
    const key = await this.#keyRequest;
    if (!key) return false;
    this.#key = key;
    stored.write(KEY_NAME, key, "session");
    return true;
  }

  async #once(path, init) {
    const headers = { ...init.headers, ...(this.#key && { Authorization: `Bearer ${this.#key}` }) };
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), { ...init, headers, cache: "no-store" });
    } catch (error) {
      init.signal?.throwIfAborted();
      throw new ServerGone("The server does not answer.", { cause: error });
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? body.reason ?? `The server answered with status ${response.status}.`;
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  const retryAfter = Number.isFinite(seconds) ? seconds : null;
  return new ApiError(message, { status: response.status, code: body.error?.code, retryAfter });
}

/** An error in the middle of an answer. A server that is being stopped may well be started again. */
function brokenOff({ message, code }) {
  return code === "server_stopping" ? new ServerGone(message) : new ApiError(message, { status: 500, code });
}

/** The data of each event of a text/event-stream. */
async function* serverSentEvents(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      signal?.throwIfAborted(); // what was on its way already is not wanted either
      if (done) return;
      const events = (text + value).split(/\r?\n\r?\n/);
      text = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } catch (error) {
    signal?.throwIfAborted();
    throw error instanceof TypeError ? new ServerGone("The answer broke off.", { cause: error }) : error;
  } finally {
    reader.cancel().catch(() => {}); // a caller that wants no more; a broken stream has nothing to cancel
  }
}
