/**
 * Asking: one question at a time, from its pictures to the end of its answer, with patience for a server that is busy
 * or gone. Knows no elements; tells whoever listens how it goes.
 */

import { ServerGone } from "./api.js";
import { pause } from "./dom.js";

const ATTEMPTS = 5; // of a question whose server goes away; a busy server is asked again as long as it says so

/**
 * Events: "state", upon which `state` and `problem` have changed; "begin", "progress" and "end", whose detail is the
 * answer; "back", when a server that was gone has come back.
 *
 * States: "idle"; "processing", until the first token; "generating"; "waiting" for a busy server; "reconnecting" to one
 * that is gone; "error".
 */
export class Session extends EventTarget {
  #api;
  #abort = null;

  constructor(api) {
    super();
    this.#api = api;
  }

  state = "idle";
  /** In words, in the states "waiting", "reconnecting" and "error"; else "". */
  problem = "";

  get isBusy() {
    return this.#abort !== null;
  }

  /**
   * Ask a question, instead of one that may still be under way.
   *
   * @param question `{pictures, prompt, model, view, maxTokens, temperature, followed}`; `view` as pictures.js has it;
   *     `followed` is the answer that this question follows, if it does: it is about that answer's pictures then.
   * @returns the answer, also one that was stopped; null if there is none.
   */
  async ask(question) {
    this.stop();
    const abort = (this.#abort = new AbortController());
    const answer = begun(question);
    try {
      await this.#patiently(question, answer, abort.signal);
      this.#leave(abort, "idle");
    } catch (error) {
      if (abort.signal.aborted) answer.finishReason = "stopped";
      this.#leave(abort, "error", error.message);
    }
    if (answer.finishReason === null) return null;
    this.#tell("end", answer);
    return answer;
  }

  /** Break off the answer under way. */
  stop() {
    if (this.#abort === null) return;
    this.#abort.abort();
    this.#abort = null;
    this.#enter("idle");
  }

  async #patiently(question, answer, signal) {
    for (let attempt = 1; ; ) {
      try {
        await this.#once(question, answer, signal);
        return;
      } catch (error) {
        signal.throwIfAborted();
        if (error.retryAfter) {
          this.#enter("waiting", `The server is busy; asking again in ${error.retryAfter} s.`);
          await pause(1000 * error.retryAfter, signal);
        } else if (error instanceof ServerGone && attempt < ATTEMPTS) {
          attempt += 1;
          this.#enter("reconnecting", `${error.message} Waiting for it to come back.`);
          await this.#api.untilBack(signal);
          this.#tell("back");
        } else {
          throw error;
        }
      }
    }
  }

  async #once(question, answer, signal) {
    Object.assign(answer, { text: "", started: performance.now() });
    this.#tell("begin", answer);
    this.#enter("processing");
    answer.messages = await messagesOf(question);
    signal.throwIfAborted();
    answer.preparation = performance.now() - answer.started;
    const { model, view, maxTokens, temperature } = question;
    const { resolution, fit } = view;
    const body = { model, messages: answer.messages, resolution, fit, max_tokens: maxTokens, temperature };
    for await (const chunk of this.#api.chat(body, signal)) this.#take(chunk, answer);
    answer.messages = [...answer.messages, { role: "assistant", content: answer.text }];
  }

  #take(chunk, answer) {
    if (this.state !== "generating") {
      answer.seenTtft = performance.now() - answer.started;
      this.#enter("generating");
    }
    const choice = chunk.choices[0];
    answer.text += choice?.delta.content ?? "";
    answer.timings = chunk.timings ?? answer.timings;
    answer.usage = chunk.usage ?? answer.usage;
    answer.finishReason = choice?.finish_reason ?? answer.finishReason;
    this.#tell("progress", answer);
  }

  /** A question is over. If it was stopped, another may be under way, whose state stands. */
  #leave(abort, state, problem) {
    if (this.#abort !== abort) return;
    this.#abort = null;
    this.#enter(state, problem);
  }

  #enter(state, problem = "") {
    this.state = state;
    this.problem = problem;
    this.#tell("state");
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** An answer before its first word. The page's times are in milliseconds; `timings` has the server's, in seconds. */
function begun({ pictures, prompt, followed, model, view }) {
  return {
    id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, // randomUUID is for secure contexts only
    time: new Date().toISOString(),
    isFollowUp: Boolean(followed),
    source: followed?.source ?? pictures.map(({ name }) => name).join(", "),
    thumbnail: (followed ?? pictures[0]).thumbnail,
    prompt,
    model,
    resolution: view.resolution,
    fit: view.fit,
    text: "",
    finishReason: null,
    timings: null,
    usage: null,
    preparation: null, // until the pictures were ready to be sent
    seenTtft: null, // until the first event of the answer
    messages: null,
  };
}

async function messagesOf({ pictures, prompt, followed, view }) {
  if (followed) return [...followed.messages, { role: "user", content: prompt }];
  const urls = await Promise.all(pictures.map((picture) => picture.dataUrl(view)));
  const images = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return [{ role: "user", content: [...images, { type: "text", text: prompt }] }];
}
