/** Shows the answer under way with its figures, and tells screen readers when it has ended. */

import { byId, element } from "./dom.js";
import { resolutionText } from "./pictures.js";

const STATES = {
  idle: "Idle",
  watching: "Watching",
  processing: "Processing prompt",
  generating: "Generating",
  waiting: "Waiting",
  reconnecting: "Reconnecting",
  error: "Error",
};
const STAGES = {
  receive: "Request received",
  recognize: "Picture recognized",
  decode: "Picture decoded",
  preprocess: "Picture fitted",
  tokenize: "Prompt tokenized",
  wait: "Waited for its turn",
  encode: "Picture encoded",
  prefill: "Prompt read",
  first_token: "First token drawn",
};
const ENDINGS = { length: "cut at the token limit", stopped: "stopped" };

/** Listens to a `Session`. */
export class AnswerView {
  #session;
  #shown = null;
  #isWatching = false; // whether frames are asked about, those that the gate lets pass

  constructor(session) {
    this.#session = session;
    session.addEventListener("state", () => this.#showState());
    session.addEventListener("begin", ({ detail }) => this.#begin(detail));
    session.addEventListener("progress", ({ detail }) => this.#show(detail));
    session.addEventListener("end", ({ detail }) => this.#end(detail));
    this.#showState();
  }

  /** Answers a second and frames held back, of the loop over a video, and whether it runs. */
  showLoop({ rate, held, isRunning }) {
    if (isRunning !== this.#isWatching) {
      this.#isWatching = isRunning;
      this.#showState();
    }
    byId("rate").textContent = rate === null ? "–" : rate.toFixed(rate < 10 ? 1 : 0);
    byId("held").textContent = held;
  }

  #showState() {
    const { state, problem } = this.#session;
    const shown = state === "idle" && this.#isWatching ? "watching" : state;
    byId("state").dataset.state = shown;
    byId("state-text").textContent = STATES[shown];
    byId("answer").setAttribute("aria-busy", String(this.#session.isBusy));
    byId("waiting").textContent = state === "waiting" || state === "reconnecting" ? problem : "";
    if (state === "error") this.#show(this.#shown); // not the last answer beside another picture
  }

  #begin(answer) {
    this.#shown = answer;
    const thumbnail = byId("answer-thumbnail");
    thumbnail.hidden = answer.thumbnail === null;
    if (answer.thumbnail) thumbnail.src = answer.thumbnail;
    byId("answer-prompt").textContent = answer.prompt;
    byId("answer-ending").textContent = "";
    byId("answer-card").dataset.stale = "true"; // the last answer stays readable until this one begins
  }

  #show(answer) {
    if (answer !== this.#shown) return;
    delete byId("answer-card").dataset.stale;
    byId("answer").textContent = answer.text;
    if (answer.timings) this.#showTimings(answer);
  }

  #showTimings({ timings, usage, finishReason }) {
    const ttft = `${Math.round(1000 * timings.ttft)} ms`;
    byId("ttft").textContent = `TTFT ${ttft}`;
    byId("ttft").hidden = false;
    byId("ttft-figure").textContent = ttft;
    byId("tps").textContent = finishReason && timings.generation_tps ? timings.generation_tps.toFixed(0) : "–";
    byId("tokens").textContent = usage?.completion_tokens ?? "–";
  }

  #end(answer) {
    if (answer !== this.#shown) return;
    this.#show(answer);
    byId("answer-ending").textContent = ENDINGS[answer.finishReason] ?? "";
    byId("details").replaceChildren(...detailsOf(answer).flatMap(([name, value]) => [term(name), figure(value)]));
    if (answer.finishReason !== "stopped") byId("announcement").textContent = answer.text;
  }
}

/** Names and values of what can be known of an answer besides its words. */
function detailsOf({ model, resolution, preparation, seenTtft, timings, usage }) {
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const stages = Object.entries(timings?.stages ?? {});
  return [
    ["Model", model],
    ["Resolution", resolutionText(resolution)],
    ["Prompt", usage ? `${usage.prompt_tokens} tokens, ${cached ?? 0} known from before` : "–"],
    ["Picture prepared here", milliseconds(preparation)],
    ...stages.map(([name, seconds]) => [STAGES[name] ?? name, milliseconds(1000 * seconds)]),
    ["First token, as seen here", milliseconds(seenTtft)],
  ];
}

function milliseconds(value) {
  return value === null ? "–" : `${value.toFixed(1)} ms`;
}

function term(name) {
  return element("dt", {}, name);
}

function figure(value) {
  return element("dd", {}, value);
}
